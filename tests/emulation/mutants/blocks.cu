// Blocks that touch the same memory, wait for each other in vain, or have no room.
#include "common/sync.cuh"
#include "mutants/mutant.h"

KERNEL(two_writers) {
  const uint32_t i = (kFault ? 0 : blockIdx.x * 32) + threadIdx.x;
  out[i] = static_cast<float>(blockIdx.x);  // two_writers
}
MUTANT(two_writers, 2, 32, 0)

// Block 1 reads what block 0 wrote before it raised a flag.
template <bool kFault, typename Raise, typename Seen>
__device__ void hand_over(const float* in, float* out, Raise raise, Seen seen) {
  if (blockIdx.x == 0) {
    out[threadIdx.x] = in[threadIdx.x];  // narrow_release narrow_acquire narrow_fence missing_fence relaxed_poll
    __syncthreads();
    if (threadIdx.x == 0) raise();
  } else {
    if (threadIdx.x == 0) seen();
    __syncthreads();
    out[64 + threadIdx.x] = out[63 - threadIdx.x];  // narrow_release narrow_acquire narrow_fence missing_fence relaxed_poll
  }
}

KERNEL(narrow_release) {
  constexpr Scope scope = kFault ? Scope::block : Scope::device;
  hand_over<kFault>(in, out, [&] { store_release<scope>(words, 1); },
                    [&] { wait_until([&] { return load_acquire<Scope::device>(words) == 1; }); });
}
COOPERATIVE_MUTANT(narrow_release, 2, 64, 0)

KERNEL(narrow_acquire) {
  constexpr Scope scope = kFault ? Scope::cluster : Scope::device;
  hand_over<kFault>(in, out, [&] { store_release<Scope::device>(words, 1); },
                    [&] { wait_until([&] { return load_acquire<scope>(words) == 1; }); });
}
COOPERATIVE_MUTANT(narrow_acquire, 2, 64, 0)

KERNEL(narrow_fence) {
  constexpr Scope scope = kFault ? Scope::block : Scope::device;
  hand_over<kFault>(in, out,
                    [&] {
                      fence<scope>();
                      atomic_add_relaxed<Scope::device>(words, 1);
                    },
                    [&] { wait_until([&] { return load_acquire<Scope::device>(words) == 1; }); });
}
COOPERATIVE_MUTANT(narrow_fence, 2, 64, 0)

KERNEL(missing_fence) {
  hand_over<kFault>(in, out,
                    [&] {
                      if (!kFault) __threadfence();
                      atomicAdd(words, 1u);
                    },
                    [&] { wait_until([&] { return load_acquire<Scope::device>(words) == 1; }); });
}
COOPERATIVE_MUTANT(missing_fence, 2, 64, 0)

KERNEL(relaxed_poll) {
  hand_over<kFault>(in, out, [&] { store_release<Scope::device>(words, 1); },
                    [&] {
                      wait_until([&] {
                        return (kFault ? load_relaxed<Scope::device>(words) : load_acquire<Scope::device>(words)) == 1;
                      });
                    });
}
COOPERATIVE_MUTANT(relaxed_poll, 2, 64, 0)

KERNEL(plain_flag) {
  if (blockIdx.x == 0) {
    if (threadIdx.x > 0) return;
    if (kFault) *words = 1;  // plain_flag
    else store_release<Scope::device>(words, 1);
  } else if (threadIdx.x == 0) {
    wait_until([&] { return load_acquire<Scope::device>(words) == 1; });  // plain_flag
    out[0] = 1;
  }
}
COOPERATIVE_MUTANT(plain_flag, 2, 64, 0)

KERNEL(endless_poll) {
  if (threadIdx.x == 0 && !kFault) store_release<Scope::device>(words, 1);
  wait_until([&] { return load_acquire<Scope::device>(words) == 1; });  // endless_poll
  out[threadIdx.x] = 1;
}
MUTANT(endless_poll, 1, 64, 0)

// A loop of its own, in which nobody else runs.
KERNEL(endless_spin) {
  if (threadIdx.x == 0) store_release<Scope::device>(words, 1);
  if (kFault && threadIdx.x == 63) while (load_acquire<Scope::device>(words) != 2) {}  // endless_spin
  out[threadIdx.x] = 1;
}
MUTANT(endless_spin, 1, 64, 0)

KERNEL(missing_grid_barrier) {
  const uint32_t i = blockIdx.x * 32 + threadIdx.x;
  out[i] = in[i];  // missing_grid_barrier
  if (kFault) __syncthreads();
  else grid_sync(words);
  if (out[127 - i] < -1e9f) words[1] = 1;  // missing_grid_barrier
}
COOPERATIVE_MUTANT(missing_grid_barrier, 4, 32, 0)

KERNEL(missing_block) {
  if (kFault && blockIdx.x == 2) return;
  grid_sync(words);
  out[blockIdx.x * 32 + threadIdx.x] = 1;
}
COOPERATIVE_MUTANT(missing_block, 4, 32, 0)

// An H100 has 132 multiprocessors, each with room for two of these.
KERNEL(one_block_too_many) {
  grid_sync(words);
  if (threadIdx.x == 0 && blockIdx.x == 0) out[0] = 1;
}
COOPERATIVE_MUTANT(one_block_too_many, fault ? 265 : 264, 32, 100 * 1024)

KERNEL(one_block_too_many_static) {
  SHARED(uint16_t, numbers, 50 * 1024);  // one_block_too_many_static
  numbers[threadIdx.x] = 1;
  if (threadIdx.x == 0 && blockIdx.x == 0) out[0] = numbers[0];
}
COOPERATIVE_MUTANT(one_block_too_many_static, fault ? 265 : 264, 32, 0)
