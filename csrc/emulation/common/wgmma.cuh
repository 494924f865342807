// The twin of csrc/common/wgmma.cuh. Sections named are of the PTX ISA. A product is computed by the wait that covers
// it; until then its accumulators hold NaN and may not be touched, and what it reads of shared memory may not be
// written.
#pragma once

#include <type_traits>

#include "common/mbarrier.cuh"
#include "common/swizzle.cuh"

namespace fused_ops {

enum class Major : uint8_t { k, mn };

namespace emulation {

enum class WgmmaType : uint8_t { half, bfloat, tf32 };

struct Wgmma {
  WgmmaType type;
  uint32_t n;
  Major a_major, b_major;
  bool a_in_registers, accumulates;
  uint64_t a, b;  // descriptors
  bool operator==(const Wgmma&) const = default;
};

// wgmma.cpp
uint64_t describe_operand(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes, Swizzle swizzle,
                          Where where);
void fence_warpgroup(Where where);
void issue_wgmma(const Wgmma& what, float* d, const uint32_t* a, Where where);
void commit_wgmmas(Where where);
void wait_for_wgmmas(size_t but_groups, Where where);
void change_registers(uint32_t count, bool request, Where where);

template <typename T>
constexpr WgmmaType wgmma_type() {
  if constexpr (std::is_same_v<T, __half>) return WgmmaType::half;
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return WgmmaType::bfloat;
  else {
    static_assert(std::is_same_v<T, float>);
    return WgmmaType::tf32;
  }
}

constexpr bool is_wgmma_n(int n) {
  return n == 8 || n == 16 || n == 32 || n == 64 || n == 96 || n == 128 || n == 192 || n == 256;
}

}  // namespace emulation

// "Asynchronous Warpgroup Level Matrix Shared Memory Layout: Matrix Descriptor".
inline uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes, Swizzle swizzle,
                                 emulation::Where where = emulation::Where::current()) {
  return emulation::describe_operand(shared, leading_bytes, stride_bytes, swizzle, where);
}

// "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group".
inline void wgmma_fence(emulation::Where where = emulation::Where::current()) { emulation::fence_warpgroup(where); }
inline void wgmma_commit(emulation::Where where = emulation::Where::current()) { emulation::commit_wgmmas(where); }
template <int kPending>
void wgmma_wait(emulation::Where where = emulation::Where::current()) {
  emulation::wait_for_wgmmas(kPending, where);
}

// "wgmma.mma_async".
template <typename T, Major kA = Major::k, Major kB = Major::k, int kRegisters>
void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate,
           emulation::Where where = emulation::Where::current()) {
  static_assert(emulation::is_wgmma_n(2 * kRegisters));
  static_assert(!std::is_same_v<T, float> || (kA == Major::k && kB == Major::k));
  emulation::issue_wgmma({emulation::wgmma_type<T>(), 2 * kRegisters, kA, kB, false, accumulate, a, b}, d, nullptr,
                         where);
}
template <typename T, Major kB = Major::k, int kRegisters>
void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate,
           emulation::Where where = emulation::Where::current()) {
  static_assert(emulation::is_wgmma_n(2 * kRegisters));
  static_assert(!std::is_same_v<T, float> || kB == Major::k);
  emulation::issue_wgmma({emulation::wgmma_type<T>(), 2 * kRegisters, Major::k, kB, true, accumulate, 0, b}, d, a,
                         where);
}

// "setmaxnreg".
template <int kRegisters>
void release_registers(emulation::Where where = emulation::Where::current()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  emulation::change_registers(kRegisters, false, where);
}
template <int kRegisters>
void request_registers(emulation::Where where = emulation::Where::current()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  emulation::change_registers(kRegisters, true, where);
}

}  // namespace fused_ops
