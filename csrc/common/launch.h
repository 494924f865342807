// Checked kernel launches and what they ask of the device. No torch header.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
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

// What the launch needs leave for: more than 48 KB of shared memory, more than 8 blocks in a cluster.
template <typename Kernel>
void permit(Kernel kernel, dim3 cluster, size_t shared_bytes) {
  if (shared_bytes > 48 * 1024) {
    FUSED_OPS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(shared_bytes)));
  }
  if (cluster.x * cluster.y * cluster.z > 8) {
    FUSED_OPS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
}

inline void in_clusters(cudaLaunchConfig_t& config, dim3 cluster) {
  cudaLaunchAttribute& attribute = config.attrs[config.numAttrs++];
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster.x, cluster.y, cluster.z};
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  FUSED_OPS_CUDA_CHECK(cudaGetDevice(&device));
  FUSED_OPS_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster, bool cooperative, size_t shared_bytes,
            cudaStream_t stream, Parameters... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  permit(kernel, cluster, shared_bytes);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = attributes;
  if (cluster.x * cluster.y * cluster.z > 1) in_clusters(config, cluster);
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

inline int multiprocessors() { return detail::device_attribute(cudaDevAttrMultiProcessorCount); }

// Bytes of shared memory that one block may have.
inline int64_t shared_bytes_per_block() { return detail::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// 90 for compute capability 9.0.
inline int capability() {
  return 10 * detail::device_attribute(cudaDevAttrComputeCapabilityMajor) +
         detail::device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// How many of a kernel's blocks can be alive together, in whole clusters. Fewer than a launch needs: it would be refused,
// or its blocks would wait for others that never come.
template <typename... Parameters>
int64_t co_resident_blocks(void (*kernel)(Parameters...), dim3 block, dim3 cluster, size_t shared_bytes) {
  detail::permit(kernel, cluster, shared_bytes);
  const int64_t size = int64_t{cluster.x} * cluster.y * cluster.z;
  int count = 0;
  if (size == 1) {
    FUSED_OPS_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &count, kernel, static_cast<int>(block.x * block.y * block.z), shared_bytes));
    return int64_t{count} * multiprocessors();
  }
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config{};
  config.gridDim = cluster, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.attrs = &attribute;
  detail::in_clusters(config, cluster);
  FUSED_OPS_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&count, kernel, &config));
  return count * size;
}

}  // namespace fused_ops
