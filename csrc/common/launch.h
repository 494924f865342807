// What every CUDA launcher needs: the device guard, the stream, checked launches, device properties.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/check.h"

// Lives in libtorch_cuda, which libtorch.so brings in; absent on a CPU-only torch, where nothing is launched.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                    void** ret_stream);

#define FUSED_OPS_CUDA_CHECK(call)                                                                        \
  do {                                                                                                    \
    const cudaError_t fused_ops_status = (call);                                                          \
    STD_TORCH_CHECK(fused_ops_status == cudaSuccess, #call, ": ", cudaGetErrorString(fused_ops_status));  \
  } while (0)

namespace fused_ops {

// Makes a tensor's device current for the launcher's scope and names its stream.
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

// Launches kernel(args...) and raises if the launch was refused. An empty grid is no launch.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {
    FUSED_OPS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  FUSED_OPS_CUDA_CHECK(cudaGetLastError());
}

inline int multiprocessors() {
  int device = 0, count = 0;
  FUSED_OPS_CUDA_CHECK(cudaGetDevice(&device));
  FUSED_OPS_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace fused_ops
