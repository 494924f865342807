// Faults of clusters, mbarriers and bulk copies: name_kernel<true> has one, name_kernel<false> has not. A comment
// `// <name>` marks the lines that the finding must name.
#include "common/bulk_copy.cuh"
#include "common/cluster.cuh"
#include "common/mbarrier.cuh"
#include "mutants/mutant.h"

#define CLUSTER_MUTANT(name, blocks, threads, shared_bytes)                                                            \
  FUSED_OPS_TEST name(const float* in, int64_t n, float* out, int64_t m, uint32_t* words, int64_t k, int64_t fault) {  \
    return tell([&] {                                                                                                  \
      const Array<const float> from(in, n);                                                                            \
      const Array<float> to(out, m);                                                                                   \
      const Array<uint32_t> counters(words, k);                                                                        \
      const auto kernel = fault ? name##_kernel<true> : name##_kernel<false>;                                          \
      launch(kernel, dim3(blocks), dim3(threads), dim3(blocks), shared_bytes, nullptr, from, to, counters, static_cast<int>(n)); \
    });                                                                                                                \
  }

__device__ inline void make_ready(Mbarrier* barrier, unsigned count) {
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, count);
    fence_mbarrier_init();
  }
  __syncthreads();
}

// Clusters.

KERNEL(remote_before_start) {
  SHARED(float, mine, 32);
  mine[threadIdx.x] = in[threadIdx.x];
  if (!kFault) cluster_sync();
  const float other = remote(mine, cluster_rank() ^ 1)[threadIdx.x];  // remote_before_start
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = other;
}
CLUSTER_MUTANT(remote_before_start, 2, 32, 0)

KERNEL(remote_race) {
  SHARED(float, mine, 32);
  cluster_sync();
  mine[threadIdx.x] = in[threadIdx.x];  // remote_race
  if (!kFault) cluster_sync();
  const float other = remote(mine, cluster_rank() ^ 1)[31 - threadIdx.x];  // remote_race
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = other;
}
CLUSTER_MUTANT(remote_race, 2, 32, 0)

KERNEL(exit_before_neighbour) {
  SHARED(float, mine, 32);
  mine[threadIdx.x] = in[threadIdx.x];
  cluster_sync();
  if (cluster_rank() == 0) out[threadIdx.x] = remote(mine, 1)[threadIdx.x];  // exit_before_neighbour
  if (!kFault) cluster_sync();
}
CLUSTER_MUTANT(exit_before_neighbour, 2, 32, 0)

KERNEL(remote_out_of_bounds) {
  float* mine = dynamic_shared<float>();
  mine[threadIdx.x] = in[threadIdx.x];
  cluster_sync();
  const float other = remote(mine, cluster_rank() ^ 1)[threadIdx.x + (kFault ? 1 : 0)];  // remote_out_of_bounds
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = other;
}
CLUSTER_MUTANT(remote_out_of_bounds, 2, 32, 128)

KERNEL(no_such_block) {
  SHARED(float, mine, 32);
  mine[threadIdx.x] = in[threadIdx.x];
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = remote(mine, kFault ? 2 : 1)[threadIdx.x];  // no_such_block
  cluster_sync();
}
CLUSTER_MUTANT(no_such_block, 2, 32, 0)

KERNEL(wait_without_arrival) {
  if (!kFault || threadIdx.x != 5) cluster_arrive();
  cluster_wait();  // wait_without_arrival
  out[threadIdx.x] = in[threadIdx.x];
}
CLUSTER_MUTANT(wait_without_arrival, 1, 32, 0)

KERNEL(two_arrivals) {
  cluster_arrive();
  if (kFault && threadIdx.x == 3) cluster_arrive();  // two_arrivals
  cluster_wait();
  out[threadIdx.x] = in[threadIdx.x];
}
CLUSTER_MUTANT(two_arrivals, 1, 32, 0)

KERNEL(block_skips_barrier) {
  if (kFault && cluster_rank() == 1) {
    SHARED(Mbarrier, never, 1);
    make_ready(never, 1);
    mbarrier_wait(never, 0);
  }
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = in[threadIdx.x];
}
CLUSTER_MUTANT(block_skips_barrier, 2, 32, 0)

// Mbarriers.

