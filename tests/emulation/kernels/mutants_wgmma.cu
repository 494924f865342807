// Faults of wgmma and setmaxnreg.
#include "common/bulk_copy.cuh"
#include "common/wgmma.cuh"
#include "mutants/mutant.h"

// A (64 x 16) and B (8 x 16) without swizzle: bricks of 8 rows by 16 bytes, those along K first.
constexpr unsigned kLeading = 128, kStride = 256;
constexpr unsigned kBytes = (64 + 8) * 32;

__device__ inline void fill(const float* in, int n) {
  auto* tile = dynamic_shared<__nv_bfloat16>();
  for (unsigned i = threadIdx.x; i < 72 * 16; i += 128) {
    const float value = in[i % static_cast<unsigned>(n)] - 60;
    tile[i] = __float2bfloat16(value);  // unfenced_operand unordered_operand
  }
}
__device__ inline uint64_t operand_a(unsigned shift = 0) {
  return wgmma_descriptor(dynamic_shared<char>() + shift, kLeading, kStride, Swizzle::none);
}
__device__ inline uint64_t operand_b() {
  return wgmma_descriptor(dynamic_shared<char>() + 2048, kLeading, kStride, Swizzle::none);
}

__device__ inline void prepare(const float* in, int n) {
  if (threadIdx.x < 128) fill(in, n);
  fence_proxy_async();
  __syncthreads();
}
__device__ inline void finish(const float (&d)[4], float* out) {
  out[threadIdx.x] = d[0] + 2 * d[1] + 3 * d[2] + 4 * d[3];  // read_before_wait not_committed waits_for_too_few
}

KERNEL(read_before_wait) {
  prepare(in, n);
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);  // read_before_wait
  wgmma_commit();
  if (!kFault) wgmma_wait<0>();
  finish(d, out);
  if (kFault) wgmma_wait<0>();
}
MUTANT(read_before_wait, 1, 128, kBytes)

KERNEL(not_committed) {
  prepare(in, n);
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);  // not_committed
  if (!kFault) wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(not_committed, 1, 128, kBytes)

KERNEL(waits_for_too_few) {
  prepare(in, n);
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);  // waits_for_too_few
  wgmma_commit();
  wgmma_wait<kFault ? 1 : 0>();
  finish(d, out);
}
MUTANT(waits_for_too_few, 1, 128, kBytes)

KERNEL(scaled_before_wait) {
  prepare(in, n);
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);  // scaled_before_wait
  wgmma_commit();
  if (!kFault) wgmma_wait<0>();
  d[1] = 3;  // scaled_before_wait
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(scaled_before_wait, 1, 128, kBytes)

KERNEL(no_register_fence) {
  prepare(in, n);
  float d[4];
  if (!kFault) wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);  // no_register_fence
  wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(no_register_fence, 1, 128, kBytes)

KERNEL(changed_after_fence) {
  prepare(in, n);
  float d[4];
  wgmma_fence();
  for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(i);  // changed_after_fence
  if (!kFault) wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), true);  // changed_after_fence
  wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(changed_after_fence, 1, 128, kBytes)

KERNEL(changed_between_products) {
  prepare(in, n);
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 4; ++i) d[i] *= 2;  // changed_between_products
  if (!kFault) wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), true);  // changed_between_products
  wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(changed_between_products, 1, 128, kBytes)

KERNEL(changed_fragments) {
  prepare(in, n);
  float d[4];
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = 0x3f803f80u;
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, a, operand_b(), false);  // changed_fragments
  wgmma_commit();
  if (!kFault) wgmma_wait<0>();
  a[threadIdx.x % 4] = 0;  // changed_fragments
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(changed_fragments, 1, 128, kBytes)

KERNEL(unfenced_operand) {
  fill(in, n);
  if (!kFault) fence_proxy_async();
  __syncthreads();
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);  // unfenced_operand
  wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(unfenced_operand, 1, 128, kBytes)

KERNEL(unordered_operand) {
  fill(in, n);
  fence_proxy_async();
  if (!kFault) __syncthreads();
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);  // unordered_operand
  wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(unordered_operand, 1, 128, kBytes)

KERNEL(operand_overwritten) {
  prepare(in, n);
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);  // operand_overwritten
  wgmma_commit();
  if (!kFault) wgmma_wait<0>();
  __syncthreads();
  dynamic_shared<__nv_bfloat16>()[threadIdx.x] = __float2bfloat16(0);  // operand_overwritten
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(operand_overwritten, 1, 128, kBytes)

// A warp that has waited for its own part does not speak for the others, whose rows of A are overwritten.
KERNEL(one_warp_speaks_for_all) {
  SHARED(Mbarrier, empty, 1);
  SHARED(Mbarrier, full, 1);
  if (threadIdx.x == 0) mbarrier_init(empty, kFault ? 1 : 4), mbarrier_init(full, 1), fence_mbarrier_init();
  prepare(in, n);
  if (threadIdx.x >= 128) {
    if (threadIdx.x > 128) return;
    mbarrier_wait(empty, 0);
    mbarrier_arrive_expect_tx(full, 512);
    bulk_load(dynamic_shared<char>() + 512, in, 512, full);  // one_warp_speaks_for_all
    return mbarrier_wait(full, 0);
  }
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);  // one_warp_speaks_for_all
  wgmma_commit();
  if (kFault && threadIdx.x < 32) __nanosleep(100);
  wgmma_wait<0>();
  if (threadIdx.x % 32 == 0 && (!kFault || threadIdx.x == 0)) mbarrier_arrive(empty);
  finish(d, out);
}
MUTANT(one_warp_speaks_for_all, 1, 160, kBytes)

