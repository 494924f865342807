// The twin of csrc/common/async_copy.cuh. Sections named are of the PTX ISA. A copy is made as late as it may be: by the
// wait that covers it, of what the source holds by then; until then nobody may touch where it goes.
#pragma once

#include "emulation/runtime.h"

namespace fused_ops {

namespace emulation {

// async_copy.cpp
void start_copy(void* shared, const void* global, uint32_t bytes, uint32_t source_bytes, Where where);
void commit_copies();
void finish_copies(size_t but_groups, bool all, Where where);

}  // namespace emulation

// "cp.async".
template <int kBytes>
void cp_async(void* shared, const void* global, uint32_t source_bytes = kBytes,
              emulation::Where where = emulation::Where::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulation::start_copy(shared, global, kBytes, source_bytes, where);
}

// "cp.async.commit_group".
inline void cp_async_commit() { emulation::commit_copies(); }

// "cp.async.wait_group".
template <int kPending>
void cp_async_wait(emulation::Where where = emulation::Where::current()) {
  emulation::finish_copies(kPending, false, where);
}

// "cp.async.wait_all".
inline void cp_async_wait_all(emulation::Where where = emulation::Where::current()) {
  emulation::finish_copies(0, true, where);
}

}  // namespace fused_ops
