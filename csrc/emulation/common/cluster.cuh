// The twin of csrc/common/cluster.cuh. Sections named are of the PTX ISA. A pointer to another block's shared memory is
// a pointer like any other; the checker knows whose it is.
#pragma once

#include "emulation/runtime.h"

namespace fused_ops {

namespace emulation {

// cluster.cpp
void arrive_at_cluster(bool releases, Where where);
void wait_for_cluster(Where where);
void* remote_shared(const void* mine, uint32_t rank, Where where);

}  // namespace emulation

// "Special Registers: %cluster_ctarank, %cluster_nctarank".
uint32_t cluster_rank();
uint32_t cluster_size();

// "barrier.cluster".
inline void cluster_arrive(emulation::Where where = emulation::Where::current()) {
  emulation::arrive_at_cluster(true, where);
}
inline void cluster_arrive_relaxed(emulation::Where where = emulation::Where::current()) {
  emulation::arrive_at_cluster(false, where);
}
inline void cluster_wait(emulation::Where where = emulation::Where::current()) { emulation::wait_for_cluster(where); }
inline void cluster_sync(emulation::Where where = emulation::Where::current()) {
  cluster_arrive(where);
  cluster_wait(where);
}

// "mapa".
template <typename T>
T* remote(T* mine, uint32_t rank, emulation::Where where = emulation::Where::current()) {
  return static_cast<T*>(emulation::remote_shared(mine, rank, where));
}

}  // namespace fused_ops
