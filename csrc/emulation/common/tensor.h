// The twin of csrc/common/tensor.h: tensors on the CPU, whose memory the checker knows for as long as the launcher runs.
#pragma once

#include <cuda_runtime.h>

#include "common/check.h"
#include "common/dtype.h"
#include "emulation/check.h"

#define FUSED_OPS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m)

namespace fused_ops {

namespace emulation {

inline thread_local int open_scopes = 0;

// Elements from a tensor's first to its last, those it skips included.
inline int64_t span(const Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return last + 1;
}

}  // namespace emulation

// Device code may touch what `data` names within it.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) : ranges_(emulation::check::ranges()) {
    STD_TORCH_CHECK(tensor.is_cpu(), "the emulator takes tensors on the CPU");
    ++emulation::open_scopes;
  }
  ~DeviceScope() {
    emulation::check::drop_ranges_to(ranges_);
    --emulation::open_scopes;
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  cudaStream_t stream() const { return nullptr; }

 private:
  size_t ranges_;
};

template <typename T>
T* data(const Tensor& tensor) {
  using Element = std::remove_const_t<T>;
  check_holds<T>(tensor);
  STD_TORCH_CHECK(emulation::open_scopes > 0, "data() is called outside a DeviceScope");
  const auto add = [&](const void* start, bool writable) {
    const auto bytes = static_cast<size_t>(emulation::span(tensor)) * sizeof(T);
    if (bytes > 0) emulation::check::add_range(start, bytes, sizeof(T), writable);
  };
  if constexpr (std::is_const_v<T>) {
    add(tensor.const_data_ptr(), false);
    return static_cast<const Element*>(tensor.const_data_ptr());
  } else {
    add(tensor.mutable_data_ptr(), true);
    return static_cast<Element*>(tensor.mutable_data_ptr());
  }
}

template <typename T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

inline bool on_device_of(const Tensor& tensor, const Tensor& other) { return tensor.is_cpu() && other.is_cpu(); }

}  // namespace fused_ops
