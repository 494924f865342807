// Copies from device memory to shared memory that run beside the thread that issues them. Sections named are of the
// PTX ISA, "Data Movement and Conversion Instructions: Non-bulk copy".
#pragma once

#include <cstdint>

namespace fused_ops {

// "cp.async": copies `kBytes` (4, 8 or 16; both addresses are multiples of it) from device to shared memory, the
// first `source_bytes` of them from `global`, the rest zeros. It is done when a wait of this thread has covered it.
// 16 bytes pass by the first-level cache.
template <int kBytes>
__device__ inline void cp_async(void* shared, const void* global, uint32_t source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const auto from = __cvta_generic_to_global(global);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(source_bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(source_bytes)
                 : "memory");
  }
}

// "cp.async.commit_group": this thread's copies since the last commit become a group, which may be empty.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// "cp.async.wait_group": all but the newest `kPending` groups of this thread are done. Other threads see them after a
// barrier.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// "cp.async.wait_all": every copy of this thread is done, committed or not.
__device__ inline void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace fused_ops
