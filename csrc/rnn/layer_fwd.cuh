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
// The kernel for extras is one for all of them: zoneout and a mask on h cost a few operations; a layer norm of the
// products and of c (rnn/row_norm.cuh) and a projection of the state, for which a block holds rows of W_hr too and hands
// on o·tanh(c), make the blocks meet once more each. Norms' weights are read again in every step: registers are short.
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
#include "rnn/row_norm.cuh"

namespace fused_ops::layers {

// What is null is not there; the GRU's b_hn and the LSTM's c0, c_n belong to them alone. P: features of h, `hidden` but
// with w_hr.
template <typename T>
struct ForwardLayer {
  Sequence sequence;
  const float* gi;  // (tokens, directions, G, hidden)
  const T* w_hh;    // (directions, G·hidden, P)
  const T* b_hn;    // (directions, hidden)
  const T* h0;      // (directions, batch, P)
  const T* c0;      // (directions, batch, hidden)
  T* output;        // (tokens, directions·P)
  T* h_n;           // (directions, batch, P)
  T* c_n;           // (directions, batch, hidden)
  float* c_all;     // (directions, tokens, hidden)
  T* kept;          // (directions, tokens, K, hidden); of an RNN h~, where it cannot be told from the output
  bool relu;

  // Of the kernel for extras.
  Sequence states;       // `sequence` with P in hidden's place
  const T* w_hr;         // (directions, P, hidden)
  const float* norm_hh;  // (directions, G, hidden)
  const float* b_hh;
  const float* norm_c;   // (directions, hidden)
  const float* bias_c;
  Noise<T> noise;
};

// One of a thread's pairs of a row and a feature of h.
struct State {
  int row, unit, length;  // row of the group, unit (or feature) of the block
  bool held, there;       // a unit of the layer, and a row of the group; one of the batch, too
  bool reset;             // the next step takes zeros for the state
  bool zone;              // this step keeps the state
  int token;              // of the step that `input` is for
  float h, fresh;         // fresh: h before zoneout
  float mask;
};

// One of a thread's pairs of a row and a unit, and of the feature of h that it is where nothing is projected.
template <Kind KIND>
struct Cell : State {
  bool zone_c;
  float input[gates_of(KIND)], b_hn, c, c_before, kept[kept_of(KIND) + 1];
};

template <typename T, Kind KIND, Variant VARIANT>
class Forward {
  static constexpr bool kExtra = VARIANT != Variant::plain, kProjects = VARIANT == Variant::projected;

 public:
  __device__ Forward(const ForwardLayer<T>& layer, const Partition& p, const Place& at)
      : layer_(layer), sequence_(layer.sequence), at_(at) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      Cell<KIND>& cell = cells_[i];
      cell = {};
      find(cell, i, p.rows, p.units, at.first_unit, sequence_);
      if (!cell.there) continue;
      const int unit = unit_of(cell);
      if constexpr (KIND == Kind::lstm) {
        cell.c = to_float(layer.c0[sequence_.state(at.direction, at.first_row + cell.row, unit)]);
      }
      if constexpr (KIND == Kind::gru) {
        if (layer.b_hn != nullptr) cell.b_hn = to_float(layer.b_hn[at.direction * sequence_.hidden + unit]);
      }
    }
    if constexpr (kProjects) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        states_[i] = {};
        find(states_[i], i, p.rows, p.features, at.first_feature, layer.states);
      }
    }
    each_state([&](State& state, const Sequence& sequence, int feature) {
      if (!state.there) return;
      const int64_t place = sequence.state(at_.direction, at_.first_row + state.row, feature);
      state.h = to_float(layer_.h0[place]);
      if constexpr (kExtra) state.mask = layer_.noise.mask == nullptr ? 1.0f : to_float(layer_.noise.mask[place]);
    });
    for (int row = 0; row < p.rows && at.first_row + row < sequence_.batch; ++row) {
      steps_ = max(steps_, sequence_.length(at.first_row + row));
    }
  }

  // Of the group's longest row.
  __device__ int steps() const { return steps_; }

  // The states after `step`, as the next one takes them.
  template <typename Exchange>
  __device__ void publish(Exchange& exchange, int step) {
    each_state([&](State& state, const Sequence&, int) {
      if (!state.held) return;
      float h = state.reset ? 0.0f : state.h;
      if constexpr (kExtra) h *= state.mask;
      exchange.publish(step, state.row, state.unit, 0, operand(from_float<T>(h)));
    });
  }

  // The state before `step`, and what else it needs beside the product.
  __device__ void load(int step) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      Cell<KIND>& cell = cells_[i];
      if (!cell.there || step >= cell.length) continue;
      if (cell.reset) cell.c = 0.0f;
      begin(cell, step);
      const float* gi = layer_.gi + sequence_.by_token(cell.token, at_.direction, gates_of(KIND), 0, unit_of(cell));
