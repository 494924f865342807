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
// The kernel for extras is one for all of them. Zoneout and a mask on h cost a few operations; a layer norm of the
// products and of c (rnn/row_norm.cuh) and a projection of the state, for which a block holds columns of W_hr too and
// hands on dL/dh of its features, make the blocks meet once more each. What a norm takes of the forward is read where it
// is used: registers are short.
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

#include "common/shared.cuh"
#include "rnn/exchange.cuh"
#include "rnn/layer_bwd_state.cuh"
#include "rnn/resident.cuh"
#include "rnn/row_norm.cuh"

namespace fused_ops::layers {

// A thread's share of a group's backward. A row of n steps begins with the gradients of its last state, before step n -
// 1; what is left in step -1 are those of its first.
template <typename T, Kind KIND, Variant VARIANT>
class Backward {
  static constexpr bool kExtra = VARIANT != Variant::plain, kProjects = VARIANT == Variant::projected;

 public:
  __device__ Backward(const BackwardLayer<T>& layer, const Partition& p, const Place& at)
      : layer_(layer), sequence_(layer.sequence), at_(at) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      BackCell<T, KIND>& cell = cells_[i];
      cell = {};
      find(cell, i, p.rows, p.units, at.first_unit, sequence_);
      if constexpr (KIND == Kind::lstm) {
        if (cell.length < 0) continue;
        cell.dc = optional(layer.grad_c_n, sequence_.state(at.direction, at.first_row + cell.row, unit_of(cell)));
      }
    }
    if constexpr (kProjects) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        states_[i] = {};
        states_[i].length = -1;
        find(states_[i], i, p.rows, p.features, at.first_feature, layer.states);
      }
    }
    each_state([&](BackState<T>& state, const Sequence& sequence, int feature) {
      if (state.length < 0) return;
      const int64_t place = sequence.state(at_.direction, at_.first_row + state.row, feature);
      state.dh = optional(layer_.grad_h_n, place);
      if constexpr (kExtra) state.mask = layer_.noise.mask == nullptr ? 1.0f : to_float(layer_.noise.mask[place]);
    });
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
      if (begin(cell, step)) cell.dc = 0.0f;
      if (step >= 0) load_saved(cell, step);
    }
    if constexpr (kExtra) {
      each_state([&](BackState<T>& state, const Sequence& sequence, int feature) {
        if (step >= state.length) return;
        if (kProjects) {
          begin(state, step);
          if (step >= 0) {
            state.grad = optional(layer_.grad_output, sequence.by_token(state.token, at_.direction, 1, 0, feature));
          }
        }
        if (step >= 0 && layer_.noise.zone_h != nullptr) {
          state.zone = layer_.noise.zone_h[sequence.by_direction(state.token, at_.direction, 1, 0, feature)];
        }
      });
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

  // The same with extras. The others meet meanwhile: all threads are here in every step.
  template <typename Exchange>
  __device__ void advance(const Products& products, const Products& projection, const T* resident, const RowNorm& norm,
                          Exchange& exchange, int step, int turn) {
    collect(products, step);
    if (step < 0) return;
    if constexpr (KIND == Kind::lstm) {
      if constexpr (kProjects) project(projection, resident, exchange, step);
      if (layer_.norm_c != nullptr) norm_c(products, norm, exchange, step);
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      BackCell<T, KIND>& cell = cells_[i];
      if (step < cell.length) step_cell(cell);
    }
    if (layer_.norm_hh != nullptr) norm_hh(products, norm, exchange, step);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const BackCell<T, KIND>& cell = cells_[i];
      if (step >= cell.length) continue;
#pragma unroll
      for (int s = 0; s < gates_of(KIND); ++s) {
        const T slope = layer_.norm_hh == nullptr ? cell.slopes[s] : cell.through[gate_of_slope<KIND>(s)];
        exchange.publish(turn, cell.row, cell.unit, s, operand(slope));
      }
    }
  }

  __device__ void store(int step) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const BackCell<T, KIND>& cell = cells_[i];
      if (step >= cell.length) continue;
      write(cell, cell.token, [&](T value) { return value; });
    }
    if constexpr (kProjects) {
      each_state([&](BackState<T>& state, const Sequence&, int) {
        if (step < state.length) grad_state(state, state.token) = state.handed;
      });
    }
  }

  // The gradients of the first states, and zeros past the rows' ends.
  __device__ void finish() {
    each_state([&](BackState<T>& state, const Sequence& sequence, int feature) {
      if (state.length < 0) return;
      const int64_t b = at_.first_row + state.row;
      layer_.dh0[sequence.state(at_.direction, b, feature)] = from_float<T>(state.dh);
      if (!kProjects || sequence.starts != nullptr) return;
      for (int64_t t = state.length; t < sequence.steps; ++t) {
        grad_state(state, sequence.token(t, b)) = from_float<T>(0.0f);
      }
    });
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const BackCell<T, KIND>& cell = cells_[i];
      if (cell.length < 0) continue;
      const int64_t b = at_.first_row + cell.row;
      if constexpr (KIND == Kind::lstm) {
        layer_.dc0[sequence_.state(at_.direction, b, unit_of(cell))] = from_float<T>(cell.dc);
      }
      if (sequence_.starts != nullptr) continue;
      for (int64_t t = cell.length; t < sequence_.steps; ++t) {
        write(cell, sequence_.token(t, b), [](T) { return from_float<T>(0.0f); });
      }
    }
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
      for (int i = 0; i < kElements; ++i) visit(static_cast<BackState<T>&>(cells_[i]), sequence_, unit_of(cells_[i]));
    }
  }

  // The i-th of this thread among `rows` of `units`, of which the block's first is `first`.
  __device__ void find(BackState<T>& state, int i, int rows, int units, int first, const Sequence& sequence) const {
    const int index = static_cast<int>(threadIdx.x) + i * kThreads;
    state.row = static_cast<int16_t>(index / units), state.unit = static_cast<int16_t>(index % units);
    const int64_t b = at_.first_row + state.row;
    const bool there = state.row < rows && b < sequence.batch && first + state.unit < sequence.hidden;
    state.length = there ? sequence.length(b) : -1;
  }

  __device__ int unit_of(const BackCell<T, KIND>& cell) const { return at_.first_unit + cell.unit; }

  __device__ bool resets(const BackState<T>& state, int step) const {
    return sequence_.reset(Sequence::time(at_.direction, step, state.length), at_.first_row + state.row);
  }

  // Whether the step after began with a reset.
  __device__ bool begin(BackState<T>& state, int step) const {
    const bool last = step + 1 == state.length, reset = !last && resets(state, step + 1);
    state.cut = last || reset;
    if (reset) state.dh = 0.0f;
    if (step >= 0) {
      const int time = Sequence::time(at_.direction, step, state.length);
      state.token = static_cast<int>(sequence_.token(time, at_.first_row + state.row));
    }
    return reset;
  }

  __device__ T& grad_state(const BackState<T>& state, int64_t token) const {
    return layer_.grad_states[layer_.states.by_token(token, at_.direction, 1, 0, at_.first_feature + state.unit)];
  }

  // A token's results, each as `made` makes it of the step's. Those of a unit are `hidden` apart.
  template <typename Made>
  __device__ void write(const BackCell<T, KIND>& cell, int64_t token, Made made) const {
    const int unit = unit_of(cell), hidden = sequence_.hidden;
    T* slopes = layer_.slopes + sequence_.by_token(token, at_.direction, slopes_of(KIND), 0, unit);
#pragma unroll
    for (int s = 0; s < slopes_of(KIND); ++s) slopes[s * hidden] = made(cell.slopes[s]);
    if constexpr (kExtra) {
      if (layer_.norm_hh == nullptr) return;
      T* through = layer_.through + sequence_.by_token(token, at_.direction, gates_of(KIND), 0, unit);
#pragma unroll
      for (int g = 0; g < gates_of(KIND); ++g) through[g * hidden] = made(cell.through[g]);
      if constexpr (KIND == Kind::lstm) {
        layer_.slopes_c[sequence_.by_token(token, at_.direction, 1, 0, unit)] = made(cell.slope_c);
      }
    }
  }

  __device__ void load_saved(BackCell<T, KIND>& cell, int step) const {
    const int64_t b = at_.first_row + cell.row;
    const int direction = at_.direction, unit = unit_of(cell);
    const int64_t own = sequence_.by_token(cell.token, direction, 1, 0, unit);
    if (!kProjects) cell.grad = optional(layer_.grad_output, own);
    if constexpr (KIND == Kind::rnn) {
      const bool keeps = kExtra && layer_.kept != nullptr;
      const int64_t kept = sequence_.by_direction(cell.token, direction, 1, 0, unit);
      cell.saved.h = to_float(keeps ? layer_.kept[kept] : layer_.output[own]);
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
        if constexpr (kExtra) {
          if (layer_.noise.zone_c != nullptr) cell.zone_c = layer_.noise.zone_c[now];
        }
      }
    }
  }

  // dL/dh of the step, and what of it zoneout leaves for the step before.
  __device__ void collect(const Products& products, int step) {
    each_state([&](BackState<T>& state, const Sequence&, int) {
      if (step >= state.length) return;
      if (!state.cut) state.dh += state.mask * products.sum(state.row, state.unit);
      if (step < 0) return;
      const float dh = state.dh + state.grad;
      state.fresh = layer_.noise.h(state.zone, dh, 0.0f), state.dh = layer_.noise.h(state.zone, 0.0f, dh);
    });
  }

  // dL/dm = W_hr^T·dL/dh of the projected states.
  template <typename Exchange>
  __device__ void project(const Products& projection, const T* resident, Exchange& exchange, int step) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      BackState<T>& state = states_[i];
      if (step >= state.length) continue;
      state.handed = from_float<T>(state.fresh);
      exchange.hand(state.row, state.unit, operand(state.handed));
    }
    exchange.hand_on();
    projection.multiply<kProjects>(resident, exchange.handed(), exchange.handed_stride());
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      BackCell<T, KIND>& cell = cells_[i];
      if (step < cell.length) cell.fresh = projection.sum(cell.row, cell.unit);
    }
  }

  // In: dL/dh before zoneout, `fresh`, and dL/dc. Out: the slopes; what is left of dL/dh and dL/dc for the step before.
  __device__ void step_cell(BackCell<T, KIND>& cell) const {
    if constexpr (KIND == Kind::lstm) {
      if (layer_.norm_c == nullptr) {
        begin_c(cell);
        const float tanh_c = tanhf(c_of(cell));
        cell.dc += cell.fresh * cell.saved.kept[3] * (1.0f - tanh_c * tanh_c);
        lstm_slopes(cell.saved, tanh_c, cell.fresh, cell.dc, cell.exact);
      } else {
        lstm_slopes(cell.saved, tanhf(normed_c(cell)), cell.fresh, cell.dc, cell.exact);
      }
      cell.dc += cell.bypass_c;
    } else {
      backward_gates<KIND>(cell.saved, layer_.relu, cell.fresh, cell.dc, cell.exact);
      cell.dh += cell.fresh;
    }
#pragma unroll
    for (int s = 0; s < slopes_of(KIND); ++s) cell.slopes[s] = from_float<T>(cell.exact[s]);
  }

  // dL/dc before zoneout, and what of it zoneout leaves for the step before.
  __device__ void begin_c(BackCell<T, KIND>& cell) const {
    const float dc = cell.dc + cell.grad_c;
    cell.dc = layer_.noise.c(cell.zone_c, dc, 0.0f), cell.bypass_c = layer_.noise.c(cell.zone_c, 0.0f, dc);
  }

  // The LSTM's c before zoneout.
  __device__ float c_of(const BackCell<T, KIND>& cell) const {
    if (!cell.zone_c && !layer_.noise.expects_c()) return cell.saved.c;
    return cell.saved.kept[1] * cell.saved.c_before + cell.saved.kept[0] * cell.saved.kept[2];
  }

  __device__ float hat_c(const BackCell<T, KIND>& cell) const {
    return layer_.hat_c[sequence_.by_direction(cell.token, at_.direction, 1, 0, unit_of(cell))];
  }

  // LN(c)·norm_c + bias_c.
  __device__ float normed_c(const BackCell<T, KIND>& cell) const {
    const int weight = at_.direction * sequence_.hidden + unit_of(cell);
    return hat_c(cell) * layer_.norm_c[weight] + layer_.bias_c[weight];
  }

  // dL/dc through the layer norm of c: rstd·(g − mean(g) − hat·mean(g·hat)), g = dL/d(LN(c)·norm_c + bias_c)·norm_c.
  template <typename Exchange>
  __device__ void norm_c(const Products& products, const RowNorm& norm, Exchange& exchange, int step) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      BackCell<T, KIND>& cell = cells_[i];
      if (cell.length < 0) continue;
      float by_norm = 0.0f, hat = 0.0f;
      if (step < cell.length) {
        begin_c(cell);
        const float squashed = tanhf(normed_c(cell));
        const float slope = cell.fresh * cell.saved.kept[3] * (1.0f - squashed * squashed);
        cell.slope_c = from_float<T>(slope);
        hat = hat_c(cell), by_norm = slope * layer_.norm_c[at_.direction * sequence_.hidden + unit_of(cell)];
      }
      cell.exact[0] = by_norm;
      leave(products, cell, by_norm, by_norm * hat);
    }
    __syncthreads();
    norm.means(exchange, 0, 1, products.partial, second(products), products.stride);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      BackCell<T, KIND>& cell = cells_[i];
      if (step >= cell.length) continue;
      const Sums mean = norm.of(cell.row);
      const float rstd = layer_.rstd_c[at_.direction * sequence_.tokens + cell.token];
      cell.dc += rstd * (cell.exact[0] - mean.first - hat_c(cell) * mean.second);
    }
  }

  // The same through the layer norm of W_hh·h.
  template <typename Exchange>
  __device__ void norm_hh(const Products& products, const RowNorm& norm, Exchange& exchange, int step) {
    constexpr int kGates = gates_of(KIND);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const BackCell<T, KIND>& cell = cells_[i];
      if (cell.length < 0) continue;
      float sum = 0.0f, with_hat = 0.0f;
      if (step < cell.length) {
#pragma unroll
        for (int s = 0; s < kGates; ++s) {
          const float by_norm = cell.exact[s] * layer_.norm_hh[weight_of(cell, s)];
          sum += by_norm, with_hat += by_norm * layer_.hat_hh[hat_of(cell, s)];
        }
      }
      leave(products, cell, sum, with_hat);
    }
    __syncthreads();
    norm.means(exchange, 1, kGates, products.partial, second(products), products.stride);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      BackCell<T, KIND>& cell = cells_[i];
      if (step >= cell.length) continue;
      const Sums mean = norm.of(cell.row);
      const float rstd = layer_.rstd_hh[at_.direction * sequence_.tokens + cell.token];
