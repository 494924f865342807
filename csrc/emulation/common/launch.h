// The twin of csrc/common/launch.h: launches run here and now, on this OS thread.
#pragma once

#include <tuple>

#include "emulation/runtime.h"

namespace fused_ops {

namespace emulation {

template <typename... Parameters, typename... Arguments>
void launch_as(const Shape& shape, void (*kernel)(Parameters...), const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } const call{kernel, {static_cast<Parameters>(arguments)...}};
  const auto body = [](const void* call) {
    std::apply(static_cast<const Call*>(call)->kernel, static_cast<const Call*>(call)->arguments);
  };
  run(reinterpret_cast<const void*>(kernel), shape, body, &call, sizeof call);
}

}  // namespace emulation

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  emulation::launch_as({grid, block, cluster, shared_bytes, false}, kernel, arguments...);
}

// All blocks alive together: raises if the chip has not the place for them.
template <typename... Parameters, typename... Arguments>
void launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes,
                        cudaStream_t, const Arguments&... arguments) {
  emulation::launch_as({grid, block, cluster, shared_bytes, true}, kernel, arguments...);
}

inline int multiprocessors() { return emulation::chip.multiprocessors; }
inline int64_t shared_bytes_per_block() { return static_cast<int64_t>(emulation::chip.shared_per_block); }
inline int capability() { return emulation::chip.capability; }

template <typename... Parameters>
int64_t co_resident_blocks(void (*)(Parameters...), dim3 block, dim3 cluster, size_t shared_bytes) {
  return emulation::co_resident_blocks(block, cluster, shared_bytes);
}

}  // namespace fused_ops
