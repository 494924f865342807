// N floats as one value, by the compiler's vector extension: the same source for AVX-512, AVX2, SSE and NEON. Which
// instructions it becomes is decided by the target of the function that everything here is inlined into.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#include "conv/epilogue.h"

#define FUSED_OPS_INLINE inline __attribute__((always_inline))

namespace fused_ops::conv {

template <int N> struct VectorOf { typedef float type __attribute__((vector_size(N * sizeof(float)))); };
template <int N> using Vector = typename VectorOf<N>::type;

template <int N> FUSED_OPS_INLINE void load(Vector<N>& to, const float* from) { std::memcpy(&to, from, sizeof(to)); }
template <int N> FUSED_OPS_INLINE void store(float* to, const Vector<N>& from) { std::memcpy(to, &from, sizeof(from)); }

// The first `count` of the N; what is read has 0 behind them.
template <int N> FUSED_OPS_INLINE void load_some(Vector<N>& to, const float* from, int64_t count) {
  if (count >= N) return load<N>(to, from);
  to = Vector<N>{};
  std::memcpy(&to, from, count * sizeof(float));
}
template <int N> FUSED_OPS_INLINE void store_some(float* to, const Vector<N>& from, int64_t count) {
  if (count >= N) store<N>(to, from);
  else std::memcpy(to, &from, count * sizeof(float));
}

// A store past the caches, for what is larger than they are: `to` must be aligned, and a fence must follow the last.
template <int N> FUSED_OPS_INLINE void stream(float* to, const Vector<N>& from) {
#if defined(__x86_64__)
  if constexpr (N == 4) asm volatile("movntps %1, %0" : "=m"(*reinterpret_cast<Vector<N>*>(to)) : "x"(from));
  else asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<Vector<N>*>(to)) : "x"(from));
#else
  store<N>(to, from);
#endif
}
inline void fence() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// A thread's own memory for a PURPOSE, which it keeps: pages that the system has to clear cost more than their use.
template <typename PURPOSE> float* workspace(int64_t floats) {
  constexpr std::align_val_t kLine{64};
  struct Memory {
    float* data = nullptr;
    int64_t floats = 0;
    ~Memory() { ::operator delete(data, kLine); }
  };
  thread_local Memory memory;
  if (memory.floats < floats) {
    ::operator delete(memory.data, kLine);
    memory.data = nullptr, memory.floats = 0;
    memory.data = static_cast<float*>(::operator new(floats * sizeof(float), kLine)), memory.floats = floats;
  }
  return memory.data;
}

// memcpy without a call, for runs of up to 16: two overlapping moves of a fixed size.
FUSED_OPS_INLINE void copy_short(float* to, const float* from, int64_t count) {
  if (count >= 8) {
    std::memcpy(to, from, 32), std::memcpy(to + count - 8, from + count - 8, 32);
  } else if (count >= 4) {
    std::memcpy(to, from, 16), std::memcpy(to + count - 4, from + count - 4, 16);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

// memcpy for rows: vectors, the last one overlapping the one before.
template <int N> FUSED_OPS_INLINE void copy_row(float* to, const float* from, int64_t count) {
  if (count < N) return copy_short(to, from, count);
  Vector<N> value;
  for (int64_t i = 0; i + N <= count; i += N) load<N>(value, from + i), store<N>(to + i, value);
  load<N>(value, from + count - N), store<N>(to + count - N, value);
}

// even[i] = from[2i], odd[i] = from[2i + 1] for the `count` floats of `from`.
FUSED_OPS_INLINE void split_pairs(float* even, float* odd, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    Vector<4> low, high;
    load<4>(low, from + i);
    load<4>(high, from + i + 4);
    store<4>(even + i / 2, __builtin_shufflevector(low, high, 0, 2, 4, 6));
    store<4>(odd + i / 2, __builtin_shufflevector(low, high, 1, 3, 5, 7));
  }
  for (; i < count; ++i) (i % 2 ? odd : even)[i / 2] = from[i];
}

// Comparisons are written so that NaN stays NaN, as in torch.
template <int N> FUSED_OPS_INLINE void activate(Vector<N>& y, int64_t activation) {
  const Vector<N> zero = {}, six = zero + 6.0f;
  switch (activation) {
    case kRelu: y = y < zero ? zero : y; break;
    case kRelu6: y = y < zero ? zero : (y > six ? six : y); break;
    case kHardswish: {
      const Vector<N> shifted = y + 3.0f;
      y = y * (shifted < zero ? zero : (shifted > six ? six : shifted)) * (1.0f / 6.0f);
      break;
    }
    case kLeakyRelu: y = y < zero ? y * 0.01f : y; break;
    default: break;
  }
}

}  // namespace fused_ops::conv
