// Checked kernel launches and what they ask of the device. No torch header.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define FUSED_OPS_CUDA_CHECK(call)                                                                     \
  do {                                                                                                 \
    const cudaError_t fused_ops_status = (call);                                                       \
    if (fused_ops_status != cudaSuccess) {                                                             \
      throw std::runtime_error(std::string(#call ": ") + cudaGetErrorString(fused_ops_status));        \
    }                                                                                                  \
  } while (0)

namespace fused_ops {

namespace detail {

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster, bool cooperative, size_t shared_bytes,
            cudaStream_t stream, Parameters... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {
    FUSED_OPS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(shared_bytes)));
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = attributes;
  if (cluster.x * cluster.y * cluster.z > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster.x, cluster.y, cluster.z};
  }
  if (cooperative) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (config.numAttrs == 0) {
    kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
    FUSED_OPS_CUDA_CHECK(cudaGetLastError());
  } else {
    FUSED_OPS_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  }
}

}  // namespace detail

// Launches kernel(arguments...), and throws if the launch was refused. An empty grid is no launch. Blocks come in
// clusters of `cluster`, which divides `grid`; dim3(1, 1, 1) is none.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  detail::launch(kernel, grid, block, cluster, false, shared_bytes, stream, static_cast<Parameters>(arguments)...);
}

// The same with all blocks alive together, so that they may wait for each other; throws where the chip has no room.
template <typename... Parameters, typename... Arguments>
void launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes,
                        cudaStream_t stream, const Arguments&... arguments) {
  detail::launch(kernel, grid, block, cluster, true, shared_bytes, stream, static_cast<Parameters>(arguments)...);
}

inline int multiprocessors() {
  int device = 0, count = 0;
  FUSED_OPS_CUDA_CHECK(cudaGetDevice(&device));
  FUSED_OPS_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

}  // namespace fused_ops
