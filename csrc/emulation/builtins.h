// Included before everything else when a .cu is compiled for the emulator: CUDA's qualifiers mean nothing, its headers
// see a host compiler, and its built-ins are the emulator's. CUDA C++ Programming Guide, "C++ Language Extensions".
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __maxnreg__(...)

#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "emulation/runtime.h"

// Host helpers of CUDA's headers keep __shared__ out of our way only if it stays undefined: lint refuses it in kernels.

#define FUSED_OPS_UNCHECKED __attribute__((no_sanitize("thread", "undefined")))

constexpr int warpSize = 32;

namespace fused_ops::emulation {

using check::Kind;

void sync_threads(Where where);
// How many threads of the block, all of which come, bring true.
int sync_threads_count(bool mine, Where where);
void sync_warp(unsigned mask, Where where);
unsigned active_mask();
uint64_t ticks();

// One read-modify-write of memory, by a function of the old value. All threads share an OS thread, so it is atomic.
template <typename T, typename Change>
FUSED_OPS_UNCHECKED T change_atomically(T* address, Change change, Scope scope, Where where) {
  check::atomic(address, sizeof(T), true, true, false, false, scope, where);
  T old;
  std::memcpy(&old, address, sizeof(T));
  const T changed = change(old);
  std::memcpy(address, &changed, sizeof(T));
  made_progress();
  return old;
}

// A lane's value and where it gets its result from.
template <typename T>
struct Shuffled {
  T value;
  int from;
  T result;
};

template <typename T>
FUSED_OPS_UNCHECKED T shuffle(const char* kind, unsigned mask, T value, int from, Where where) {
  Shuffled<T> mine{value, from, value};
  collective(kind, mask, mine, [&](Lanes<Shuffled<T>>& lanes) FUSED_OPS_UNCHECKED {
    for (auto* lane : lanes) {
      if (lane == nullptr || lane->from < 0) continue;
      if (lanes[static_cast<size_t>(lane->from)] == nullptr) {
        fail(std::string(kind) + " from lane " + std::to_string(lane->from) + ", which the mask leaves out", where);
      }
      lane->result = lanes[static_cast<size_t>(lane->from)]->value;
    }
  }, where);
  return mine.result;
}

// The lane `from` of this lane's segment of `width`; -1 (keep the own value) where it would leave the segment.
inline int segment(int width) { return static_cast<int>(this_lane()) & ~(width - 1); }

template <typename T, typename Join>
FUSED_OPS_UNCHECKED T reduce(const char* kind, unsigned mask, T value, Join join, Where where) {
  collective(kind, mask, value, [&](Lanes<T>& lanes) FUSED_OPS_UNCHECKED {
    T all{};
    bool first = true;
    for (T* lane : lanes) if (lane != nullptr) all = first ? *lane : join(all, *lane), first = false;
    for (T* lane : lanes) if (lane != nullptr) *lane = all;
  }, where);
  return value;
}

}  // namespace fused_ops::emulation

