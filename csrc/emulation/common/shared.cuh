// The twin of csrc/common/shared.cuh: shared memory is the block's arena, of exactly the size asked for.
#pragma once

#include "emulation/runtime.h"

// The address of a static variable, one for each instance of a kernel template, tells declarations apart.
#define SHARED(T, name, N)                                                                                         \
  static char name##_declaration;                                                                                  \
  T(&name)[N] = *static_cast<T(*)[N]>(::fused_ops::emulation::static_shared(                                       \
      &name##_declaration, sizeof(T) * (N), alignof(T), ::fused_ops::emulation::Where::current()))

namespace fused_ops {

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::dynamic_shared_memory());
}

}  // namespace fused_ops
