// Barriers in shared memory that count arrivals of threads and bytes of asynchronous copies, phase after phase: phase
// n, of parity n % 2, is complete when all its arrivals have come and no bytes are to come; phase n + 1 is then under
// way. Sections named are of the PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
// Emulated, uncalibrated: no GPU has confirmed this file's twin yet.
#pragma once

#include <cstdint>

#include "common/sync.cuh"

namespace fused_ops {

using Mbarrier = uint64_t;

namespace detail {

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ inline uint32_t cluster_address(const void* remote) {
  uint64_t address;
  asm("cvta.to.shared::cluster.u64 %0, %1;" : "=l"(address) : "l"(remote));
  return static_cast<uint32_t>(address);
}

}  // namespace detail

// "mbarrier.init": one thread, before all others; `count` arrivals complete a phase. Then that thread fences (below)
// and a barrier shows the mbarrier to the others. "mbarrier.inval": the memory may be used for other things.
__device__ inline void mbarrier_init(Mbarrier* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)), "r"(count) : "memory");
}
__device__ inline void mbarrier_inval(Mbarrier* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(detail::shared_address(barrier)) : "memory");
}

// "membar / fence", fence.mbarrier_init: the mbarriers this thread has made are ready for asynchronous copies and,
// after the cluster's next barrier (a relaxed arrival will do), for the cluster.
__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// "membar / fence", fence.proxy.async: what this thread has written becomes visible to asynchronous operations (bulk
// copies, wgmma) that come after in the order of memory. Each thread that writes fences, then comes to the barrier.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// "mbarrier.arrive": what this thread did before is known to whoever waits for the phase. Returns the phase's state.
__device__ inline uint64_t mbarrier_arrive(Mbarrier* barrier, uint32_t count = 1) {
  uint64_t state;
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 %0, [%1], %2;"
               : "=l"(state)
               : "r"(detail::shared_address(barrier)), "r"(count)
               : "memory");
  return state;
}

// "mbarrier.arrive", .expect_tx: first `bytes` more are to come, then it arrives.
__device__ inline uint64_t mbarrier_arrive_expect_tx(Mbarrier* barrier, uint32_t bytes) {
  uint64_t state;
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 %0, [%1], %2;"
               : "=l"(state)
               : "r"(detail::shared_address(barrier)), "r"(bytes)
               : "memory");
  return state;
}

// The same at `barrier` of another block (common/cluster.cuh, remote).
__device__ inline void mbarrier_arrive_remote(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(detail::cluster_address(barrier))
               : "memory");
}
__device__ inline void mbarrier_arrive_expect_tx_remote(Mbarrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(
                   detail::cluster_address(barrier)),
               "r"(bytes)
               : "memory");
}

// "mbarrier.expect_tx", "mbarrier.complete_tx": more or fewer bytes are to come.
__device__ inline void mbarrier_expect_tx(Mbarrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
__device__ inline void mbarrier_complete_tx(Mbarrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// One asm per scope, which is spelled in the instruction: an mbarrier is waited for by its block or for the cluster.
#define FUSED_OPS_MBARRIER_WAIT(instruction, constraint, operand)                                                  \
  static_assert(scope == Scope::block || scope == Scope::cluster);                                                 \
  uint32_t done;                                                                                                   \
  if constexpr (scope == Scope::block) {                                                                           \
    asm volatile("{\n.reg .pred p;\n" instruction                                                                   \
                 ".acquire.cta.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"                             \
                 : "=r"(done)                                                                                      \
                 : "r"(detail::shared_address(barrier)), constraint(operand)                                       \
                 : "memory");                                                                                      \
  } else {                                                                                                         \
    asm volatile("{\n.reg .pred p;\n" instruction                                                                   \
                 ".acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"                         \
                 : "=r"(done)                                                                                      \
                 : "r"(detail::shared_address(barrier)), constraint(operand)                                       \
                 : "memory");                                                                                      \
  }                                                                                                                \
  return done != 0

// "mbarrier.test_wait / mbarrier.try_wait": whether the phase of `state`, or the last one of parity `parity`, is
// complete; then what its arrivals (with Scope::cluster also those from other blocks) and copies did is known here.
// try_wait may take its time. A loop of them is mbarrier_wait.
template <Scope scope = Scope::block>
__device__ inline bool mbarrier_test_wait(Mbarrier* barrier, uint64_t state) {
  FUSED_OPS_MBARRIER_WAIT("mbarrier.test_wait", "l", state);
}
template <Scope scope = Scope::block>
__device__ inline bool mbarrier_test_wait_parity(Mbarrier* barrier, uint32_t parity) {
  FUSED_OPS_MBARRIER_WAIT("mbarrier.test_wait.parity", "r", parity);
}
template <Scope scope = Scope::block>
__device__ inline bool mbarrier_try_wait_parity(Mbarrier* barrier, uint32_t parity) {
  FUSED_OPS_MBARRIER_WAIT("mbarrier.try_wait.parity", "r", parity);
}
#undef FUSED_OPS_MBARRIER_WAIT

template <Scope scope = Scope::block>
__device__ inline void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
  while (!mbarrier_try_wait_parity<scope>(barrier, parity)) {
  }
}

}  // namespace fused_ops
