// Faults of bulk and tensor copies.
#include "common/bulk_copy.cuh"
#include "common/cluster.cuh"
#include "kernels/mutants_b.h"

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
  if (threadIdx.x == 0 && cluster_rank() == 0) {
    bulk_load_multicast(tile, in, 128, full, kFault ? 7 : 3);  // multicast_to_absent_block
  }
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
__device__ void load_matrix(const TensorMap& map, float* out, int shift, unsigned bytes, const int (&at)[kRank],
                            bool swizzled) {
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
