// What the kinds of cell do between a step's product and its new state, for one unit of one row, in float32.
#pragma once

#include <cmath>

#include "rnn/layer.h"

namespace fused_ops::layers {

__host__ __device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// A step's new state, and what its backward keeps of it: the GRU's [W_hn·h + b_hn, r, z, n], the LSTM's [i, f, g, o].
template <Kind KIND>
struct NewState {
  float h, c;
  float kept[kept_of(KIND) + 1];  // one more, as there are no arrays of none
};

// input: W_ih·x + b_ih + b_hh, of the GRU's n without b_hn. product: W_hh·h. h, c: the state before.
//   rnn   h' = tanh or relu(s)
//   gru   r, z = σ(s), n = tanh(input_n + r·(product_n + b_hn)), h' = n + z·(h − n)            Cho et al. 2014
//   lstm  i, f, o = σ(s), g = tanh(s), c' = f·c + i·g, h' = o·tanh(c')                         Gers et al. 2000
// where s = input + product.
template <Kind KIND>
__host__ __device__ inline NewState<KIND> new_state(const float (&input)[gates_of(KIND)],
                                                    const float (&product)[gates_of(KIND)], float b_hn, float h,
                                                    float c, bool relu) {
  NewState<KIND> next{};
  if constexpr (KIND == Kind::rnn) {
    const float s = input[0] + product[0];
    next.h = !relu ? tanhf(s) : s < 0.0f ? 0.0f : s;  // NaN stays NaN
  } else if constexpr (KIND == Kind::gru) {
    const float product_n = product[2] + b_hn;
    const float r = sigmoid(input[0] + product[0]), z = sigmoid(input[1] + product[1]);
    const float n = tanhf(input[2] + r * product_n);
    next.h = n + z * (h - n);
    next.kept[0] = product_n, next.kept[1] = r, next.kept[2] = z, next.kept[3] = n;
  } else {
    const float i = sigmoid(input[0] + product[0]), f = sigmoid(input[1] + product[1]);
    const float g = tanhf(input[2] + product[2]), o = sigmoid(input[3] + product[3]);
    next.c = f * c + i * g;
    next.h = o * tanhf(next.c);
    next.kept[0] = i, next.kept[1] = f, next.kept[2] = g, next.kept[3] = o;
  }
  return next;
}

}  // namespace fused_ops::layers
