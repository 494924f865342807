// The twin of csrc/common/mma.cuh, which draws the fragments. Sections named are of the PTX ISA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "emulation/runtime.h"

namespace fused_ops {

namespace emulation {

enum class Operand { half, bfloat16, tf32 };

// mma.cpp
void load_matrices(const char* kind, uint32_t* registers, uint32_t count, bool transposed, const void* row, Where where);
void store_matrices(const char* kind, const uint32_t* registers, uint32_t count, bool transposed, void* row, Where where);
void multiply(const char* kind, Operand operand, float* d, const uint32_t* a, const uint32_t* b, Where where);

}  // namespace emulation

#define FUSED_OPS_MATRICES(suffix, count, transposed)                                                                   \
  inline void ldmatrix_##suffix(uint32_t (&r)[count], const void* row,                                                  \
                                emulation::Where where = emulation::Where::current()) {                                 \
    emulation::load_matrices("ldmatrix_" #suffix, r, count, transposed, row, where);                                    \
  }                                                                                                                     \
  inline void stmatrix_##suffix(void* row, const uint32_t (&r)[count],                                                  \
                                emulation::Where where = emulation::Where::current()) {                                 \
    emulation::store_matrices("stmatrix_" #suffix, r, count, transposed, row, where);                                   \
  }
// "ldmatrix" and "stmatrix": each row is read, or written, by the lane that gives its address.
FUSED_OPS_MATRICES(x1, 1, false)
FUSED_OPS_MATRICES(x2, 2, false)
FUSED_OPS_MATRICES(x4, 4, false)
FUSED_OPS_MATRICES(x1_trans, 1, true)
FUSED_OPS_MATRICES(x2_trans, 2, true)
FUSED_OPS_MATRICES(x4_trans, 4, true)
#undef FUSED_OPS_MATRICES

// "mma", m16n8k16 and m16n8k8: the exact products, summed over k in double, then d, rounded once to the nearest float. The
// hardware aligns the terms to the largest and cuts them off: it may be off by 2^-20 of the largest term and an ulp.
template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  emulation::Where where = emulation::Where::current()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  emulation::multiply("mma_m16n8k16", kHalf ? emulation::Operand::half : emulation::Operand::bfloat16, d, a, b, where);
}
inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        emulation::Where where = emulation::Where::current()) {
  emulation::multiply("mma_m16n8k8", emulation::Operand::tf32, d, a, b, where);
}

// "cvt", cvt.rna.tf32.f32.
inline uint32_t to_tf32(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  if ((bits & 0x7fffffffu) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

}  // namespace fused_ops
