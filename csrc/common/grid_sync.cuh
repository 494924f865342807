// A barrier of all threads of a grid launched with launch_cooperative. No instruction of its own: the same here and in
// the emulator.
#pragma once

#include <cstdint>

#include "common/sync.cuh"

namespace fused_ops {

// `counter`, in device memory, is 0 before the first kernel that uses it and needs no reset after. The blocks together
// add 2^31 to it, so its highest bit flips when the last one has come. Accesses before are known to everybody after.
__device__ inline void grid_sync(uint32_t* counter) {
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    constexpr uint32_t kHighest = 1u << 31;
    const uint32_t blocks = gridDim.x * gridDim.y * gridDim.z;
    const bool first = blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0;
    const uint32_t before = atomic_add<Scope::device>(counter, first ? kHighest - (blocks - 1) : 1u);
    wait_until([&] { return ((before ^ load_acquire<Scope::device>(counter)) & kHighest) != 0; });
  }
  __syncthreads();
}

}  // namespace fused_ops
