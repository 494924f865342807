// One layer of the CPU's RNNs backward, for all of its directions.
#pragma once

#include <vector>

#include "rnn/driver.h"

namespace fused_ops::rnn {

// One direction of one layer. Gradients from outside are null where there are none.
struct BackCell {
  int64_t index, inputs;
  bool reverse;
  Grid x, out, c, kept, grad, grad_all, grad_c_all, dx;
  const float *h0, *c0, *grad_h_n, *grad_c_n;
  float *dh0, *dc0;          // also what is carried from step to step: what bypasses the product, dL/dc
  float* d_params[9];        // in params' order
  const float *w_ih, *w_hh, *w_hr;  // packed columns; null where each panel is used once
  bool written = false;             // d_params hold something
  const float* mask;
  Zones zone_h, zone_c;
  Norms norms;
};

void layer_backward(const Isa& isa, const Call& call, int64_t layer, std::vector<BackCell> cells, bool need_input,
                    bool need_params);

}  // namespace fused_ops::rnn