#pragma unroll
      for (int s = 0; s < kGates; ++s) {
        const float by_norm = cell.exact[s] * layer_.norm_hh[weight_of(cell, s)];
        const float slope = rstd * (by_norm - mean.first - layer_.hat_hh[hat_of(cell, s)] * mean.second);
        cell.through[gate_of_slope<KIND>(s)] = from_float<T>(slope);
      }
    }
  }

  __device__ int weight_of(const BackCell<T, KIND>& cell, int slope) const {
    return (at_.direction * gates_of(KIND) + gate_of_slope<KIND>(slope)) * sequence_.hidden + unit_of(cell);
  }
  __device__ int64_t hat_of(const BackCell<T, KIND>& cell, int slope) const {
    const int gate = gate_of_slope<KIND>(slope);
    return sequence_.by_direction(cell.token, at_.direction, gates_of(KIND), gate, unit_of(cell));
  }

  // Two values of a unit where RowNorm::means finds them. A thread's own places: it alone read what was there.
  __device__ static float* second(const Products& products) {
    return products.partial + products.rows * products.stride;
  }
  __device__ static void leave(const Products& products, const BackCell<T, KIND>& cell, float one, float other) {
    const int place = cell.row * products.stride + cell.unit;
    products.partial[place] = one, second(products)[place] = other;
  }

  const BackwardLayer<T>& layer_;
  const Sequence& sequence_;
  const Place& at_;
  BackCell<T, KIND> cells_[kElements];
  BackState<T> states_[kProjects ? kElements : 1];
  int steps_ = 0;
};

