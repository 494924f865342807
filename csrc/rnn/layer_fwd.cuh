// One layer's recurrence, all steps and both directions in one launch: h_t = cell(gi_t, W_hh·h_{t-1}).
//
// The idea: W_hh is read from memory once. A block keeps the rows of all gates of its units in shared memory for the whole
// sequence, and the state of its units (h, and c in float32) in registers; what moves in a step is gi, h and the output.
// rnn/layer_plan.h says how units and batch rows are spread over blocks, rnn/exchange.cuh how h_t gets to the blocks of a
// group and who waits for whom. In a step a block waits for h_{t-1}, multiplies (rnn/resident.cuh), adds the splits' sums
// in their order, computes its units' gates, sends h_t on, and only then writes what nobody waits for and loads the next
// step's gi, while the others arrive.
//
// A row that has ended keeps its state and sends it on: columns of mma.sync do not mix, so nobody minds. A row that the
// next step resets is sent on, and kept, as zeros.
//
// Bytes per step: a block reads its G·units·H weights from shared memory (128 bytes a cycle), rows·H values of h from L2
// or other blocks' stores, 4·G bytes of gi per unit and row from device memory, and writes an output (and c, and 4 kept
// values). Flops: 2·G·H per unit and row. The floor is the wait, 1 to 2 us through L2 and a few tenths within a cluster,
// and then the weights: 200 KB of them, 0.9 us. LSTM, B = 16, H = 768, bf16: 37 KB a block, 0.2 us.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/convert.cuh"
#include "common/shared.cuh"
#include "rnn/exchange.cuh"
#include "rnn/gates.cuh"
#include "rnn/layer.h"
#include "rnn/resident.cuh"

namespace fused_ops::layers {

// What is null is not there; the GRU's b_hn and the LSTM's c0, c_n belong to them alone.
template <typename T>
struct ForwardLayer {
  Sequence sequence;
  const float* gi;  // (tokens, directions, G, hidden)
  const T* w_hh;    // (directions, G·hidden, hidden)
  const T* b_hn;    // (directions, hidden)
  const T* h0;      // (directions, batch, hidden)
  const T* c0;
  T* output;        // (tokens, directions·hidden)
  T* h_n;           // (directions, batch, hidden)
  T* c_n;
  float* c_all;     // (directions, tokens, hidden)
  T* kept;          // (directions, tokens, 4, hidden)
  bool relu;
};

// One of a thread's (row, unit) pairs.
template <Kind KIND>
struct Cell {
  int row, unit, length;  // row of the group, unit of the block
  bool held, there;       // a unit of the layer, and a row of the group; one of the batch, too
  bool reset;             // the next step takes zeros for the state
  int token;              // of the step that `input` is for
  float input[gates_of(KIND)], b_hn, h, c, kept[kept_of(KIND) + 1];
};

template <typename T, Kind KIND>
class Forward {
 public:
  __device__ Forward(const ForwardLayer<T>& layer, const Partition& p, const Place& at)
      : layer_(layer), sequence_(layer.sequence), at_(at) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      Cell<KIND>& cell = cells_[i];
      const int index = static_cast<int>(threadIdx.x) + i * kThreads;
      cell = {};
      cell.row = index / p.units, cell.unit = index % p.units;
      const int64_t b = at.first_row + cell.row;
      const int unit = at.first_unit + cell.unit;
      cell.held = cell.row < p.rows && unit < sequence_.hidden;
      cell.there = cell.held && b < sequence_.batch;
      if (!cell.there) continue;
      cell.length = sequence_.length(b);
      const int64_t state = sequence_.state(at.direction, b, unit);
      cell.reset = resets(cell, 0);
      cell.h = to_float(layer.h0[state]);
      if constexpr (KIND == Kind::lstm) cell.c = to_float(layer.c0[state]);
      if constexpr (KIND == Kind::gru) {
        if (layer.b_hn != nullptr) cell.b_hn = to_float(layer.b_hn[at.direction * sequence_.hidden + unit]);
      }
    }
    for (int row = 0; row < p.rows && at.first_row + row < sequence_.batch; ++row) {
      steps_ = max(steps_, sequence_.length(at.first_row + row));
    }
  }

  // Of the group's longest row.
  __device__ int steps() const { return steps_; }

  // The states after `step`, as the next one takes them.
  template <typename Exchange>
  __device__ void publish(Exchange& exchange, int step) const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const Cell<KIND>& cell = cells_[i];
      if (!cell.held) continue;
      exchange.publish(step, cell.row, cell.unit, 0, operand(from_float<T>(cell.reset ? 0.0f : cell.h)));
    }
  }

  // The state before `step`, and what else it needs beside the product.
  __device__ void load(int step) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      Cell<KIND>& cell = cells_[i];
      if (!cell.there || step >= cell.length) continue;
      if (cell.reset) cell.h = cell.c = 0.0f;
      const int64_t b = at_.first_row + cell.row;
      cell.token = static_cast<int>(sequence_.token(Sequence::time(at_.direction, step, cell.length), b));
      cell.reset = resets(cell, step + 1);
      const float* gi = layer_.gi + sequence_.by_token(cell.token, at_.direction, gates_of(KIND), 0, unit_of(cell));
