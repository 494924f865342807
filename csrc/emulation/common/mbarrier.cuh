// The twin of csrc/common/mbarrier.cuh. Sections named are of the PTX ISA.
#pragma once

#include "common/sync.cuh"
#include "emulation/runtime.h"

namespace fused_ops {

using Mbarrier = uint64_t;

namespace emulation {

// mbarrier.cpp
void make_mbarrier(Mbarrier* barrier, uint32_t count, Where where);
void drop_mbarrier(Mbarrier* barrier, Where where);
// Returns the phase it arrived in.
uint64_t arrive_at_mbarrier(Mbarrier* barrier, uint32_t count, int64_t bytes, bool remote, Where where);
void change_bytes(Mbarrier* barrier, int64_t bytes, Where where);
bool phase_is_complete(Mbarrier* barrier, uint64_t phase, bool parity_only, Scope scope, Where where);
void wait_for_parity(Mbarrier* barrier, uint32_t parity, Scope scope, Where where);
void fence_mbarriers(bool for_cluster);
void fence_async_proxy();

}  // namespace emulation

// "mbarrier.init", "mbarrier.inval".
inline void mbarrier_init(Mbarrier* barrier, uint32_t count, emulation::Where where = emulation::Where::current()) {
  emulation::make_mbarrier(barrier, count, where);
}
inline void mbarrier_inval(Mbarrier* barrier, emulation::Where where = emulation::Where::current()) {
  emulation::drop_mbarrier(barrier, where);
}

// "membar / fence", fence.mbarrier_init and fence.proxy.async.
inline void fence_mbarrier_init() { emulation::fence_mbarriers(true); }
inline void fence_proxy_async() { emulation::fence_async_proxy(); }

// "mbarrier.arrive", "mbarrier.expect_tx", "mbarrier.complete_tx".
inline uint64_t mbarrier_arrive(Mbarrier* barrier, uint32_t count = 1,
                                emulation::Where where = emulation::Where::current()) {
  return emulation::arrive_at_mbarrier(barrier, count, 0, false, where);
}
inline uint64_t mbarrier_arrive_expect_tx(Mbarrier* barrier, uint32_t bytes,
                                          emulation::Where where = emulation::Where::current()) {
  return emulation::arrive_at_mbarrier(barrier, 1, bytes, false, where);
}
inline void mbarrier_arrive_remote(Mbarrier* barrier, emulation::Where where = emulation::Where::current()) {
  emulation::arrive_at_mbarrier(barrier, 1, 0, true, where);
}
inline void mbarrier_arrive_expect_tx_remote(Mbarrier* barrier, uint32_t bytes,
                                             emulation::Where where = emulation::Where::current()) {
  emulation::arrive_at_mbarrier(barrier, 1, bytes, true, where);
}
inline void mbarrier_expect_tx(Mbarrier* barrier, uint32_t bytes,
                               emulation::Where where = emulation::Where::current()) {
  emulation::change_bytes(barrier, bytes, where);
}
inline void mbarrier_complete_tx(Mbarrier* barrier, uint32_t bytes,
                                 emulation::Where where = emulation::Where::current()) {
  emulation::change_bytes(barrier, -int64_t{bytes}, where);
}

// "mbarrier.test_wait / mbarrier.try_wait".
template <Scope scope = Scope::block>
bool mbarrier_test_wait(Mbarrier* barrier, uint64_t state, emulation::Where where = emulation::Where::current()) {
  return emulation::phase_is_complete(barrier, state, false, scope, where);
}
template <Scope scope = Scope::block>
bool mbarrier_test_wait_parity(Mbarrier* barrier, uint32_t parity,
                               emulation::Where where = emulation::Where::current()) {
  return emulation::phase_is_complete(barrier, parity, true, scope, where);
}
template <Scope scope = Scope::block>
bool mbarrier_try_wait_parity(Mbarrier* barrier, uint32_t parity,
                              emulation::Where where = emulation::Where::current()) {
  return emulation::phase_is_complete(barrier, parity, true, scope, where);
}
template <Scope scope = Scope::block>
void mbarrier_wait(Mbarrier* barrier, uint32_t parity, emulation::Where where = emulation::Where::current()) {
  emulation::wait_for_parity(barrier, parity, scope, where);
}

}  // namespace fused_ops
