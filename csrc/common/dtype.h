// Calls a templated launcher with the C++ type of a tensor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/check.h"

namespace fused_ops {

// visit(float{}) / visit(__half{}) / visit(__nv_bfloat16{}), by `dtype`.
template <typename Visitor>
auto dispatch_float(ScalarType dtype, const char* op, Visitor visit) {
  switch (dtype) {
    case ScalarType::Float: return visit(float{});
    case ScalarType::Half: return visit(__half{});
    case ScalarType::BFloat16: return visit(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, op, " takes float32, float16 or bfloat16");
  }
}

}  // namespace fused_ops
