// What the cells do between two products of the backward, for one unit of one row: dL/dh to the slopes of the gates.
// Plain functions of floats.
#pragma once

#include <cmath>

#include "rnn/layer.h"

namespace fused_ops::layers {

// What a step's forward left of a unit.
template <Kind kKind>
struct Saved {
  float kept[4];      // GRU: W_hn·h + b_hn, r, z, n; LSTM: i, f, g, o
  float h;            // RNN: the step's state, before zoneout; GRU: the state before it
  float c, c_before;  // LSTM
};

// The LSTM's, of h = o·squashed: by h, and by c in all. Afterwards dc is dL/dc before the step.
__host__ __device__ inline void lstm_slopes(const Saved<Kind::lstm>& saved, float squashed, float dh, float& dc,
                                            float (&slopes)[slopes_of(Kind::lstm)]) {
  const float i = saved.kept[0], f = saved.kept[1], g = saved.kept[2], o = saved.kept[3];
  slopes[0] = dc * g * i * (1.0f - i);
  slopes[1] = dc * saved.c_before * f * (1.0f - f);
  slopes[2] = dc * i * (1.0f - g * g);
  slopes[3] = dh * squashed * o * (1.0f - o);
  dc *= f;
}

// dh, dc: by the state that the step left, all of it. Afterwards dh is what bypasses the product with W_hh on the way
// to the state before (GRU), and dc is dL/dc before the step (LSTM).
template <Kind kKind>
__host__ __device__ inline void backward_gates(const Saved<kKind>& saved, bool relu, float& dh, float& dc,
                                               float (&slopes)[slopes_of(kKind)]) {
  if constexpr (kKind == Kind::rnn) {
    // Written so that NaN stays NaN.
    slopes[0] = relu ? (saved.h <= 0.0f ? 0.0f : dh) : dh * (1.0f - saved.h * saved.h);
    dh = 0.0f;
  } else if constexpr (kKind == Kind::gru) {
    const float product_n = saved.kept[0], r = saved.kept[1], z = saved.kept[2], n = saved.kept[3];
    const float dn = dh * (1.0f - z) * (1.0f - n * n);
    slopes[0] = dn * r;
    slopes[1] = dn * product_n * r * (1.0f - r);
    slopes[2] = dh * (saved.h - n) * z * (1.0f - z);
    slopes[3] = dn;
    dh *= z;
  } else {
    const float tanh_c = tanhf(saved.c);
    dc += dh * saved.kept[3] * (1.0f - tanh_c * tanh_c);
    lstm_slopes(saved, tanh_c, dh, dc, slopes);
    dh = 0.0f;
  }
}

}  // namespace fused_ops::layers