KERNEL(not_initialised) {
  SHARED(Mbarrier, barrier, 2);
  make_ready(barrier, 32);
  mbarrier_arrive(barrier + (kFault ? 1 : 0));  // not_initialised
  mbarrier_wait(barrier, 0);
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(not_initialised, 1, 32, 0)

KERNEL(initialisation_not_ordered) {
  SHARED(Mbarrier, barrier, 1);
  SHARED(unsigned, ready, 1);
  if (threadIdx.x == 0) mbarrier_init(barrier, 64), atomicExch(ready, 1);  // initialisation_not_ordered
  if (kFault) wait_until([&] { return atomicAdd(ready, 0) == 1; });
  else __syncthreads();
  mbarrier_arrive(barrier);  // initialisation_not_ordered
  mbarrier_wait(barrier, 0);
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(initialisation_not_ordered, 1, 64, 0)

KERNEL(initialisation_not_announced) {
  SHARED(Mbarrier, barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 2);  // initialisation_not_announced
    if (!kFault) fence_mbarrier_init();
  }
  cluster_arrive_relaxed();
  cluster_wait();
  if (threadIdx.x == 0) mbarrier_arrive_remote(remote(barrier, 0)), mbarrier_arrive_remote(remote(barrier, 1));  // initialisation_not_announced
  if (threadIdx.x == 0) mbarrier_wait(barrier, 0);
  out[blockIdx.x * 32 + threadIdx.x] = in[threadIdx.x];
}
CLUSTER_MUTANT(initialisation_not_announced, 2, 32, 0)

KERNEL(initialised_twice) {
  SHARED(Mbarrier, barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 32);
    if (!kFault) mbarrier_inval(barrier);
    mbarrier_init(barrier, 32);  // initialised_twice
  }
  __syncthreads();
  mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(initialised_twice, 1, 32, 0)

KERNEL(overwritten) {
  SHARED(Mbarrier, barrier, 1);
  make_ready(barrier, 32);
  mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);
  __syncwarp();
  if (!kFault && threadIdx.x == 0) mbarrier_inval(barrier);
  if (threadIdx.x == 0) barrier[0] = 1;  // overwritten
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(overwritten, 1, 32, 0)

KERNEL(invalidated_too_early) {
  SHARED(Mbarrier, barrier, 1);
  make_ready(barrier, 32);
  mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);  // invalidated_too_early
  if (!kFault) __syncwarp();
  if (threadIdx.x == 0) mbarrier_inval(barrier);  // invalidated_too_early
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(invalidated_too_early, 1, 32, 0)

KERNEL(too_many_arrivals) {
  SHARED(Mbarrier, barrier, 1);
  make_ready(barrier, 32);
  mbarrier_arrive(barrier, kFault && threadIdx.x == 7 ? 33 : 1);  // too_many_arrivals
  mbarrier_wait(barrier, 0);
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(too_many_arrivals, 1, 32, 0)

KERNEL(too_few_arrivals) {
  SHARED(Mbarrier, barrier, 1);
  make_ready(barrier, kFault ? 33 : 32);
  mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);  // too_few_arrivals
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(too_few_arrivals, 1, 32, 0)

KERNEL(endless_test) {
  SHARED(Mbarrier, barrier, 1);
  make_ready(barrier, kFault ? 33 : 32);
  mbarrier_arrive(barrier);
  while (!mbarrier_test_wait_parity(barrier, 0)) {  // endless_test
  }
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(endless_test, 1, 32, 0)

KERNEL(wrong_parity) {
  SHARED(Mbarrier, barrier, 1);
  SHARED(float, value, 32);
  make_ready(barrier, 32);
  if (threadIdx.x < 32) {
    value[threadIdx.x] = in[threadIdx.x];  // wrong_parity
    mbarrier_arrive(barrier);
    return;
  }
  mbarrier_wait(barrier, kFault ? 1 : 0);
  out[threadIdx.x - 32] = value[63 - threadIdx.x];  // wrong_parity
}
MUTANT(wrong_parity, 1, 64, 0)

// The parity is not flipped: the second turn's wait is for the first turn's phase.
KERNEL(parity_kept) {
  SHARED(Mbarrier, barrier, 1);
  SHARED(float, value, 64);
  make_ready(barrier, 32);
  for (unsigned turn = 0; turn < 2; ++turn) {
    if (threadIdx.x < 32) {
      value[turn * 32 + threadIdx.x] = in[threadIdx.x] + static_cast<float>(turn);  // parity_kept
      mbarrier_arrive(barrier);
    } else {
      mbarrier_wait(barrier, kFault ? 0 : turn);
      out[turn * 32 + threadIdx.x - 32] = value[turn * 32 + 63 - threadIdx.x];  // parity_kept
    }
    if (turn == 0) __syncthreads();
  }
}
MUTANT(parity_kept, 1, 64, 0)

KERNEL(missing_mbarrier_wait) {
  SHARED(Mbarrier, barrier, 1);
  SHARED(float, value, 32);
  make_ready(barrier, 32);
  if (threadIdx.x < 32) {
    value[threadIdx.x] = in[threadIdx.x];  // missing_mbarrier_wait
    mbarrier_arrive(barrier);
  } else {
    if (!kFault) mbarrier_wait(barrier, 0);
    out[threadIdx.x - 32] = value[63 - threadIdx.x];  // missing_mbarrier_wait
  }
}
MUTANT(missing_mbarrier_wait, 1, 64, 0)

KERNEL(narrow_wait) {
  SHARED(Mbarrier, barrier, 1);
  SHARED(float, value, 32);
  if (threadIdx.x == 0) mbarrier_init(barrier, 32);
  cluster_sync();
  remote(value, cluster_rank() ^ 1)[threadIdx.x] = in[threadIdx.x];  // narrow_wait
  mbarrier_arrive_remote(remote(barrier, cluster_rank() ^ 1));
  mbarrier_wait<kFault ? Scope::block : Scope::cluster>(barrier, 0);
  const float got = value[31 - threadIdx.x];  // narrow_wait
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = got;
}
CLUSTER_MUTANT(narrow_wait, 2, 32, 0)

KERNEL(exit_before_arrival) {
  SHARED(Mbarrier, barrier, 1);
  if (threadIdx.x == 0) mbarrier_init(barrier, 32);
  cluster_sync();
  if (cluster_rank() == 0) mbarrier_arrive_remote(remote(barrier, 1));  // exit_before_arrival
  else if (!kFault) mbarrier_wait(barrier, 0);
  out[blockIdx.x * 32 + threadIdx.x] = in[threadIdx.x];
}
CLUSTER_MUTANT(exit_before_arrival, 2, 32, 0)

KERNEL(wait_elsewhere) {
  SHARED(Mbarrier, barrier, 1);
  if (threadIdx.x == 0) mbarrier_init(barrier, 32);
  cluster_sync();
  mbarrier_arrive(barrier);
  mbarrier_wait(kFault ? remote(barrier, cluster_rank() ^ 1) : barrier, 0);  // wait_elsewhere
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = in[threadIdx.x];
}
CLUSTER_MUTANT(wait_elsewhere, 2, 32, 0)

// Bulk copies.

// 64 floats in, by one bulk copy; what `Faults` names is left out or wrong.
struct Load {
  bool fences = true, waits = true;
  unsigned expected = 256, bytes = 256;
  int shift = 0, shared_shift = 0;
};
#define LOAD(tile, full, load)                                                                                       \
  if (threadIdx.x == 0) {                                                                                            \
    mbarrier_init(full, 1);                                                                                          \
    if (load.fences) fence_mbarrier_init();                                                                          \
    mbarrier_arrive_expect_tx(full, load.expected);                                                                  \
    bulk_load(tile + load.shared_shift, in + load.shift, load.bytes, full);                                          \
  }                                                                                                                  \
  __syncthreads();                                                                                                   \
  if (load.waits) mbarrier_wait(full, 0)

#define LOAD_KERNEL(name, ...)                                     \
  KERNEL(name) {                                                   \
    SHARED(Mbarrier, full, 1);                                     \
    float* tile = dynamic_shared<float>();                         \
    constexpr Load load = kFault ? Load{__VA_ARGS__} : Load{};     \
    LOAD(tile, full, load);                                        \
    out[threadIdx.x] = tile[threadIdx.x];                          \
  }                                                                \
  MUTANT(name, 1, 64, 256)

LOAD_KERNEL(missing_copy_wait, .waits = false)                    // missing_copy_wait
LOAD_KERNEL(mbarrier_not_fenced, .fences = false)                 // mbarrier_not_fenced
LOAD_KERNEL(too_few_bytes_copied, .bytes = 240)                   // too_few_bytes_copied
LOAD_KERNEL(too_few_bytes_expected, .expected = 240)              // too_few_bytes_expected
LOAD_KERNEL(odd_bytes, .expected = 252, .bytes = 252)             // odd_bytes
LOAD_KERNEL(copy_from_odd_address, .shift = 1)                    // copy_from_odd_address
LOAD_KERNEL(copy_past_input, .shift = 68)                         // copy_past_input
LOAD_KERNEL(copy_past_shared, .shared_shift = 4)                  // copy_past_shared
LOAD_KERNEL(copy_to_odd_address, .shared_shift = 2)               // copy_to_odd_address

// Two copies, and the mbarrier counts one of them.
KERNEL(one_copy_expected) {
  SHARED(Mbarrier, full, 1);
  float* tile = dynamic_shared<float>();
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full, kFault ? 128 : 256);
    bulk_load(tile, in, 128, full);
    bulk_load(tile + 32, in + 32, 128, full);
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  out[threadIdx.x] = tile[threadIdx.x] + tile[63 - threadIdx.x];  // one_copy_expected
}
MUTANT(one_copy_expected, 1, 64, 256)

// The next tile comes in while a thread still reads the last one.
KERNEL(reused_stage) {
  SHARED(Mbarrier, full, 1);
  SHARED(Mbarrier, empty, 1);
  float* tile = dynamic_shared<float>();
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1), mbarrier_init(empty, 32);
    fence_mbarrier_init();
  }
  __syncthreads();
  for (unsigned turn = 0; turn < 2; ++turn) {
    if (threadIdx.x == 32) {
      if (!kFault) mbarrier_wait(empty, turn ^ 1);
      mbarrier_arrive_expect_tx(full, 128);
      bulk_load(tile, in + turn * 32, 128, full);  // reused_stage
      if (kFault) mbarrier_wait(full, turn);
    }
    if (threadIdx.x >= 32) continue;
    mbarrier_wait(full, turn);
    out[turn * 32 + threadIdx.x] = tile[31 - threadIdx.x];  // reused_stage
    mbarrier_arrive(empty);
  }
}
MUTANT(reused_stage, 1, 64, 128)

