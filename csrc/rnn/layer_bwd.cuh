// Backpropagation through time of one layer: all steps of both directions in one launch (designs B and C of
// layer_plan.h).
//
// The idea: a block owns some units and keeps their columns of W_hh in shared memory for the whole sequence. A step
// takes the slopes of the step after, of all gates of all units, which the group has exchanged; times the block's
// columns they are dL/dh of its units, in float32. With what bypasses the product (the GRU's z) and the gradients from
// outside, the units' slopes follow: rounded, they are sent on, and then stored for the GEMMs that make dW and dx of
// them. dL/dc and what bypasses the product stay in float32 registers, a thread holding the same units of the same rows
// throughout. Where a step began with a reset, or a row ends, nothing comes from the step after.
//
// On chip: the columns, partial sums and (in a cluster) the exchanged slopes of two steps in shared memory; what a step
// needs of the forward in registers, loaded before the wait. Who waits: the blocks of a group for each other, once a
// step.
//
// Bytes per row, unit and step, LSTM in a 16-bit type: 8 of kept, 4 of c, 2 of the gradient, 8 of slopes, once; and
// each block of a group reads the slopes of its rows and all units, 8·rows·H. Flops: 2·G·H² per row. The floor is the
// wait, 1 to 2 us through L2 and a few tenths within a cluster, and then the slopes. LSTM, B = 16, H = 768, bf16, 96
// blocks in two groups: 4.7 MB of slopes from L2, 0.9 us at 5.5 TB/s; 270 KB from memory, 0.06 us.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/convert.cuh"
#include "common/shared.cuh"
#include "rnn/exchange.cuh"
#include "rnn/gates_bwd.cuh"
#include "rnn/layer.h"
#include "rnn/resident.cuh"

namespace fused_ops::layers {

// What is null is not there, or zero.
template <typename T>
struct BackwardLayer {
  Sequence sequence;
  const T* grad_output;  // (tokens, directions·hidden)
  const T* grad_h_n;     // (directions, batch, hidden)
  const T* grad_c_n;
  const T* grad_c_all;   // (directions, tokens, hidden)
  const T* w_hh;         // (directions, G·hidden, hidden)
  const T* h0;           // (directions, batch, hidden)
  const T* c0;
  const T* output;       // (tokens, directions·hidden)
  const float* c_all;    // (directions, tokens, hidden)
  const T* kept;         // (directions, tokens, 4, hidden)
  T* slopes;             // (tokens, directions, S, hidden)
  T* dh0;                // (directions, batch, hidden)
  T* dc0;
  bool relu;
};

// The gate whose rows of W_hh slope `part` of a unit belongs to: the GRU's slopes are of n, r, z, its gates r, z, n.
template <Kind KIND>
__host__ __device__ constexpr int gate_of_slope(int part) {
  return KIND == Kind::gru ? (part + 2) % 3 : part;
}

template <typename T>
__device__ inline float optional(const T* from, int64_t at) {
  return from == nullptr ? 0.0f : to_float(from[at]);
}

// One of a thread's (row, unit) pairs.
template <typename T, Kind KIND>
struct BackCell {
  int16_t row, unit;      // of the group, of the block
  int length;             // -1: not the batch's, or not the layer's
  bool cut;               // nothing comes from the step after
  int token;              // of the step that what follows is for
  Saved<KIND> saved;
  float grad, grad_c;
  float dh, dc;           // dh: between steps, what bypasses the product
  T slopes[slopes_of(KIND)];
};

// A thread's share of a group's backward. A row of n steps begins with the gradients of its last state, before step n -
// 1; what is left in step -1 are those of its first.
template <typename T, Kind KIND>
class Backward {
 public:
  __device__ Backward(const BackwardLayer<T>& layer, const Partition& p, const Place& at)
      : layer_(layer), sequence_(layer.sequence), at_(at) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      BackCell<T, KIND>& cell = cells_[i];
      const int index = static_cast<int>(threadIdx.x) + i * kThreads;
      cell = {};
      cell.row = static_cast<int16_t>(index / p.units), cell.unit = static_cast<int16_t>(index % p.units);
      const int64_t b = at.first_row + cell.row;
      const bool there = cell.row < p.rows && b < sequence_.batch && at.first_unit + cell.unit < sequence_.hidden;
      cell.length = there ? sequence_.length(b) : -1;
      if (!there) continue;
      const int64_t state = sequence_.state(at.direction, b, at.first_unit + cell.unit);
      cell.dh = optional(layer.grad_h_n, state);
      if constexpr (KIND == Kind::lstm) cell.dc = optional(layer.grad_c_n, state);
    }
    for (int row = 0; row < p.rows && at.first_row + row < sequence_.batch; ++row) {
      steps_ = max(steps_, sequence_.length(at.first_row + row));
    }
  }

  // Of the group's longest row.
  __device__ int steps() const { return steps_; }

  // What `step` needs that the step after has no part in.
  __device__ void load(int step) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      BackCell<T, KIND>& cell = cells_[i];
      if (step >= cell.length) continue;
      const bool last = step + 1 == cell.length, reset = !last && resets(cell, step + 1);
      cell.cut = last || reset;
      if (reset) cell.dh = cell.dc = 0.0f;
      if (step >= 0) load_saved(cell, step);
    }
  }

  // The step's slopes, rounded, in registers, and to the others.
  template <typename Exchange>
  __device__ void advance(const Products& products, Exchange& exchange, int step, int turn) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      BackCell<T, KIND>& cell = cells_[i];
      if (step >= cell.length) continue;
      if (!cell.cut) cell.dh += products.sum(cell.row, cell.unit);
      if (step < 0) continue;
      cell.dh += cell.grad, cell.dc += cell.grad_c;
      float slopes[slopes_of(KIND)];
      backward_gates<KIND>(cell.saved, layer_.relu, cell.dh, cell.dc, slopes);
