// Kernels with one planted fault each, and without it: kernel<true> and kernel<false>. A comment `// <name>` marks the
// lines that the finding must name.
#pragma once

#include "common/shared.cuh"
#include "kernels/harness.h"

using namespace fused_ops;
using namespace fused_ops::test;

// Entry `name` launches name_kernel<fault>(in, out, words, n), n being the length of `in`.
#define MUTANT_BY(launch, name, blocks, threads, shared_bytes)                                                          \
  FUSED_OPS_TEST name(const float* in, int64_t n, float* out, int64_t m, uint32_t* words, int64_t k, int64_t fault) {   \
    return tell([&] {                                                                                                   \
      const Array<const float> from(in, n);                                                                             \
      const Array<float> to(out, m);                                                                                    \
      const Array<uint32_t> counters(words, k);                                                                         \
      const auto kernel = fault ? name##_kernel<true> : name##_kernel<false>;                                           \
      launch(kernel, dim3(blocks), dim3(threads), kOne, shared_bytes, nullptr, from, to, counters, static_cast<int>(n)); \
    });                                                                                                                 \
  }
#define MUTANT(name, blocks, threads, shared_bytes) MUTANT_BY(launch, name, blocks, threads, shared_bytes)
#define COOPERATIVE_MUTANT(name, blocks, threads, shared_bytes) \
  MUTANT_BY(launch_cooperative, name, blocks, threads, shared_bytes)

#define KERNEL(name)    \
  template <bool kFault> \
  __global__ void name##_kernel([[maybe_unused]] const float* in, [[maybe_unused]] float* out, \
                                [[maybe_unused]] uint32_t* words, [[maybe_unused]] int n)
