// Argument checks shared by CPU and CUDA launchers. A failed check raises in Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

namespace fused_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (auto it = shape.begin(); same && it != shape.end(); ++it, ++i) same = tensor.size(i) == *it;
  STD_TORCH_CHECK(same, name, " has the wrong shape");
}

// Whether every tensor that is there can be read in pieces of 16 bytes from its first element on.
inline bool aligned(std::initializer_list<std::optional<Tensor>> tensors) {
  for (const auto& tensor : tensors) {
    if (tensor && reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % 16 != 0) return false;
  }
  return true;
}

}  // namespace fused_ops
