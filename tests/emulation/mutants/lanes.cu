// Collectives of a warp that lanes miss, enter differently or leave early.
#include "mutants/mutant.h"

constexpr unsigned kAll = 0xffffffffu;

KERNEL(divergent_shuffle) {
  float value = in[threadIdx.x];
  if (!kFault || threadIdx.x < 16) value += __shfl_xor_sync(kAll, value, 1);  // divergent_shuffle
  out[threadIdx.x] = value;
}
MUTANT(divergent_shuffle, 1, 32, 0)

KERNEL(overlapping_masks) {
  const bool low = threadIdx.x < 16;
  const unsigned mask = low ? (kFault ? 0x1ffffu : 0xffffu) : 0xffff0000u;
  out[threadIdx.x] = __shfl_xor_sync(mask, in[threadIdx.x], 1);  // overlapping_masks
}
MUTANT(overlapping_masks, 1, 32, 0)

KERNEL(outside_the_mask) {
  const unsigned mask = kFault ? 0x7fffffffu : kAll;
  out[threadIdx.x] = __shfl_xor_sync(mask, in[threadIdx.x], 1);  // outside_the_mask
}
MUTANT(outside_the_mask, 1, 32, 0)

KERNEL(source_outside_the_mask) {
  const unsigned mask = kFault ? 0xffffu : kAll;
  if (!kFault || threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(mask, in[threadIdx.x], 20);  // source_outside_the_mask
}
MUTANT(source_outside_the_mask, 1, 32, 0)

KERNEL(shuffle_after_exit) {
  if (kFault && threadIdx.x >= 24) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, in[threadIdx.x], 1);  // shuffle_after_exit
}
MUTANT(shuffle_after_exit, 1, 32, 0)

KERNEL(different_collectives) {
  if (kFault && threadIdx.x % 2 == 1) out[threadIdx.x] = __shfl_down_sync(kAll, in[threadIdx.x], 1);  // different_collectives
  else out[threadIdx.x] = __shfl_xor_sync(kAll, in[threadIdx.x], 1);  // different_collectives
}
MUTANT(different_collectives, 1, 32, 0)

KERNEL(mask_of_absent_lanes) {
  const unsigned mask = kFault ? kAll : 0xffu;
  if (threadIdx.x >= 32) out[threadIdx.x] = __shfl_xor_sync(mask, in[threadIdx.x], 1);  // mask_of_absent_lanes
}
MUTANT(mask_of_absent_lanes, 1, 40, 0)
