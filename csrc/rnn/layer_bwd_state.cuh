// What the backward of a layer's recurrence works on: its tensors, and what a thread holds of them from step to step.
#pragma once

#include <cstdint>

#include "common/convert.cuh"
#include "rnn/gates_bwd.cuh"
#include "rnn/layer.h"

namespace fused_ops::layers {

// What is null is not there, or zero. P: features of h, `hidden` but with w_hr.
template <typename T>
struct BackwardLayer {
  Sequence sequence;
  const T* grad_output;  // (tokens, directions·P)
  const T* grad_h_n;     // (directions, batch, P)
  const T* grad_c_n;     // (directions, batch, hidden)
  const T* grad_c_all;   // (directions, tokens, hidden)
  const T* w_hh;         // (directions, G·hidden, P)
  const T* h0;           // (directions, batch, P)
  const T* c0;           // (directions, batch, hidden)
  const T* output;       // (tokens, directions·P)
  const float* c_all;    // (directions, tokens, hidden)
  const T* kept;         // (directions, tokens, K, hidden)
  T* slopes;             // (tokens, directions, S, hidden)
  T* dh0;                // (directions, batch, P)
  T* dc0;                // (directions, batch, hidden)
  bool relu;

  // Of the kernel for extras.
  Sequence states;        // `sequence` with P in hidden's place
  const T* w_hr;          // (directions, P, hidden)
  const float* norm_hh;   // (directions, G, hidden)
  const float* norm_c;    // (directions, hidden)
  const float* bias_c;
  const float* hat_hh;    // (directions, tokens, G, hidden): the normalised product
  const float* rstd_hh;   // (directions, tokens)
  const float* hat_c;     // (directions, tokens, hidden)
  const float* rstd_c;    // (directions, tokens)
  T* through;             // (tokens, directions, G, hidden): dL/d(W_hh·h)
  T* slopes_c;            // (tokens, directions, hidden): dL/d(LN(c)·norm_c + bias_c)
  T* grad_states;         // (tokens, directions, P): dL/d(W_hr·m)
  Noise<T> noise;
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

// One of a thread's pairs of a row and a feature of h.
template <typename T>
struct BackState {
  int16_t row, unit;  // of the group; unit (or feature) of the block
  int length;         // -1: not the batch's, or not the layer's
  bool cut;           // nothing comes from the step after
  bool zone;          // the step kept the state
  int token;          // of the step that what follows is for
  float grad, dh;     // dh: between steps, what bypasses the product
  float fresh, mask;  // fresh: dL/dh before zoneout
  T handed;           // dL/dh before zoneout, as it is projected
};

// One of a thread's pairs of a row and a unit, and of the feature of h that it is where nothing is projected.
template <typename T, Kind KIND>
struct BackCell : BackState<T> {
  bool zone_c;
  Saved<KIND> saved;
  float grad_c, dc, bypass_c;
  T slopes[slopes_of(KIND)];
  float exact[slopes_of(KIND)];  // the slopes before they are rounded
  T through[gates_of(KIND)], slope_c;
};

}  // namespace fused_ops::layers