// Barriers. Sections "Synchronization Functions" and "Memory Fence Functions".
inline void __syncthreads(fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  fused_ops::emulation::sync_threads(where);
}
inline int __syncthreads_count(int value, fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  return fused_ops::emulation::sync_threads_count(value != 0, where);
}
inline int __syncthreads_or(int value, fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  return fused_ops::emulation::sync_threads_count(value != 0, where) > 0;
}
inline int __syncthreads_and(int value, fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  return fused_ops::emulation::sync_threads_count(value == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  fused_ops::emulation::sync_warp(mask, where);
}
inline void __threadfence_block() { fused_ops::emulation::check::fence(fused_ops::emulation::Scope::block); }
inline void __threadfence() { fused_ops::emulation::check::fence(fused_ops::emulation::Scope::device); }
inline void __threadfence_system() { fused_ops::emulation::check::fence(fused_ops::emulation::Scope::system); }

// Section "Warp Shuffle Functions".
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  return fused_ops::emulation::shuffle("__shfl_sync", mask, value,
                                       fused_ops::emulation::segment(width) + (lane & (width - 1)), where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  const int lane = static_cast<int>(fused_ops::emulation::this_lane());
  const int from = lane ^ lanes;
  return fused_ops::emulation::shuffle("__shfl_xor_sync", mask, value,
                                       from < fused_ops::emulation::segment(width) + width ? from : -1, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  const int from = static_cast<int>(fused_ops::emulation::this_lane()) - static_cast<int>(delta);
  return fused_ops::emulation::shuffle("__shfl_up_sync", mask, value,
                                       from >= fused_ops::emulation::segment(width) ? from : -1, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  const int from = static_cast<int>(fused_ops::emulation::this_lane() + delta);
  return fused_ops::emulation::shuffle("__shfl_down_sync", mask, value,
                                       from < fused_ops::emulation::segment(width) + width ? from : -1, where);
}

// Sections "Warp Vote Functions", "Warp Match Functions" and "Warp Reduce Functions".
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  const unsigned bit = predicate != 0 ? 1u << fused_ops::emulation::this_lane() : 0u;
  return fused_ops::emulation::reduce("__ballot_sync", mask, bit, [](unsigned a, unsigned b) { return a | b; }, where);
}
inline int __any_sync(unsigned mask, int predicate,
                      fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  return fused_ops::emulation::reduce("__any_sync", mask, predicate != 0, [](bool a, bool b) { return a || b; }, where);
}
inline int __all_sync(unsigned mask, int predicate,
                      fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  return fused_ops::emulation::reduce("__all_sync", mask, predicate != 0, [](bool a, bool b) { return a && b; }, where);
}
inline unsigned __activemask() { return fused_ops::emulation::active_mask(); }
template <typename T>
unsigned __match_any_sync(unsigned mask, T value,
                          fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  struct Matched {
    T value;
    unsigned same;
  } mine{value, 0};
  fused_ops::emulation::collective("__match_any_sync", mask, mine, [](fused_ops::emulation::Lanes<Matched>& lanes) {
    for (auto* lane : lanes) {
      for (size_t i = 0; lane != nullptr && i < 32; ++i) {
        if (lanes[i] != nullptr && lanes[i]->value == lane->value) lane->same |= 1u << i;
      }
    }
  }, where);
  return mine.same;
}

#define FUSED_OPS_REDUCE(name, types, expression)                                                                   \
  template <typename T> requires types                                                                              \
  T name(unsigned mask, T value, fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {      \
    return fused_ops::emulation::reduce(#name, mask, value, [](T a, T b) -> T { return expression; }, where);       \
  }
#define FUSED_OPS_INTEGERS (std::is_same_v<T, int> || std::is_same_v<T, unsigned>)
FUSED_OPS_REDUCE(__reduce_add_sync, FUSED_OPS_INTEGERS, static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
FUSED_OPS_REDUCE(__reduce_min_sync, FUSED_OPS_INTEGERS, std::min(a, b))
FUSED_OPS_REDUCE(__reduce_max_sync, FUSED_OPS_INTEGERS, std::max(a, b))
FUSED_OPS_REDUCE(__reduce_and_sync, (std::is_same_v<T, unsigned>), a & b)
FUSED_OPS_REDUCE(__reduce_or_sync, (std::is_same_v<T, unsigned>), a | b)
FUSED_OPS_REDUCE(__reduce_xor_sync, (std::is_same_v<T, unsigned>), a ^ b)

// Section "Atomic Functions": relaxed, device-wide; _block and _system as their names say.
#define FUSED_OPS_ATOMIC_AT(name, scope, types, expression)                                                          \
  template <typename T> requires types                                                                               \
  T name(T* address, std::type_identity_t<T> value,                                                                  \
         fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {                               \
    return fused_ops::emulation::change_atomically(                                                                  \
        address, [value](T old) -> T { return expression; }, fused_ops::emulation::Scope::scope, where);             \
  }
#define FUSED_OPS_ATOMIC(name, types, expression)            \
  FUSED_OPS_ATOMIC_AT(name, device, types, expression)       \
  FUSED_OPS_ATOMIC_AT(name##_block, block, types, expression) \
  FUSED_OPS_ATOMIC_AT(name##_system, system, types, expression)
#define FUSED_OPS_WORDS (std::is_integral_v<T> && sizeof(T) >= 4)
FUSED_OPS_ATOMIC(atomicAdd, (!std::is_integral_v<T> || sizeof(T) >= 4), static_cast<T>(old + value))
FUSED_OPS_ATOMIC(atomicSub, FUSED_OPS_WORDS, static_cast<T>(old - value))
FUSED_OPS_ATOMIC(atomicMin, FUSED_OPS_WORDS, std::min(old, value))
FUSED_OPS_ATOMIC(atomicMax, FUSED_OPS_WORDS, std::max(old, value))
FUSED_OPS_ATOMIC(atomicAnd, FUSED_OPS_WORDS, old & value)
FUSED_OPS_ATOMIC(atomicOr, FUSED_OPS_WORDS, old | value)
FUSED_OPS_ATOMIC(atomicXor, FUSED_OPS_WORDS, old ^ value)
FUSED_OPS_ATOMIC(atomicExch, (sizeof(T) >= 4), (static_cast<void>(old), value))
FUSED_OPS_ATOMIC(atomicInc, (std::is_same_v<T, unsigned>), old >= value ? 0 : old + 1)
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value,
            fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  return fused_ops::emulation::change_atomically(
      address, [=](T old) { return old == expected ? value : old; }, fused_ops::emulation::Scope::device, where);
}

// Loads and stores with a cache hint are loads and stores.
template <typename T> T __ldg(const T* address) { return *address; }
template <typename T> T __ldcg(const T* address) { return *address; }
template <typename T> T __ldcs(const T* address) { return *address; }
template <typename T> T __ldca(const T* address) { return *address; }
template <typename T> void __stcg(T* address, T value) { *address = value; }
template <typename T> void __stcs(T* address, T value) { *address = value; }

// CUDA Math API: intrinsics, here as exact as the host's functions.
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return std::pow(10.0f, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __tanhf(float x) { return std::tanh(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float fdividef(float x, float y) { return x / y; }
inline float normcdff(float x) { return 0.5f * std::erfc(-x * 0.70710678f); }

// Integer intrinsics.
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1; }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>((uint64_t{x} * y) >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> ((selector >> (4 * i) & 7) * 8) & 0xff) << (8 * i);
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
using std::max;
using std::min;

inline long long clock64() { return static_cast<long long>(fused_ops::emulation::ticks()); }
inline void __nanosleep(unsigned) { fused_ops::emulation::yield(); }
inline void __trap(fused_ops::emulation::Where where = fused_ops::emulation::Where::current()) {
  fused_ops::emulation::fail("__trap()", where);
}
