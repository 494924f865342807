// Products of a warpgroup (4 warps, the first of a number divisible by 4): D (64 x N, float, in registers) = A B (+ D), of
// A (64 x K, in shared memory or registers) and B (K x N, in shared memory), K being 32 bytes. They run beside the threads
// that issue them. Sections named are of the PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". Emulated,
// uncalibrated: no GPU has confirmed this file's twin yet.
//
// In use: wgmma_fence, some wgmma, wgmma_commit; then wgmma_wait. Between a wgmma and the wait that covers it nobody touches
// its registers or writes what it reads; shared memory that threads wrote is shown to it by fence_proxy_async (each writing
// thread) and a barrier. All threads of the warpgroup call these together. A warp's wait covers its own part: each warp
// tells others that shared memory is free.
//
// Fragments: thread t of the warpgroup, w = t / 32, l = t % 32. d[4 j + 2 h + i] is D(16 w + 8 h + l / 4, 8 j + 2 (l % 4) + i).
// A in registers, 16-bit: a[2 c + h] holds A(16 w + 8 h + l / 4, 8 c + 2 (l % 4) + {0, 1}), the first in the lower half;
// tf32: A(16 w + 8 h + l / 4, 4 c + l % 4).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/mbarrier.cuh"
#include "common/swizzle.cuh"

namespace fused_ops {

// Which of an operand's dimensions is contiguous: K, or M (of A) and N (of B), which tf32 has not.
enum class Major : uint8_t { k, mn };

// "Matrix Descriptor". K-major rows of 16 bytes (no swizzle) or of the swizzle's size lie one after the other by 8;
// `stride_bytes` is from 8 rows to the next 8, `leading_bytes` (no swizzle) from the first 16 bytes of K to the second.
// MN-major rows of 16 bytes or of the swizzle's size hold elements of M or N, and lie one after the other by 8 of K.
// Without swizzle, `stride_bytes` is from 8 elements of M or N to the next, `leading_bytes` from 8 of K to the next; with
// one, `leading_bytes` is from a row's elements of M or N to the next such, `stride_bytes` from 8 of K to the next.
// A swizzled operand starts in the first row of its pattern.
__device__ inline uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes,
                                            Swizzle swizzle) {
  const auto encode = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  const uint64_t mode = swizzle == Swizzle::none ? 0 : 4 - static_cast<uint64_t>(swizzle);
  return encode(detail::shared_address(shared)) | encode(leading_bytes) << 16 | encode(stride_bytes) << 32 | mode << 62;
}

// "wgmma.fence": registers touched before may be used by the products after.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// "wgmma.commit_group": the products since the last commit become a group.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// "wgmma.wait_group": all but the newest `kPending` groups are done.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Lists of 4 to 128 registers, as text and as operands of an asm.
#define FUSED_OPS_LIST_4 "%0, %1, %2, %3"
#define FUSED_OPS_LIST_8 FUSED_OPS_LIST_4 \
  ", %4, %5, %6, %7"
#define FUSED_OPS_LIST_16 FUSED_OPS_LIST_8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FUSED_OPS_LIST_32 FUSED_OPS_LIST_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FUSED_OPS_LIST_48 FUSED_OPS_LIST_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FUSED_OPS_LIST_64 FUSED_OPS_LIST_48 \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FUSED_OPS_LIST_96 FUSED_OPS_LIST_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FUSED_OPS_LIST_128 FUSED_OPS_LIST_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FUSED_OPS_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FUSED_OPS_D8(i) FUSED_OPS_D4(i), FUSED_OPS_D4(i + 4)
#define FUSED_OPS_D16(i) FUSED_OPS_D8(i), FUSED_OPS_D8(i + 8)
#define FUSED_OPS_D32(i) FUSED_OPS_D16(i), FUSED_OPS_D16(i + 16)
#define FUSED_OPS_D48(i) FUSED_OPS_D32(i), FUSED_OPS_D16(i + 32)
#define FUSED_OPS_D64(i) FUSED_OPS_D32(i), FUSED_OPS_D32(i + 32)
#define FUSED_OPS_D96(i) FUSED_OPS_D64(i), FUSED_OPS_D32(i + 64)
#define FUSED_OPS_D128(i) FUSED_OPS_D64(i), FUSED_OPS_D64(i + 64)

// One asm for each N and type: both are spelled in the instruction, as are the numbers p to u of the operands after D.
#define FUSED_OPS_WGMMA(n, k, type, r, operands, flag, after, ...)                                                     \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k" #k ".f32." \
               type "." type " {" FUSED_OPS_LIST_##r "}, " operands ", add, 1, 1" after ";\n}"                          \
               : FUSED_OPS_D##r(0)                                                                                     \
               : __VA_ARGS__                                                                                           \
               : "memory")