KERNEL(exit_with_copy_under_way) {
  SHARED(Mbarrier, full, 1);
  float* tile = dynamic_shared<float>();
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full, 128);
    bulk_load(tile, in, 128, full);  // exit_with_copy_under_way
    if (!kFault) mbarrier_wait(full, 0);
  }
  out[threadIdx.x] = 1;
}
MUTANT(exit_with_copy_under_way, 1, 32, 128)

// Out, by one bulk copy.
template <bool kFence, bool kBarrier, bool kWait, bool kReuse>
__device__ void store_tile(const float* in, float* out) {
  float* tile = dynamic_shared<float>();
  tile[threadIdx.x] = in[threadIdx.x];  // missing_proxy_fence missing_barrier_before_store
  if (kFence) fence_proxy_async();
  if (kBarrier) __syncthreads();
  if (!kFence && threadIdx.x == 0) out[64] = 0;
  if (threadIdx.x == 0) {
    bulk_store(out, tile, 256);  // missing_proxy_fence missing_barrier_before_store store_not_waited_for reused_source
    bulk_commit();
    if (kWait) bulk_wait_read<0>();
  }
  if (!kReuse) return;
  __syncthreads();
  tile[threadIdx.x] = 0;  // reused_source
  __syncthreads();
  if (threadIdx.x == 0) bulk_wait<0>();
}
#define STORE_KERNEL(name, ...)                                                                            \
  KERNEL(name) {                                                                                           \
    if (kFault) store_tile<__VA_ARGS__>(in, out);                                                          \
    else store_tile<true, true, true, true>(in, out);                                                      \
  }                                                                                                        \
  MUTANT(name, 1, 64, 256)