#pragma unroll
      for (int s = 0; s < slopes_of(KIND); ++s) {
        cell.slopes[s] = from_float<T>(slopes[s]);
        if (s < gates_of(KIND)) exchange.publish(turn, cell.row, cell.unit, s, operand(cell.slopes[s]));
      }
    }
  }

  __device__ void store(int step) const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const BackCell<T, KIND>& cell = cells_[i];
      if (step >= cell.length) continue;
      T* slopes = slopes_at(cell, cell.token);
#pragma unroll
      for (int s = 0; s < slopes_of(KIND); ++s) slopes[s * sequence_.hidden] = cell.slopes[s];
    }
  }

  // The gradients of the first states, and zeros past the rows' ends.
  __device__ void finish() const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const BackCell<T, KIND>& cell = cells_[i];
      if (cell.length < 0) continue;
      const int64_t b = at_.first_row + cell.row, state = sequence_.state(at_.direction, b, unit_of(cell));
      layer_.dh0[state] = from_float<T>(cell.dh);
      if constexpr (KIND == Kind::lstm) layer_.dc0[state] = from_float<T>(cell.dc);
      if (sequence_.starts != nullptr) continue;
      for (int64_t t = cell.length; t < sequence_.steps; ++t) {
        T* slopes = slopes_at(cell, sequence_.token(t, b));
#pragma unroll
        for (int s = 0; s < slopes_of(KIND); ++s) slopes[s * sequence_.hidden] = from_float<T>(0.0f);
      }
    }
  }

 private:
  __device__ int unit_of(const BackCell<T, KIND>& cell) const { return at_.first_unit + cell.unit; }

  __device__ bool resets(const BackCell<T, KIND>& cell, int step) const {
    return sequence_.reset(Sequence::time(at_.direction, step, cell.length), at_.first_row + cell.row);
  }

  // Those of a unit are `hidden` apart.
  __device__ T* slopes_at(const BackCell<T, KIND>& cell, int64_t token) const {
    return layer_.slopes + sequence_.by_token(token, at_.direction, slopes_of(KIND), 0, unit_of(cell));
  }

  __device__ void load_saved(BackCell<T, KIND>& cell, int step) const {
    const int64_t b = at_.first_row + cell.row;
    const int direction = at_.direction, unit = unit_of(cell);
    cell.token = static_cast<int>(sequence_.token(Sequence::time(direction, step, cell.length), b));
    const int64_t own = sequence_.by_token(cell.token, direction, 1, 0, unit);
    cell.grad = optional(layer_.grad_output, own);
    if constexpr (KIND == Kind::rnn) {
      cell.saved.h = to_float(layer_.output[own]);
    } else {
      const T* kept = layer_.kept + sequence_.by_direction(cell.token, direction, kept_of(KIND), 0, unit);
#pragma unroll
      for (int k = 0; k < kept_of(KIND); ++k) cell.saved.kept[k] = to_float(kept[k * sequence_.hidden]);
      const bool zero = resets(cell, step);
      const int64_t state = sequence_.state(direction, b, unit);
      const int64_t before = step == 0 ? 0 : sequence_.token(Sequence::time(direction, step - 1, cell.length), b);
      if constexpr (KIND == Kind::gru) {
        const T* h = step == 0 ? layer_.h0 + state : layer_.output + sequence_.by_token(before, direction, 1, 0, unit);
        cell.saved.h = zero ? 0.0f : to_float(*h);
      } else {
        const int64_t now = sequence_.by_direction(cell.token, direction, 1, 0, unit);
        const float* c = layer_.c_all + sequence_.by_direction(before, direction, 1, 0, unit);
        cell.grad_c = optional(layer_.grad_c_all, now);
        cell.saved.c = layer_.c_all[now];
        cell.saved.c_before = zero ? 0.0f : step == 0 ? to_float(layer_.c0[state]) : *c;
      }
    }
  }

  const BackwardLayer<T>& layer_;
  const Sequence& sequence_;
  const Place& at_;
  BackCell<T, KIND> cells_[kElements];
  int steps_ = 0;
};

