// Mutants of clusters and of what completes on mbarriers: as mutants/mutant.h has them, for blocks that are one cluster.
#pragma once

#include "common/mbarrier.cuh"
#include "mutants/mutant.h"

#define CLUSTER_MUTANT(name, blocks, threads, shared_bytes)                                                            \
  FUSED_OPS_TEST name(const float* in, int64_t n, float* out, int64_t m, uint32_t* words, int64_t k, int64_t fault) {  \
    return tell([&] {                                                                                                  \
      const Array<const float> from(in, n);                                                                            \
      const Array<float> to(out, m);                                                                                   \
      const Array<uint32_t> counters(words, k);                                                                        \
      const auto kernel = fault ? name##_kernel<true> : name##_kernel<false>;                                          \
      const dim3 all(blocks);                                                                                          \
      launch(kernel, all, dim3(threads), all, shared_bytes, nullptr, from, to, counters, static_cast<int>(n));         \
    });                                                                                                                \
  }

__device__ inline void make_ready(Mbarrier* barrier, unsigned count) {
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, count);
    fence_mbarrier_init();
  }
  __syncthreads();
}