#pragma unroll
      for (int g = 0; g < gates_of(KIND); ++g) cell.input[g] = gi[g * sequence_.hidden];
      if constexpr (kExtra && KIND == Kind::lstm) {
        if (layer_.noise.zone_c != nullptr) {
          cell.zone_c = layer_.noise.zone_c[sequence_.by_direction(cell.token, at_.direction, 1, 0, unit_of(cell))];
        }
      }
    }
    if constexpr (kExtra) {
      each_state([&](State& state, const Sequence& sequence, int feature) {
        if (!state.there || step >= state.length) return;
        if (kProjects) begin(state, step);
        if (layer_.noise.zone_h != nullptr) {
          state.zone = layer_.noise.zone_h[sequence.by_direction(state.token, at_.direction, 1, 0, feature)];
        }
      });
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
      step_cell(cell, product);
      cell.h = to_float(from_float<T>(cell.fresh));
    }
  }

  // The same with extras. The others meet meanwhile: all threads are here in every step.
  template <typename Exchange>
  __device__ void advance(const Products& products, const Products& projection, const T* resident, const RowNorm& norm,
                          Exchange& exchange, int units, int step) {
    if (layer_.norm_hh != nullptr) {
      norm.moments(exchange, 0, gates_of(KIND), products.partial, products.stride,
                   [&](int row, int place) { return products.sum(row, place); });
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      Cell<KIND>& cell = cells_[i];
      if (!cell.there || step >= cell.length) continue;
      float product[gates_of(KIND)];
#pragma unroll
      for (int g = 0; g < gates_of(KIND); ++g) product[g] = normed(products, norm, cell, g, units);
      step_cell(cell, product);
    }
    if constexpr (KIND == Kind::lstm) {
      if (layer_.norm_c != nullptr) norm_c(products, norm, exchange, step);
      keep_c(step);
      if constexpr (kProjects) project(projection, resident, exchange, step);
    }
    each_state([&](State& state, const Sequence&, int) {
      if (!state.there || step >= state.length) return;
      state.h = to_float(from_float<T>(layer_.noise.h(state.zone, state.fresh, state.h)));
    });
  }

  __device__ void store(int step) {
    each_state([&](State& state, const Sequence& sequence, int feature) {
      if (!state.there || step >= state.length) return;
      layer_.output[sequence.by_token(state.token, at_.direction, 1, 0, feature)] = from_float<T>(state.h);
    });
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const Cell<KIND>& cell = cells_[i];
      if (!cell.there || step >= cell.length) continue;
      const int unit = unit_of(cell), direction = at_.direction;
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
      } else if constexpr (kExtra) {
        if (layer_.kept == nullptr) continue;
        layer_.kept[sequence_.by_direction(cell.token, direction, 1, 0, unit)] = from_float<T>(cell.fresh);
      }
    }
  }

  // The last states, and zeros past the rows' ends.
  __device__ void finish() {
    if constexpr (KIND == Kind::lstm) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const Cell<KIND>& cell = cells_[i];
        if (!cell.there) continue;
        const int64_t b = at_.first_row + cell.row;
        layer_.c_n[sequence_.state(at_.direction, b, unit_of(cell))] = from_float<T>(cell.c);
      }
    }
    each_state([&](State& state, const Sequence& sequence, int feature) {
      if (!state.there) return;
      const int64_t b = at_.first_row + state.row;
      layer_.h_n[sequence.state(at_.direction, b, feature)] = from_float<T>(state.h);
      if (sequence_.starts != nullptr) return;
      for (int64_t t = state.length; t < sequence_.steps; ++t) {
        layer_.output[sequence.by_token(sequence_.token(t, b), at_.direction, 1, 0, feature)] = from_float<T>(0.0f);
      }
    });
  }

 private:
  // visit(state, the sequence whose `hidden` is h's features, feature of h), of all that this thread holds.
  template <typename Visit>
  __device__ void each_state(Visit visit) {
    if constexpr (kProjects) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) visit(states_[i], layer_.states, at_.first_feature + states_[i].unit);
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) visit(static_cast<State&>(cells_[i]), sequence_, unit_of(cells_[i]));
    }
  }

  // The i-th of this thread among `rows` of `units`, of which the block's first is `first`.
  __device__ void find(State& state, int i, int rows, int units, int first, const Sequence& sequence) const {
    const int index = static_cast<int>(threadIdx.x) + i * kThreads;
    state.row = index / units, state.unit = index % units;
    const int64_t b = at_.first_row + state.row;
    state.held = state.row < rows && first + state.unit < sequence.hidden;
    state.there = state.held && b < sequence.batch;
    if (!state.there) return;
    state.length = sequence.length(b);
    state.reset = resets(state, 0);
  }

  __device__ void begin(State& state, int step) const {
    if (state.reset) state.h = 0.0f;
    const int time = Sequence::time(at_.direction, step, state.length);
    state.token = static_cast<int>(sequence_.token(time, at_.first_row + state.row));
    state.reset = resets(state, step + 1);
  }

  // W_hh·h of a cell's gate: with a layer norm LN(W_hh·h)·norm_hh + b_hh.
  __device__ float normed(const Products& products, const RowNorm& norm, const Cell<KIND>& cell, int gate,
                          int units) const {
    const int place = gate * units + cell.unit;
    if (layer_.norm_hh == nullptr) return products.sum(cell.row, place);
    const int weight = (at_.direction * gates_of(KIND) + gate) * sequence_.hidden + unit_of(cell);
    const Sums of = norm.of(cell.row);
    const float hat = (products.partial[cell.row * products.stride + place] - of.first) * of.second;
    return hat * layer_.norm_hh[weight] + (layer_.b_hh == nullptr ? 0.0f : layer_.b_hh[weight]);
  }

  __device__ void step_cell(Cell<KIND>& cell, const float (&product)[gates_of(KIND)]) const {
    const auto next = new_state<KIND>(cell.input, product, cell.b_hn, cell.h, cell.c, layer_.relu);
    cell.fresh = next.h;
    if constexpr (kExtra && KIND == Kind::lstm) cell.c_before = cell.c;
    cell.c = next.c;
#pragma unroll
    for (int k = 0; k < kept_of(KIND); ++k) cell.kept[k] = next.kept[k];
  }

  // h~ = o·tanh(LN(c)·norm_c + bias_c).
  template <typename Exchange>
  __device__ void norm_c(const Products& products, const RowNorm& norm, Exchange& exchange, int step) {
    // A place of a thread's own: that of its first gate, which it has read.
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const Cell<KIND>& cell = cells_[i];
      if (cell.there && step < cell.length) products.partial[cell.row * products.stride + cell.unit] = cell.c;
    }
    __syncthreads();
    norm.moments(exchange, 1, 1, products.partial, products.stride,
                 [&](int row, int place) { return products.partial[row * products.stride + place]; });
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      Cell<KIND>& cell = cells_[i];
      if (!cell.there || step >= cell.length) continue;
      const int weight = at_.direction * sequence_.hidden + unit_of(cell);
      const Sums of = norm.of(cell.row);
      const float hat = (cell.c - of.first) * of.second;
      cell.fresh = cell.kept[3] * tanhf(hat * layer_.norm_c[weight] + layer_.bias_c[weight]);
    }
  }

  // c after zoneout.
  __device__ void keep_c(int step) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      Cell<KIND>& cell = cells_[i];
      if (!cell.there || step >= cell.length) continue;
      cell.c = layer_.noise.c(cell.zone_c, cell.c, cell.c_before);
    }
  }

  // h~ = W_hr·m of what the cells have made.
  template <typename Exchange>
  __device__ void project(const Products& projection, const T* resident, Exchange& exchange, int step) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const Cell<KIND>& cell = cells_[i];
      if (cell.there && step < cell.length) {
        exchange.hand(cell.row, cell.unit, operand(from_float<T>(cell.fresh)));
      }
    }
    exchange.hand_on();
    projection.multiply<kProjects>(resident, exchange.handed(), exchange.handed_stride());
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      State& state = states_[i];
      if (state.there && step < state.length) state.fresh = projection.sum(state.row, state.unit);
    }
  }

  __device__ int unit_of(const Cell<KIND>& cell) const { return at_.first_unit + cell.unit; }
  __device__ bool resets(const State& state, int step) const {
    if (step >= state.length) return false;
    return sequence_.reset(Sequence::time(at_.direction, step, state.length), at_.first_row + state.row);
  }

  const ForwardLayer<T>& layer_;
  const Sequence& sequence_;
  const Place& at_;
  Cell<KIND> cells_[kElements];
  State states_[kProjects ? kElements : 1];
  int steps_ = 0;
};

