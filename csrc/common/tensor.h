// What a CUDA launcher asks of its tensors: their device and its stream, pointers of a checked type, the registration.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/check.h"
#include "common/dtype.h"

// Lives in libtorch_cuda, which libtorch.so brings in; absent on a CPU-only torch, where nothing is launched.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                    void** ret_stream);

// FUSED_OPS_CUDA_LIBRARY(m) { m.impl("name_cuda", TORCH_BOX(&function)); }
#define FUSED_OPS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fused_ops, CUDA, m)

namespace fused_ops {

// Makes a tensor's device current for the launcher's scope and names its stream. Pointers are taken within it.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// A tensor's memory, for reading if T is const, else for writing too; the tensor must hold T. Null for no tensor.
template <typename T>
T* data(const Tensor& tensor) {
  check_holds<T>(tensor);
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

template <typename T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// Whether a kernel launched for `other` can reach `tensor`.
inline bool on_device_of(const Tensor& tensor, const Tensor& other) {
  return tensor.is_cuda() && tensor.get_device_index() == other.get_device_index();
}

}  // namespace fused_ops