STORE_KERNEL(missing_proxy_fence, false, true, true, false)
STORE_KERNEL(missing_barrier_before_store, true, false, true, false)
STORE_KERNEL(store_not_waited_for, true, true, false, false)
STORE_KERNEL(reused_source, true, true, false, true)

// The thread that copies fences, not those that wrote.
KERNEL(late_proxy_fence) {
  float* tile = dynamic_shared<float>();
  tile[threadIdx.x] = in[threadIdx.x];  // late_proxy_fence
  if (!kFault) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x != 0) return;
  fence_proxy_async();
  bulk_store(out, tile, 256);  // late_proxy_fence
  bulk_commit();
  bulk_wait_read<0>();
}
MUTANT(late_proxy_fence, 1, 64, 256)

// What a copy has written to device memory is read again before the thread has waited for it.
KERNEL(stored_and_read) {
  float* tile = dynamic_shared<float>();
  tile[threadIdx.x] = in[threadIdx.x];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, tile, 256);  // stored_and_read
    bulk_commit();
    if (kFault) bulk_wait_read<0>();
    else bulk_wait<0>();
  }
  __syncthreads();
  out[64 + threadIdx.x] = out[63 - threadIdx.x];  // stored_and_read
}
MUTANT(stored_and_read, 1, 64, 256)

