// Order between threads beyond __syncthreads: counted barriers, fences, acquire and release, polling, a barrier of the
// whole grid. Sections named are of the PTX ISA.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fused_ops {

// Whom an order is for: the block, its cluster, the device, everything ("Memory Consistency Model", "Scope").
enum class Scope : uint8_t { block, cluster, device, system };

namespace detail {

template <typename T>
constexpr bool kWord = std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <typename To, typename From>
__device__ inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  union {
    From from;
    To to;
  } both{from};
  return both.to;
}

}  // namespace detail

// "barrier{.cta}", bar.sync: waits until `threads` threads, a multiple of 32, have come to barrier `id` (1 to 15; 0 is
// __syncthreads), those of bar_arrive included. All lanes of a warp call it together.
__device__ inline void bar_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// "barrier{.cta}", bar.arrive: the same without waiting; what came before is known to those who wait.
__device__ inline void bar_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// "membar / fence", fence.acq_rel.
template <Scope scope>
__device__ inline void fence() {
  if constexpr (scope == Scope::block) asm volatile("fence.acq_rel.cta;" ::: "memory");
  if constexpr (scope == Scope::cluster) asm volatile("fence.acq_rel.cluster;" ::: "memory");
  if constexpr (scope == Scope::device) asm volatile("fence.acq_rel.gpu;" ::: "memory");
  if constexpr (scope == Scope::system) asm volatile("fence.acq_rel.sys;" ::: "memory");
}

// One asm per scope and width: both are spelled in the instruction.
#define FUSED_OPS_SCOPED(before, after, ...)                                                    \
  if constexpr (scope == Scope::block) asm volatile(before ".cta" after __VA_ARGS__);           \
  if constexpr (scope == Scope::cluster) asm volatile(before ".cluster" after __VA_ARGS__);     \
  if constexpr (scope == Scope::device) asm volatile(before ".gpu" after __VA_ARGS__);          \
  if constexpr (scope == Scope::system) asm volatile(before ".sys" after __VA_ARGS__)
#define FUSED_OPS_LOAD(name, instruction)                                                       \
  template <Scope scope, typename T>                                                            \
    requires detail::kWord<T>                                                                   \
  __device__ inline T name(const T* address) {                                                  \
    detail::Bits<T> value;                                                                      \
    if constexpr (sizeof(T) == 4) {                                                             \
      FUSED_OPS_SCOPED(instruction, ".b32 %0, [%1];", : "=r"(value) : "l"(address) : "memory"); \
    } else {                                                                                    \
      FUSED_OPS_SCOPED(instruction, ".b64 %0, [%1];", : "=l"(value) : "l"(address) : "memory"); \
    }                                                                                           \
    return detail::bits<T>(value);                                                              \
  }
#define FUSED_OPS_STORE(name, instruction)                                                                   \
  template <Scope scope, typename T>                                                                         \
    requires detail::kWord<T>                                                                                \
  __device__ inline void name(T* address, std::type_identity_t<T> value) {                                   \
    const auto stored = detail::bits<detail::Bits<T>>(value);                                                \
    if constexpr (sizeof(T) == 4) {                                                                          \
      FUSED_OPS_SCOPED(instruction, ".b32 [%0], %1;", ::"l"(address), "r"(stored) : "memory");               \
    } else {                                                                                                 \
      FUSED_OPS_SCOPED(instruction, ".b64 [%0], %1;", ::"l"(address), "l"(stored) : "memory");               \
    }                                                                                                        \
  }
#define FUSED_OPS_ADD(name, instruction)                                                                              \
  template <Scope scope, typename T>                                                                                  \
    requires(std::is_same_v<T, float> || (std::is_integral_v<T> && detail::kWord<T>))                                 \
  __device__ inline T name(T* address, std::type_identity_t<T> value) {                                               \
    if constexpr (std::is_same_v<T, float>) {                                                                         \
      float old;                                                                                                      \
      FUSED_OPS_SCOPED(instruction, ".add.f32 %0, [%1], %2;", : "=f"(old) : "l"(address), "f"(value) : "memory");     \
      return old;                                                                                                     \
    } else if constexpr (sizeof(T) == 4) {                                                                            \
      uint32_t old;                                                                                                   \
      FUSED_OPS_SCOPED(instruction, ".add.u32 %0, [%1], %2;", : "=r"(old) : "l"(address), "r"(value) : "memory");     \
      return static_cast<T>(old);                                                                                     \
    } else {                                                                                                          \
      uint64_t old;                                                                                                   \
      FUSED_OPS_SCOPED(instruction, ".add.u64 %0, [%1], %2;", : "=l"(old) : "l"(address), "l"(value) : "memory");     \
      return static_cast<T>(old);                                                                                     \
    }                                                                                                                 \
  }

// "ld": load_acquire<Scope::device>(address), of 4 or 8 bytes; what the thread that released the value did before is
// known after. load_relaxed orders nothing by itself.
FUSED_OPS_LOAD(load_acquire, "ld.acquire")
FUSED_OPS_LOAD(load_relaxed, "ld.relaxed")
// "st": store_release<Scope::device>(address, value).
FUSED_OPS_STORE(store_release, "st.release")
FUSED_OPS_STORE(store_relaxed, "st.relaxed")
// "atom": returns the old value; acquires and releases, or (relaxed) neither.
FUSED_OPS_ADD(atomic_add, "atom.acq_rel")
FUSED_OPS_ADD(atomic_add_relaxed, "atom.relaxed")

#undef FUSED_OPS_SCOPED
#undef FUSED_OPS_LOAD
#undef FUSED_OPS_STORE
#undef FUSED_OPS_ADD

// Waits until ready(), which must look by load_acquire. The only way to poll ("nanosleep" between two looks).
template <typename Ready>
__device__ inline void wait_until(Ready&& ready) {
  for (uint32_t pause = 8; !ready(); pause = pause < 256 ? 2 * pause : pause) __nanosleep(pause);
}

}  // namespace fused_ops

#include "common/grid_sync.cuh"
