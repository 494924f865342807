// A checked call of a sequence with a layer norm inside the step.
#pragma once

#include "rnn/driver.h"
#include "rnn/norm.h"

namespace fused_ops::rnn {

// given: each cell's norm_ih, norm_hh (gates·hidden,)[, norm_c, bias_c (hidden,)].
struct NormCall : Call {
  std::vector<Tensor> norm_params;

  NormCall(const Inputs& inputs, const std::vector<Tensor>& given) : Call(inputs) {
    STD_TORCH_CHECK(static_cast<int64_t>(given.size()) == cells() * norms_per_cell(), "norms must hold ",
                    norms_per_cell(), " tensors for each of h0's ", cells(), " cells");
    for (size_t i = 0; i < given.size(); ++i) {
      check_floats(given[i], "norms");
      check_shape(given[i], {(i % norms_per_cell() < 2 ? gates : 1) * hidden}, "norms");
      norm_params.push_back(compact(given[i]));
    }
  }

  int64_t norms_per_cell() const { return kind == LSTM ? 4 : 2; }

  Norms norms(int64_t cell) const {
    const auto at = [&](int64_t i) {
      return i < norms_per_cell() ? norm_params[cell * norms_per_cell() + i].const_data_ptr<float>() : nullptr;
    };
    return {at(0), at(1), param(cell, 2), param(cell, 3), at(2), at(3)};
  }
};

}  // namespace fused_ops::rnn