template <typename T, Kind KIND, typename Exchange>
__global__ void __launch_bounds__(kThreads, 1)
    rnn_layer_fwd_kernel(const ForwardLayer<T> layer, const Partition p, const typename Exchange::Arguments arguments) {
  constexpr bool kExtra = Exchange::kVariant != Variant::plain, kProjects = Exchange::kVariant == Variant::projected;
  constexpr int kGates = gates_of(KIND);
  std::byte* shared = dynamic_shared<std::byte>();
  const Place at = Place::of(p);
  const SharedLayout layout = p.layout(Exchange::kDesign);
  const auto resident = reinterpret_cast<T*>(shared);
  const auto partial = reinterpret_cast<float*>(shared + layout.partial);
  const auto stride = static_cast<int>(layout.partial_stride);
  const Products products = Products::of(p.work.product, p.units, p.rows, p.splits, stride, partial);
  const int hidden = layer.sequence.hidden, features = kProjects ? layer.states.hidden : hidden;
  const T* w_hh = layer.w_hh + static_cast<int64_t>(at.direction) * kGates * hidden * features;
  products.pack(resident, features, [&](int row, int column) {
    const int gate = row / p.units, unit = at.first_unit + row % p.units;
    if (unit >= hidden) return from_float<T>(0.0f);
    return operand(w_hh[(static_cast<int64_t>(gate) * hidden + unit) * features + column]);
  });

  const auto resident_hr = reinterpret_cast<T*>(shared + layout.projection);
  const Products projection = Products::of(p.work.projection, p.features, p.rows, p.splits, stride, partial);
  if constexpr (kProjects) {
    const T* w_hr = layer.w_hr + static_cast<int64_t>(at.direction) * features * hidden;
    projection.pack(resident_hr, hidden, [&](int row, int column) {
      const int feature = at.first_feature + row;
      if (feature >= features) return from_float<T>(0.0f);
      return operand(w_hr[static_cast<int64_t>(feature) * hidden + column]);
    });
  }
  const RowNorm norm(p, at, hidden, layer.sequence.batch, reinterpret_cast<Sums*>(shared + layout.found));

  Exchange exchange(arguments, p, at, shared);
  Forward<T, KIND, Exchange::kVariant> forward(layer, p, at);
  forward.publish(exchange, -1);
  exchange.arrive(-1);
  forward.load(0);
#pragma unroll 1
  for (int step = 0; step < forward.steps(); ++step) {
    exchange.wait(step);
    products.multiply<kProjects>(resident, exchange.received(step), exchange.stride());
    __syncthreads();
    if constexpr (kExtra) forward.advance(products, projection, resident_hr, norm, exchange, p.units, step);
    else forward.advance(products, p.units, step);
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
