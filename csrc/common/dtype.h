// C++ types and the dtypes of tensors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

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

template <typename T> constexpr ScalarType kDtypeOf = ScalarType::Undefined;
template <> inline constexpr ScalarType kDtypeOf<float> = ScalarType::Float;
template <> inline constexpr ScalarType kDtypeOf<__half> = ScalarType::Half;
template <> inline constexpr ScalarType kDtypeOf<__nv_bfloat16> = ScalarType::BFloat16;
template <> inline constexpr ScalarType kDtypeOf<double> = ScalarType::Double;
template <> inline constexpr ScalarType kDtypeOf<int32_t> = ScalarType::Int;
template <> inline constexpr ScalarType kDtypeOf<int64_t> = ScalarType::Long;
template <> inline constexpr ScalarType kDtypeOf<uint8_t> = ScalarType::Byte;
template <> inline constexpr ScalarType kDtypeOf<bool> = ScalarType::Bool;

template <typename T>
void check_holds(const Tensor& tensor) {
  constexpr ScalarType kWanted = kDtypeOf<std::remove_const_t<T>>;
  static_assert(kWanted != ScalarType::Undefined, "no tensor holds this type");
  const ScalarType found = tensor.scalar_type();
  STD_TORCH_CHECK(found == kWanted, "a kernel reads ", torch::headeronly::toString(kWanted), " from a tensor of ",
                  torch::headeronly::toString(found));
}

}  // namespace fused_ops
