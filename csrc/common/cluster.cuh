// Clusters: blocks that run together and reach each other's shared memory. Sections named are of the PTX ISA. No thread
// touches another block's shared memory before the cluster's barrier has shown that the block runs, and no block exits
// while another may still touch its own. Chips before sm_90 have none: there these trap, and no launcher asks for them.
// Emulated, uncalibrated: no GPU has confirmed this file's twin yet.
#pragma once

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FUSED_OPS_CLUSTER_ASM(...) __trap()
#else
#define FUSED_OPS_CLUSTER_ASM(...) asm volatile(__VA_ARGS__)
#endif

namespace fused_ops {

// "Special Registers", %cluster_ctarank and %cluster_nctarank: this block's number in its cluster, and of how many.
__device__ inline uint32_t cluster_rank() {
  uint32_t rank = 0;
  FUSED_OPS_CLUSTER_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline uint32_t cluster_size() {
  uint32_t size = 0;
  FUSED_OPS_CLUSTER_ASM("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// "barrier.cluster": every thread of the cluster arrives, then waits, in this order. What came before the arrival is
// known after the wait, to the relaxed arrival's exception: that one only tells that the thread has come so far.
__device__ inline void cluster_arrive() { FUSED_OPS_CLUSTER_ASM("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_arrive_relaxed() { FUSED_OPS_CLUSTER_ASM("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ inline void cluster_wait() { FUSED_OPS_CLUSTER_ASM("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// "mapa": where block `rank` of the cluster has the shared variable that `mine` points to here. Loads, stores and
// atomics take the pointer like any other.
template <typename T>
__device__ inline T* remote(T* mine, uint32_t rank) {
  uint64_t there = 0;
  FUSED_OPS_CLUSTER_ASM("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(rank));
  return reinterpret_cast<T*>(there);
}

}  // namespace fused_ops

#undef FUSED_OPS_CLUSTER_ASM
