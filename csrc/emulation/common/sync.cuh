// The twin of csrc/common/sync.cuh. Sections named are of the PTX ISA.
#pragma once

#include <cstring>
#include <type_traits>

#include "emulation/builtins.h"

namespace fused_ops {

using emulation::Scope;

namespace emulation {

template <typename T>
constexpr bool kWord = std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

// sync.cpp
void counted_barrier(uint32_t id, uint32_t threads, bool wait, Where where);
void atomic_load(void* result, const void* address, size_t bytes, bool acquires, Scope scope, Where where);
void atomic_store(void* address, const void* value, size_t bytes, bool releases, Scope scope, Where where);
void atomic_change(void* address, size_t bytes, bool orders, Scope scope, Where where);

template <typename T>
FUSED_OPS_UNCHECKED T add(T* address, T value, bool orders, Scope scope, Where where) {
  atomic_change(address, sizeof(T), orders, scope, where);
  T old;
  std::memcpy(&old, address, sizeof(T));
  T sum;
  if constexpr (std::is_integral_v<T>) {
    sum = static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(value));
  } else {
    sum = old + value;
  }
  std::memcpy(address, &sum, sizeof(T));
  return old;
}

}  // namespace emulation

// "barrier{.cta}", bar.sync: all lanes of a warp come together, and the count is of threads in whole warps.
inline void bar_sync(uint32_t id, uint32_t threads, emulation::Where where = emulation::Where::current()) {
  emulation::counted_barrier(id, threads, true, where);
}

// "barrier{.cta}", bar.arrive.
inline void bar_arrive(uint32_t id, uint32_t threads, emulation::Where where = emulation::Where::current()) {
  emulation::counted_barrier(id, threads, false, where);
}

// "membar / fence", fence.acq_rel; what it orders: "Memory Consistency Model".
template <Scope scope>
inline void fence() {
  emulation::check::fence(scope);
}

// "ld", ld.acquire and ld.relaxed.
template <Scope scope, typename T>
  requires emulation::kWord<T>
FUSED_OPS_UNCHECKED T load_acquire(const T* address, emulation::Where where = emulation::Where::current()) {
  T value;
  emulation::atomic_load(&value, address, sizeof(T), true, scope, where);
  return value;
}
template <Scope scope, typename T>
  requires emulation::kWord<T>
FUSED_OPS_UNCHECKED T load_relaxed(const T* address, emulation::Where where = emulation::Where::current()) {
  T value;
  emulation::atomic_load(&value, address, sizeof(T), false, scope, where);
  return value;
}

// "st", st.release and st.relaxed.
template <Scope scope, typename T>
  requires emulation::kWord<T>
FUSED_OPS_UNCHECKED void store_release(T* address, std::type_identity_t<T> value,
                                       emulation::Where where = emulation::Where::current()) {
  emulation::atomic_store(address, &value, sizeof(T), true, scope, where);
}
template <Scope scope, typename T>
  requires emulation::kWord<T>
FUSED_OPS_UNCHECKED void store_relaxed(T* address, std::type_identity_t<T> value,
                                       emulation::Where where = emulation::Where::current()) {
  emulation::atomic_store(address, &value, sizeof(T), false, scope, where);
}

// "atom", atom.acq_rel.add and atom.relaxed.add.
template <Scope scope, typename T>
  requires(std::is_same_v<T, float> || (std::is_integral_v<T> && emulation::kWord<T>))
T atomic_add(T* address, std::type_identity_t<T> value, emulation::Where where = emulation::Where::current()) {
  return emulation::add(address, value, true, scope, where);
}
template <Scope scope, typename T>
  requires(std::is_same_v<T, float> || (std::is_integral_v<T> && emulation::kWord<T>))
T atomic_add_relaxed(T* address, std::type_identity_t<T> value, emulation::Where where = emulation::Where::current()) {
  return emulation::add(address, value, false, scope, where);
}

// Others run between two looks; when all that are left look in vain, the launch has hung.
template <typename Ready>
void wait_until(Ready&& ready, emulation::Where where = emulation::Where::current()) {
  emulation::poll_until("memory that another thread must write", ready, where);
}

}  // namespace fused_ops

#include "common/grid_sync.cuh"
