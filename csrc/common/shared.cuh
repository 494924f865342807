// Shared memory: these are the only ways to declare it.
#pragma once

// SHARED(float, tile, 256): an array of the block, not initialised.
#define SHARED(T, name, N) __shared__ T name[N]

namespace fused_ops {

// The memory whose size the launch gives. It starts at a multiple of 1024 bytes, as swizzled bulk copies want it.
template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char fused_ops_dynamic_shared[];
  return reinterpret_cast<T*>(fused_ops_dynamic_shared);
}

}  // namespace fused_ops
