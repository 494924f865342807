// Barriers that are missing, meet the wrong threads, or are waited for in vain.
#include "common/sync.cuh"
#include "mutants/mutant.h"

KERNEL(missing_barrier) {
  SHARED(float, tile, 64);
  tile[threadIdx.x] = 0;
  __syncthreads();
  tile[threadIdx.x] = in[threadIdx.x];  // missing_barrier
  if (!kFault) __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];  // missing_barrier
}
MUTANT(missing_barrier, 1, 64, 0)

// Between the reads of one turn and the writes of the next.
KERNEL(missing_second_barrier) {
  SHARED(float, tile, 64);
  float value = in[threadIdx.x];
  for (int turn = 0; turn < 3; ++turn) {
    tile[threadIdx.x] = value;  // missing_second_barrier
    __syncthreads();
    value = tile[63 - threadIdx.x];  // missing_second_barrier
    if (!kFault) __syncthreads();
  }
  out[threadIdx.x] = value;
}
MUTANT(missing_second_barrier, 1, 64, 0)

// The order of these two is right in all but few schedules: thread 0 works long, thread 63 waits twice.
KERNEL(rare_race) {
  SHARED(float, word, 1);
  if (threadIdx.x == 0) word[0] = in[0];  // rare_race
  if (!kFault) __syncthreads();
  if (threadIdx.x >= 32) {
    for (int i = 0; i < 200; ++i) __syncwarp();
  }
  if (threadIdx.x == 63) out[0] = word[0];  // rare_race
}
MUTANT(rare_race, 1, 64, 0)

KERNEL(missing_warp_barrier) {
  SHARED(float, tile, 32);
  tile[threadIdx.x] = 0;
  __syncwarp();
  tile[threadIdx.x] = in[threadIdx.x];  // missing_warp_barrier
  if (!kFault) __syncwarp();
  out[threadIdx.x] = tile[31 - threadIdx.x];  // missing_warp_barrier
}
MUTANT(missing_warp_barrier, 1, 32, 0)

// All lanes have come to the shuffle, but it orders no memory.
KERNEL(shuffle_for_barrier) {
  SHARED(float, tile, 32);
  tile[threadIdx.x] = 0;
  __syncwarp();
  tile[threadIdx.x] = in[threadIdx.x];  // shuffle_for_barrier
  const float sum = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
  if (!kFault) __syncwarp();
  out[threadIdx.x] = sum + tile[31 - threadIdx.x];  // shuffle_for_barrier
}
MUTANT(shuffle_for_barrier, 1, 32, 0)

KERNEL(barrier_after_exit) {
  if (kFault && threadIdx.x == 63) return;
  __syncthreads();  // barrier_after_exit
  out[threadIdx.x] = 1;
}
MUTANT(barrier_after_exit, 1, 64, 0)

KERNEL(warp_against_block) {
  if (kFault && threadIdx.x % 32 < 7) __syncwarp();  // warp_against_block
  else __syncthreads();  // warp_against_block
  out[threadIdx.x] = 1;
}
MUTANT(warp_against_block, 1, 64, 0)

KERNEL(wrong_count) {
  bar_sync(1, kFault && threadIdx.x >= 32 ? 96 : 64);  // wrong_count
  out[threadIdx.x] = 1;
}
MUTANT(wrong_count, 1, 128, 0)

KERNEL(odd_count) {
  bar_sync(1, kFault ? 40 : 64);  // odd_count
  out[threadIdx.x] = 1;
}
MUTANT(odd_count, 1, 64, 0)

KERNEL(wrong_barrier) {
  bar_sync(kFault && threadIdx.x >= 32 ? 2 : 1, 64);  // wrong_barrier
  out[threadIdx.x] = 1;
}
MUTANT(wrong_barrier, 1, 64, 0)

KERNEL(split_warp) {
  if (kFault && threadIdx.x < 16) bar_sync(2, 64);  // split_warp
  else bar_sync(1, 64);  // split_warp
  out[threadIdx.x] = 1;
}
MUTANT(split_warp, 1, 64, 0)

// The producer overtakes the consumer by a whole turn.
KERNEL(second_arrival) {
  if (threadIdx.x < 32) {
    bar_arrive(1, 64);
    if (!kFault) bar_sync(2, 64);
    bar_arrive(1, 64);  // second_arrival
  } else {
    if (kFault) while (words[0] == 0) __nanosleep(100);
    bar_sync(1, 64);
    bar_sync(2, 64);
    bar_sync(1, 64);
  }
  out[threadIdx.x] = 1;
}
MUTANT(second_arrival, 1, 64, 0)

// Whoever only arrives has not seen what the others did.
KERNEL(arrival_for_wait) {
  SHARED(float, tile, 32);
  const uint32_t lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    tile[lane] = in[lane];
    bar_arrive(1, 64);
    if (!kFault) bar_sync(2, 64);
    tile[lane] = 0;  // arrival_for_wait
  } else {
    bar_sync(1, 64);
    out[lane] = tile[lane];  // arrival_for_wait
    if (!kFault) bar_arrive(2, 64);
  }
}
MUTANT(arrival_for_wait, 1, 64, 0)