#pragma unroll
      for (int g = 0; g < gates_of(KIND); ++g) cell.input[g] = gi[g * sequence_.hidden];
    }
  }

  // The states after `step`, in registers.
  __device__ void advance(const Products& products, int units, int step) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      Cell<KIND>& cell = cells_[i];
      if (!cell.there || step >= cell.length) continue;
      float product[gates_of(KIND)];
#pragma unroll
      for (int g = 0; g < gates_of(KIND); ++g) product[g] = products.sum(cell.row, g * units + cell.unit);
      const auto next = new_state<KIND>(cell.input, product, cell.b_hn, cell.h, cell.c, layer_.relu);
      cell.h = to_float(from_float<T>(next.h)), cell.c = next.c;
#pragma unroll
      for (int k = 0; k < kept_of(KIND); ++k) cell.kept[k] = next.kept[k];
    }
  }

  __device__ void store(int step) const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const Cell<KIND>& cell = cells_[i];
      if (!cell.there || step >= cell.length) continue;
      const int unit = unit_of(cell), direction = at_.direction;
      layer_.output[sequence_.by_token(cell.token, direction, 1, 0, unit)] = from_float<T>(cell.h);
      if constexpr (KIND == Kind::lstm) {
        if (layer_.c_all != nullptr) {
          layer_.c_all[sequence_.by_direction(cell.token, direction, 1, 0, unit)] = cell.c;
        }
      }
      if constexpr (KIND != Kind::rnn) {
        if (layer_.kept == nullptr) continue;
        T* kept = layer_.kept + sequence_.by_direction(cell.token, direction, kept_of(KIND), 0, unit);
#pragma unroll
        for (int k = 0; k < kept_of(KIND); ++k) kept[k * sequence_.hidden] = from_float<T>(cell.kept[k]);
      }
    }
  }

  // The last states, and zeros past the rows' ends.
  __device__ void finish() const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const Cell<KIND>& cell = cells_[i];
      if (!cell.there) continue;
      const int64_t b = at_.first_row + cell.row;
      const int unit = unit_of(cell);
      const int64_t state = sequence_.state(at_.direction, b, unit);
      layer_.h_n[state] = from_float<T>(cell.h);
      if constexpr (KIND == Kind::lstm) layer_.c_n[state] = from_float<T>(cell.c);
      if (sequence_.starts != nullptr) continue;
      for (int64_t t = cell.length; t < sequence_.steps; ++t) {
        layer_.output[sequence_.by_token(sequence_.token(t, b), at_.direction, 1, 0, unit)] = from_float<T>(0.0f);
      }
    }
  }

 private:
  __device__ int unit_of(const Cell<KIND>& cell) const { return at_.first_unit + cell.unit; }
  __device__ bool resets(const Cell<KIND>& cell, int step) const {
    if (step >= cell.length) return false;
    return sequence_.reset(Sequence::time(at_.direction, step, cell.length), at_.first_row + cell.row);
  }

  const ForwardLayer<T>& layer_;
  const Sequence& sequence_;
  const Place& at_;
  Cell<KIND> cells_[kElements];
  int steps_ = 0;
};

template <typename T, Kind KIND, typename Exchange>
__global__ void __launch_bounds__(kThreads, 1)
    rnn_layer_fwd_kernel(const ForwardLayer<T> layer, const Partition p, const typename Exchange::Arguments arguments) {
  constexpr int kGates = gates_of(KIND);
  std::byte* shared = dynamic_shared<std::byte>();
  const Place at = Place::of(p);
  const SharedLayout layout = shared_layout(p.product, Exchange::kDesign, p.units, p.rows, p.splits);
  const auto resident = reinterpret_cast<T*>(shared + layout.resident);
  const auto partial = reinterpret_cast<float*>(shared + layout.partial);
  const Products products = Products::of(p.product, p.units, p.rows, p.splits, partial);
  const int hidden = layer.sequence.hidden;
  const T* w_hh = layer.w_hh + static_cast<int64_t>(at.direction) * kGates * hidden * hidden;
  products.pack(resident, hidden, [&](int row, int column) {
    const int gate = row / p.units, unit = at.first_unit + row % p.units;
    if (unit >= hidden) return from_float<T>(0.0f);
    return operand(w_hh[(static_cast<int64_t>(gate) * hidden + unit) * hidden + column]);
  });

  Exchange exchange(arguments, p, at, shared);
  Forward<T, KIND> forward(layer, p, at);
  forward.publish(exchange, -1);
  exchange.arrive(-1);
  forward.load(0);
#pragma unroll 1
  for (int step = 0; step < forward.steps(); ++step) {
    exchange.wait(step);
    products.multiply(resident, exchange.received(step), exchange.stride());
    __syncthreads();
    forward.advance(products, p.units, step);
    if (step + 1 < forward.steps()) {
      forward.publish(exchange, step);
      exchange.arrive(step);
    }
    forward.store(step);
    forward.load(step + 1);
  }
  if (forward.steps() == 0) exchange.wait(0);
  forward.finish();
}

}  // namespace fused_ops::layers