template <typename T, Kind KIND, typename Exchange>
__global__ void __launch_bounds__(kThreads, 1)
    rnn_layer_bwd_kernel(const BackwardLayer<T> layer, const Partition p,
                         const typename Exchange::Arguments arguments) {
  std::byte* shared = dynamic_shared<std::byte>();
  const Place at = Place::of(p);
  const SharedLayout layout = shared_layout(p.product, Exchange::kDesign, p.units, p.rows, p.splits);
  const auto resident = reinterpret_cast<T*>(shared + layout.resident);
  const auto partial = reinterpret_cast<float*>(shared + layout.partial);
  const Products products = Products::of(p.product, p.units, p.rows, p.splits, partial);
  const int hidden = layer.sequence.hidden, part_columns = static_cast<int>(p.product.part_columns());
  const T* w_hh = layer.w_hh + static_cast<int64_t>(at.direction) * gates_of(KIND) * hidden * hidden + at.first_unit;
  products.pack(resident, static_cast<int>(p.product.columns()), [&](int row, int column) {
    const int part = column / part_columns, unit = column % part_columns;
    if (unit >= hidden || at.first_unit + row >= hidden) return from_float<T>(0.0f);
    return operand(w_hh[(static_cast<int64_t>(gate_of_slope<KIND>(part)) * hidden + unit) * hidden + row]);
  });

  Exchange exchange(arguments, p, at, shared);
  Backward<T, KIND> backward(layer, p, at);
  backward.load(backward.steps() - 1);
  for (int step = backward.steps() - 1, turn = 0; step >= -1; --step, ++turn) {
    if (turn > 0) {
      exchange.wait(turn);
      products.multiply(resident, exchange.received(turn), exchange.stride());
      __syncthreads();
    }
    backward.advance(products, exchange, step, turn);
    if (step < 0) break;
    exchange.arrive(turn);
    backward.store(step);
    backward.load(step - 1);
  }
  backward.finish();
}

}  // namespace fused_ops::layers