KERNEL(stage_released_too_early) {
  SHARED(Mbarrier, empty, 1);
  SHARED(Mbarrier, full, 1);
  if (threadIdx.x == 0) mbarrier_init(empty, 128), mbarrier_init(full, 1), fence_mbarrier_init();
  prepare(in, n);
  if (threadIdx.x >= 128) {
    if (threadIdx.x > 128) return;
    mbarrier_wait(empty, 0);
    mbarrier_arrive_expect_tx(full, 512);
    bulk_load(dynamic_shared<char>(), in, 512, full);  // stage_released_too_early
    return mbarrier_wait(full, 0);
  }
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);  // stage_released_too_early
  wgmma_commit();
  if (kFault) mbarrier_arrive(empty), bar_sync(1, 128), mbarrier_wait(full, 0);
  wgmma_wait<0>();
  if (!kFault) mbarrier_arrive(empty);
  finish(d, out);
}
MUTANT(stage_released_too_early, 1, 160, kBytes)

KERNEL(operand_past_the_end) {
  prepare(in, n);
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(kFault ? 512 : 0), operand_b(), false);  // operand_past_the_end
  wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(operand_past_the_end, 1, 128, kBytes)

// The start of rows 1 to 64 of a swizzled tile: its pattern starts a row before.
KERNEL(between_patterns) {
  auto* tile = dynamic_shared<__nv_bfloat16>();
  for (unsigned i = threadIdx.x; i < 80 * 64; i += 128) tile[i] = __float2bfloat16(1);
  fence_proxy_async();
  __syncthreads();
  float d[4];
  wgmma_fence();
  const uint64_t a = wgmma_descriptor(tile + (kFault ? 64 : 16), 16, 1024, Swizzle::bytes128);
  wgmma<__nv_bfloat16>(d, a, wgmma_descriptor(tile, 16, 1024, Swizzle::bytes128), false);  // between_patterns
  wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(between_patterns, 1, 128, 80 * 128)

KERNEL(odd_stride) {
  prepare(in, n);
  float d[4];
  constexpr unsigned stride = kFault ? kStride + 8 : kStride;
  const uint64_t a = wgmma_descriptor(dynamic_shared<char>(), kLeading, stride, Swizzle::none);  // odd_stride
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, a, operand_b(), false);
  wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(odd_stride, 1, 128, kBytes)

// Leading and stride offset mixed up, a swizzle that the tile has not: other numbers.
KERNEL(wrong_strides) {
  prepare(in, n);
  float d[4];
  const uint64_t a =
      wgmma_descriptor(dynamic_shared<char>(), kFault ? kStride : kLeading, kFault ? kLeading : kStride, Swizzle::none);
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, a, operand_b(), false);
  wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(wrong_strides, 1, 128, kBytes)
KERNEL(wrong_swizzle) {
  prepare(in, n);
  float d[4];
  const uint64_t a =
      wgmma_descriptor(dynamic_shared<char>(), kLeading, kStride, kFault ? Swizzle::bytes32 : Swizzle::none);
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, a, operand_b(), false);
  wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(wrong_swizzle, 1, 128, kBytes)

KERNEL(three_warps) {
  prepare(in, n);
  if (kFault && threadIdx.x >= 96) return;
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);  // three_warps
  wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(three_warps, 1, 128, kBytes)

KERNEL(split_warp) {
  prepare(in, n);
  float d[4];
  wgmma_fence();
  if (kFault && threadIdx.x == 40) return;
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);
  wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(split_warp, 1, 128, kBytes)

KERNEL(different_products) {
  prepare(in, n);
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(kFault && threadIdx.x >= 64 ? 256 : 0), operand_b(), false);  // different_products
  wgmma_commit();
  wgmma_wait<0>();
  finish(d, out);
}
MUTANT(different_products, 1, 128, kBytes)

KERNEL(small_block) {
  if (kFault) {
    wgmma_fence();  // small_block
  }
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(small_block, 1, 96, kBytes)

KERNEL(exit_before_product) {
  prepare(in, n);
  float d[4];
  wgmma_fence();
  wgmma<__nv_bfloat16>(d, operand_a(), operand_b(), false);  // exit_before_product
  wgmma_commit();
  if (!kFault) wgmma_wait<0>();
  out[threadIdx.x] = 1;
}
MUTANT(exit_before_product, 1, 128, kBytes)

// Registers: 384 threads start with 168 each.

KERNEL(too_few_registers) {
  if (threadIdx.x < 128) release_registers<kFault ? 40 : 24>();
  else request_registers<240>();  // too_few_registers
  if (threadIdx.x < 64) out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(too_few_registers, 1, 384, 0)

KERNEL(releases_more) {
  if (threadIdx.x < 128) release_registers<kFault ? 176 : 168>();  // releases_more
  if (threadIdx.x < 64) out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(releases_more, 1, 384, 0)

KERNEL(requests_less) {
  if (threadIdx.x < 128) release_registers<40>();
  else request_registers<kFault ? 160 : 168>();  // requests_less
  if (threadIdx.x < 64) out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(requests_less, 1, 384, 0)

KERNEL(one_warp_releases) {
  if (threadIdx.x < (kFault ? 32 : 128)) release_registers<24>();
  else if (threadIdx.x >= 128) request_registers<240>();  // one_warp_releases
  if (threadIdx.x < 64) out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(one_warp_releases, 1, 384, 0)
