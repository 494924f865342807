// What follows a convolution's sum: act(sum * scale + shift + residual). Codes as in fused_ops/conv/reference.py.
#pragma once

#include <cstdint>

namespace fused_ops::conv {

enum Activation : int64_t {
  kNone = 0,
  kRelu = 1,
  kRelu6 = 2,
  kGelu = 3,
  kGeluTanh = 4,
  kSilu = 5,
  kTanh = 6,
  kSigmoid = 7,
  kHardswish = 8,
  kLeakyRelu = 9,
};

}  // namespace fused_ops::conv