template <typename T, Kind KIND, typename Exchange>
__global__ void __launch_bounds__(kThreads, 1)
    rnn_layer_bwd_kernel(const BackwardLayer<T> layer, const Partition p,
                         const typename Exchange::Arguments arguments) {
  constexpr bool kExtra = Exchange::kVariant != Variant::plain, kProjects = Exchange::kVariant == Variant::projected;
  std::byte* shared = dynamic_shared<std::byte>();
  const Place at = Place::of(p);
  const SharedLayout layout = p.layout(Exchange::kDesign);
  const auto resident = reinterpret_cast<T*>(shared);
  const auto partial = reinterpret_cast<float*>(shared + layout.partial);
  const auto stride = static_cast<int>(layout.partial_stride);
  const int made = kProjects ? p.features : p.units, first = kProjects ? at.first_feature : at.first_unit;
  const Products products = Products::of(p.work.product, made, p.rows, p.splits, stride, partial);
  const int hidden = layer.sequence.hidden, part_columns = static_cast<int>(p.work.product.part_columns());
  const int features = kProjects ? layer.states.hidden : hidden;
  const T* w_hh = layer.w_hh + static_cast<int64_t>(at.direction) * gates_of(KIND) * hidden * features + first;
  products.pack(resident, static_cast<int>(p.work.product.columns()), [&](int row, int column) {
    const int part = column / part_columns, unit = column % part_columns;
    if (unit >= hidden || first + row >= features) return from_float<T>(0.0f);
    return operand(w_hh[(static_cast<int64_t>(gate_of_slope<KIND>(part)) * hidden + unit) * features + row]);
  });
  const auto resident_hr = reinterpret_cast<T*>(shared + layout.projection);
  const Products projection = Products::of(p.work.projection, p.units, p.rows, p.splits, stride, partial);
  if constexpr (kProjects) {
    const T* w_hr = layer.w_hr + static_cast<int64_t>(at.direction) * features * hidden + at.first_unit;
    projection.pack(resident_hr, features, [&](int row, int column) {
      if (at.first_unit + row >= hidden) return from_float<T>(0.0f);
      return operand(w_hr[static_cast<int64_t>(column) * hidden + row]);
    });
  }
  const RowNorm norm(p, at, hidden, layer.sequence.batch, reinterpret_cast<Sums*>(shared + layout.found));

  Exchange exchange(arguments, p, at, shared);
  Backward<T, KIND, Exchange::kVariant> backward(layer, p, at);
  backward.load(backward.steps() - 1);
  for (int step = backward.steps() - 1, turn = 0; step >= -1; --step, ++turn) {
    if (turn > 0) {
      exchange.wait(turn);
      products.multiply<kExtra>(resident, exchange.received(turn), exchange.stride());
      __syncthreads();
    }
    if constexpr (kExtra) backward.advance(products, projection, resident_hr, norm, exchange, step, turn);
    else backward.advance(products, exchange, step, turn);
    if (step < 0) break;
    exchange.arrive(turn);
    backward.store(step);
    backward.load(step - 1);
  }
  backward.finish();
}

}  // namespace fused_ops::layers
