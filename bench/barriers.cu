// What a step of a persistent kernel can't go below: launch, grid-barrier and cluster-barrier latency, in microseconds.
// Prints one JSON object. Built and run by `python -m bench baselines`.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

namespace cg = cooperative_groups;

#define CHECK(call)                                                             \
  do {                                                                          \
    const cudaError_t status = (call);                                          \
    if (status != cudaSuccess) {                                                \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(status));      \
      std::exit(1);                                                             \
    }                                                                           \
  } while (0)

__global__ void empty_kernel() {}

__global__ void grid_barriers(int rounds) {
  for (int i = 0; i < rounds; ++i) cg::this_grid().sync();
}

__global__ void cluster_barriers(int rounds) {
  for (int i = 0; i < rounds; ++i) cg::this_cluster().sync();
}

template <typename Launch>
float milliseconds(Launch launch) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  launch();
  CHECK(cudaEventRecord(start));
  launch();
  CHECK(cudaEventRecord(stop));
  CHECK(cudaEventSynchronize(stop));
  float elapsed = 0.0f;
  CHECK(cudaEventElapsedTime(&elapsed, start, stop));
  return elapsed;
}

int main() {
  constexpr int kRounds = 10000;
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));

  const float launches = milliseconds([] {
    for (int i = 0; i < kRounds; ++i) empty_kernel<<<1, 32>>>();
  });
  std::printf("{\"launch_us\": %.3f", launches * 1e3f / kRounds);

  for (int threads : {128, 256, 512}) {
    int rounds = kRounds;
    void* args[] = {&rounds};
    const float total = milliseconds([&] {
      CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_barriers), dim3(device.multiProcessorCount),
                                        dim3(threads), args, 0, nullptr));
    });
    std::printf(", \"grid_barrier_%d_threads_us\": %.3f", threads, total * 1e3f / kRounds);
  }

  for (unsigned size : {2u, 4u, 8u, 16u}) {
    if (size > 8) {
      CHECK(cudaFuncSetAttribute(cluster_barriers, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {size, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(size);
    config.blockDim = dim3(256);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    CHECK(cudaOccupancyMaxActiveClusters(&clusters, cluster_barriers, &config));
    config.gridDim = dim3(size * static_cast<unsigned>(clusters));
    const float total = milliseconds([&] { CHECK(cudaLaunchKernelEx(&config, cluster_barriers, kRounds)); });
    std::printf(", \"cluster_barrier_%u_blocks_us\": %.3f, \"co_resident_clusters_of_%u\": %d", size,
                total * 1e3f / kRounds, size, clusters);
  }
  std::printf("}\n");
  return 0;
}
