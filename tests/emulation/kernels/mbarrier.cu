#include "common/mbarrier.cuh"

#include "common/cluster.cuh"
#include "common/shared.cuh"
#include "kernels/harness.h"

using namespace fused_ops;
using namespace fused_ops::test;

// Warp 0 hands n values on to warp 1 through a ring of `kStages` slots: out[i] = 2 in[i] + 1.
constexpr int kStages = 3;
__global__ void ring_kernel(const float* in, float* out, int n) {
  SHARED(float, slots, kStages * 32);
  SHARED(Mbarrier, full, kStages);
  SHARED(Mbarrier, empty, kStages);
  const auto lane = static_cast<int>(threadIdx.x % 32);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) mbarrier_init(full + stage, 32), mbarrier_init(empty + stage, 32);
  }
  __syncthreads();
  for (int turn = 0; turn * 32 < n; ++turn) {
    const int stage = turn % kStages, i = turn * 32 + lane;
    const auto parity = static_cast<unsigned>(turn / kStages % 2);
    float& slot = slots[stage * 32 + lane];
    if (threadIdx.x < 32) {
      mbarrier_wait(empty + stage, parity ^ 1);  // at first it is empty
      slot = i < n ? in[i] : 0.0f;
      mbarrier_arrive(full + stage);
    } else {
      mbarrier_wait(full + stage, parity);
      const float value = slots[stage * 32 + 31 - lane];
      mbarrier_arrive(empty + stage);
      const int from = turn * 32 + 31 - lane;
      if (from < n) out[from] = 2 * value + 1;
    }
  }
}

FUSED_OPS_TEST ring(const float* in, int64_t n, float* out, int64_t m) {
  return tell([&] {
    const Array<const float> from(in, n);
    const Array<float> to(out, m);
    launch(ring_kernel, kOne, dim3(64), kOne, 0, nullptr, from, to, static_cast<int>(n));
  });
}

// What the waits say, step by step.
__global__ void phases_kernel(int* out) {
  SHARED(Mbarrier, barrier, 1);
  int i = 0;
  mbarrier_init(barrier, 3);
  out[i++] = mbarrier_test_wait_parity(barrier, 1);  // the phase before the first counts as complete
  out[i++] = mbarrier_test_wait_parity(barrier, 0);
  const uint64_t first = mbarrier_arrive(barrier, 2);
  out[i++] = mbarrier_test_wait(barrier, first);
  mbarrier_arrive(barrier);
  out[i++] = mbarrier_test_wait(barrier, first);
  out[i++] = mbarrier_try_wait_parity(barrier, 0);
  out[i++] = mbarrier_try_wait_parity(barrier, 1);
  mbarrier_arrive_expect_tx(barrier, 48);
  mbarrier_arrive(barrier, 2);
  out[i++] = mbarrier_test_wait_parity(barrier, 1);  // all have arrived, 48 bytes have not
  mbarrier_complete_tx(barrier, 40);
  out[i++] = mbarrier_test_wait_parity(barrier, 1);
  mbarrier_complete_tx(barrier, 8);
  out[i++] = mbarrier_test_wait_parity(barrier, 1);
  mbarrier_complete_tx(barrier, 16);  // bytes may come before they are expected
  mbarrier_arrive(barrier, 2);
  mbarrier_arrive_expect_tx(barrier, 32);
  out[i++] = mbarrier_test_wait_parity(barrier, 0);
  mbarrier_complete_tx(barrier, 16);
  out[i++] = mbarrier_test_wait_parity(barrier, 0);
  mbarrier_inval(barrier);
  barrier[0] = 7;  // memory again
  out[i++] = static_cast<int>(barrier[0]);
  mbarrier_init(barrier, 1);
  mbarrier_expect_tx(barrier, 4);
  mbarrier_arrive(barrier);
  out[i++] = mbarrier_test_wait_parity(barrier, 0);
  mbarrier_complete_tx(barrier, 4);
  out[i++] = mbarrier_test_wait_parity(barrier, 0);
}

FUSED_OPS_TEST phases(int* out, int64_t n) {
  return tell([&] {
    const Array<int> to(out, n);
    launch(phases_kernel, kOne, kOne, kOne, 0, nullptr, to);
  });
}

// Every block of a cluster writes its number to all others' shared memory and arrives at their mbarriers.
__global__ void all_to_all_kernel(int* out, int turns) {
  SHARED(int, got, 8);
  SHARED(Mbarrier, barrier, 2);
  const unsigned rank = cluster_rank(), size = cluster_size();
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, size);
    mbarrier_init(barrier + 1, size);
    fence_mbarrier_init();
  }
  cluster_arrive_relaxed();
  cluster_wait();
  for (int turn = 0; turn < turns; ++turn) {
    const auto parity = static_cast<unsigned>(turn % 2);
    if (threadIdx.x < size) {
      remote(got, threadIdx.x)[rank] = static_cast<int>(rank) + 10 * turn;
      mbarrier_arrive_remote(remote(barrier, threadIdx.x));
    }
    mbarrier_wait<Scope::cluster>(barrier, parity);
    if (threadIdx.x < size) out[blockIdx.x * size + threadIdx.x] = got[threadIdx.x];
    __syncthreads();
    if (threadIdx.x < size) mbarrier_arrive_remote(remote(barrier + 1, threadIdx.x));
    mbarrier_wait<Scope::cluster>(barrier + 1, parity);
  }
}

FUSED_OPS_TEST all_to_all(int* out, int64_t n, int64_t cluster, int64_t turns) {
  return tell([&] {
    const Array<int> to(out, n);
    launch(all_to_all_kernel, dim3(static_cast<unsigned>(n / cluster)), dim3(32), dim3(static_cast<unsigned>(cluster)),
           0, nullptr, to, static_cast<int>(turns));
  });
}

// More mbarriers than the checker tells apart, each used by two threads of its own.
__global__ void many_kernel(float* out) {
  SHARED(Mbarrier, barriers, 64);
  SHARED(float, values, 64);
  if (threadIdx.x < 64) mbarrier_init(barriers + threadIdx.x, 1);
  __syncthreads();
  const unsigned pair = threadIdx.x / 2;
  if (threadIdx.x % 2 == 0) {
    values[pair] = static_cast<float>(pair);
    mbarrier_arrive(barriers + pair);
  } else {
    while (!mbarrier_try_wait_parity(barriers + pair, 0)) {
    }
    out[pair] = values[pair];
  }
}

FUSED_OPS_TEST many(float* out, int64_t n) {
  return tell([&] {
    const Array<float> to(out, n);
    launch(many_kernel, kOne, dim3(128), kOne, 0, nullptr, to);
  });
}
