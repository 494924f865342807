// A test's array as device code sees it, on a GPU: a copy, which the destructor brings back.
#pragma once

#include <exception>
#include <type_traits>

#include "common/launch.h"

namespace fused_ops::test {

// const T: an input.
template <typename T>
class Array {
  using Element = std::remove_const_t<T>;

 public:
  Array(T* host, int64_t count) : host_(host), bytes_(static_cast<size_t>(count) * sizeof(T)) {
    FUSED_OPS_CUDA_CHECK(cudaMalloc(&device_, bytes_));
    FUSED_OPS_CUDA_CHECK(cudaMemcpy(device_, host, bytes_, cudaMemcpyHostToDevice));
  }
  // A kernel's error is the next call's to tell: the one that reads the result must not be lost.
  ~Array() noexcept(false) {
    cudaError_t status = cudaDeviceSynchronize();
    if constexpr (!std::is_const_v<T>) {
      if (status == cudaSuccess) status = cudaMemcpy(host_, device_, bytes_, cudaMemcpyDeviceToHost);
    }
    cudaFree(device_);
    if (std::uncaught_exceptions() == 0) FUSED_OPS_CUDA_CHECK(status);
  }
  Array(const Array&) = delete;
  operator T*() const { return device_; }

 private:
  T* host_;
  Element* device_ = nullptr;
  size_t bytes_;
};

}  // namespace fused_ops::test