#define FUSED_OPS_WGMMA_SHARED(n, r, p, q, s, t, u)                                                                    \
  if constexpr (kRegisters == r && std::is_same_v<T, float>) {                                                         \
    FUSED_OPS_WGMMA(n, 8, "tf32", r, "%" #p ", %" #q, s, "", "l"(a), "l"(b), "r"(add));                                \
  } else if constexpr (kRegisters == r && std::is_same_v<T, __half>) {                                                 \
    FUSED_OPS_WGMMA(n, 16, "f16", r, "%" #p ", %" #q, s, ", %" #t ", %" #u, "l"(a), "l"(b), "r"(add), "n"(kTransA),    \
                    "n"(kTransB));                                                                                     \
  } else if constexpr (kRegisters == r) {                                                                              \
    FUSED_OPS_WGMMA(n, 16, "bf16", r, "%" #p ", %" #q, s, ", %" #t ", %" #u, "l"(a), "l"(b), "r"(add), "n"(kTransA),   \
                    "n"(kTransB));                                                                                     \
  }
#define FUSED_OPS_WGMMA_REGISTERS(n, r, p, q, s, t, u, v, w)                                                           \
  if constexpr (kRegisters == r && std::is_same_v<T, float>) {                                                         \
    FUSED_OPS_WGMMA(n, 8, "tf32", r, "{%" #p ", %" #q ", %" #s ", %" #t "}, %" #u, v, "", "r"(a[0]), "r"(a[1]),        \
                    "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                                           \
  } else if constexpr (kRegisters == r && std::is_same_v<T, __half>) {                                                 \
    FUSED_OPS_WGMMA(n, 16, "f16", r, "{%" #p ", %" #q ", %" #s ", %" #t "}, %" #u, v, ", %" #w, "r"(a[0]), "r"(a[1]),  \
                    "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTransB));                                             \
  } else if constexpr (kRegisters == r) {                                                                              \
    FUSED_OPS_WGMMA(n, 16, "bf16", r, "{%" #p ", %" #q ", %" #s ", %" #t "}, %" #u, v, ", %" #w, "r"(a[0]), "r"(a[1]), \
                    "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTransB));                                             \
  }

namespace detail {

template <typename T, int kRegisters>
constexpr bool kHasWgmma = (std::is_same_v<T, float> || std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>) &&
                           (kRegisters == 4 || kRegisters == 8 || kRegisters == 16 || kRegisters == 32 ||
                            kRegisters == 48 || kRegisters == 64 || kRegisters == 96 || kRegisters == 128);

}  // namespace detail

// "wgmma.mma_async": D = A B, + D if `accumulate`. N is twice the number of D's registers: 8, 16, 32, 64, 96, 128, 192 or
// 256. T: __half, __nv_bfloat16 or float, whose lower 13 bits are left out (tf32).
template <typename T, Major kA = Major::k, Major kB = Major::k, int kRegisters>
__device__ inline void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(detail::kHasWgmma<T, kRegisters>);
  static_assert(!std::is_same_v<T, float> || (kA == Major::k && kB == Major::k), "tf32 is K-major");
  [[maybe_unused]] constexpr int kTransA = kA == Major::mn, kTransB = kB == Major::mn;
  const auto add = static_cast<uint32_t>(accumulate);
  FUSED_OPS_WGMMA_SHARED(8, 4, 4, 5, 6, 7, 8)
  FUSED_OPS_WGMMA_SHARED(16, 8, 8, 9, 10, 11, 12)
  FUSED_OPS_WGMMA_SHARED(32, 16, 16, 17, 18, 19, 20)
  FUSED_OPS_WGMMA_SHARED(64, 32, 32, 33, 34, 35, 36)
  FUSED_OPS_WGMMA_SHARED(96, 48, 48, 49, 50, 51, 52)
  FUSED_OPS_WGMMA_SHARED(128, 64, 64, 65, 66, 67, 68)
  FUSED_OPS_WGMMA_SHARED(192, 96, 96, 97, 98, 99, 100)
  FUSED_OPS_WGMMA_SHARED(256, 128, 128, 129, 130, 131, 132)
}
// A in registers.
template <typename T, Major kB = Major::k, int kRegisters>
__device__ inline void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(detail::kHasWgmma<T, kRegisters>);
  static_assert(!std::is_same_v<T, float> || kB == Major::k, "tf32 is K-major");
  [[maybe_unused]] constexpr int kTransB = kB == Major::mn;
  const auto add = static_cast<uint32_t>(accumulate);
  FUSED_OPS_WGMMA_REGISTERS(8, 4, 4, 5, 6, 7, 8, 9, 10)
  FUSED_OPS_WGMMA_REGISTERS(16, 8, 8, 9, 10, 11, 12, 13, 14)
  FUSED_OPS_WGMMA_REGISTERS(32, 16, 16, 17, 18, 19, 20, 21, 22)
  FUSED_OPS_WGMMA_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37, 38)
  FUSED_OPS_WGMMA_REGISTERS(96, 48, 48, 49, 50, 51, 52, 53, 54)
  FUSED_OPS_WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69, 70)
  FUSED_OPS_WGMMA_REGISTERS(192, 96, 96, 97, 98, 99, 100, 101, 102)
  FUSED_OPS_WGMMA_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133, 134)
}
#undef FUSED_OPS_WGMMA
#undef FUSED_OPS_WGMMA_SHARED
#undef FUSED_OPS_WGMMA_REGISTERS

// "setmaxnreg": the warpgroup's threads give registers back to the block, or wait for what others have given back, until
// they have `kRegisters` each. The kernel's own count must be fixed (__launch_bounds__(threads, 1)).
template <int kRegisters>
__device__ inline void release_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void request_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fused_ops