// Ordinary writes to a stage that a copy then fills: two proxies, no fence.
KERNEL(copy_over_writes) {
  SHARED(Mbarrier, full, 1);
  float* tile = dynamic_shared<float>();
  if (threadIdx.x == 0) mbarrier_init(full, 1), fence_mbarrier_init();
  tile[threadIdx.x] = 0;  // copy_over_writes
  if (!kFault) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(full, 128);
    bulk_load(tile, in, 128, full);  // copy_over_writes
  }
  mbarrier_wait(full, 0);
  out[threadIdx.x] = tile[threadIdx.x];
}
MUTANT(copy_over_writes, 1, 32, 128)

KERNEL(multicast_to_absent_block) {
  SHARED(Mbarrier, full, 1);
  float* tile = dynamic_shared<float>();
  if (threadIdx.x == 0) mbarrier_init(full, 1), fence_mbarrier_init(), mbarrier_arrive_expect_tx(full, 128);
  cluster_sync();
  if (threadIdx.x == 0 && cluster_rank() == 0) bulk_load_multicast(tile, in, 128, full, kFault ? 7 : 3);  // multicast_to_absent_block
  mbarrier_wait(full, 0);
  out[blockIdx.x * 32 + threadIdx.x] = tile[threadIdx.x];
}
CLUSTER_MUTANT(multicast_to_absent_block, 2, 32, 128)

// Block 0 copies to a block that may not have begun.
KERNEL(multicast_before_start) {
  SHARED(Mbarrier, full, 1);
  float* tile = dynamic_shared<float>();
  if (threadIdx.x == 0) mbarrier_init(full, 1), fence_mbarrier_init(), mbarrier_arrive_expect_tx(full, 128);
  if (!kFault) cluster_sync();
  if (threadIdx.x == 0 && cluster_rank() == 0) bulk_load_multicast(tile, in, 128, full, 3);  // multicast_before_start
  __syncthreads();
  mbarrier_wait(full, 0);
  out[blockIdx.x * 32 + threadIdx.x] = tile[threadIdx.x];
}
CLUSTER_MUTANT(multicast_before_start, 2, 32, 128)

// Tensor copies: rows of 32 floats, swizzled.
#define TENSOR_MUTANT(name, swizzle)                                                                                   \
  FUSED_OPS_TEST name(const float* in, int64_t n, float* out, int64_t m, uint32_t*, int64_t, int64_t fault) {          \
    return tell([&] {                                                                                                  \
      const Array<const float> from(in, n);                                                                            \
      const Array<float> to(out, m);                                                                                   \
      const auto map = make_tensor_map<float, 2>(from, {32, 4}, {128}, {32, 4}, swizzle);                              \
      launch(fault ? name##_kernel<true> : name##_kernel<false>, kOne, dim3(64), kOne, 1024, nullptr, map, to);        \
    });                                                                                                                \
  }
template <size_t kRank>
__device__ void load_matrix(const TensorMap& map, float* out, int shift, unsigned bytes, const int (&at)[kRank], bool swizzled) {
  SHARED(Mbarrier, full, 1);
  float* tile = dynamic_shared<float>();
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full, bytes);
    tensor_load(tile + shift, map, full, at);  // tensor_to_odd_address wrong_rank
  }
  __syncthreads();
  mbarrier_wait(full, 0);  // tensor_bytes
  for (unsigned i = threadIdx.x; i < 128; i += 64) out[i] = tile[swizzled ? i ^ (i >> 5 & 7) << 2 : i];
}
template <bool kFault>
__global__ void tensor_to_odd_address_kernel(const __grid_constant__ TensorMap map, float* out) {
  load_matrix(map, out, kFault ? 16 : 0, 512, {0, 0}, false);
}
TENSOR_MUTANT(tensor_to_odd_address, Swizzle::none)
template <bool kFault>
__global__ void wrong_rank_kernel(const __grid_constant__ TensorMap map, float* out) {
  if (kFault) load_matrix(map, out, 0, 512, {0, 0, 0}, false);
  else load_matrix(map, out, 0, 512, {0, 0}, false);
}
TENSOR_MUTANT(wrong_rank, Swizzle::none)
// Elements outside count too.
template <bool kFault>
__global__ void tensor_bytes_kernel(const __grid_constant__ TensorMap map, float* out) {
  load_matrix(map, out, 0, kFault ? 256 : 512, {16, 0}, false);
}
TENSOR_MUTANT(tensor_bytes, Swizzle::none)
template <bool kFault>
__global__ void forgotten_swizzle_kernel(const __grid_constant__ TensorMap map, float* out) {
  load_matrix(map, out, 0, 512, {0, 0}, !kFault);
}
TENSOR_MUTANT(forgotten_swizzle, Swizzle::bytes128)
