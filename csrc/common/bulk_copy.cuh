// Copies of whole tiles between device and shared memory that one thread issues and the copy engine makes. Sections
// named are of the PTX ISA, "Data Movement and Conversion Instructions: Bulk copy" and "Tensor copy". To shared memory,
// a copy completes on an mbarrier, which counts its bytes; to device memory, by its thread's groups. What ordinary
// stores wrote, a copy sees only after fence_proxy_async (common/mbarrier.cuh). Emulated, uncalibrated: no GPU has
// confirmed this file's twin yet.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/launch.h"
#include "common/mbarrier.cuh"
#include "common/swizzle.cuh"

namespace fused_ops {

// What stands for elements outside the tensor.
enum class Fill : uint8_t { zeros, nans };

// A tensor and the box that one copy moves. A kernel takes it as `const __grid_constant__ TensorMap`.
using TensorMap = CUtensorMap;

namespace detail {

template <typename T>
constexpr CUtensorMapDataType tensor_map_type() {
  if constexpr (std::is_same_v<T, float>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  else if constexpr (std::is_same_v<T, __half>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  else if constexpr (std::is_same_v<T, int32_t>) return CU_TENSOR_MAP_DATA_TYPE_INT32;
  else {
    static_assert(std::is_same_v<T, uint8_t>, "no tensor map of this type");
    return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

}  // namespace detail

// CUDA Driver API, cuTensorMapEncodeTiled: dimensions innermost first; `strides` in bytes, of all but the innermost,
// which has none between its elements; `box` elements are moved at once, every `steps`-th of them (0 is 1) in a
// dimension but the innermost. Throws where the driver refuses: the address and the strides are multiples of 16, a row
// of the box has a multiple of 16 bytes and, with a swizzle, no more than its row; a box has at most 256 elements in a
// dimension.
template <typename T, size_t kRank>
TensorMap make_tensor_map(const T* base, const std::array<uint64_t, kRank>& sizes,
                          const std::array<uint64_t, kRank - 1>& strides, const std::array<uint32_t, kRank>& box,
                          Swizzle swizzle = Swizzle::none, Fill fill = Fill::zeros,
                          const std::array<uint32_t, kRank>& steps = {}) {
  static_assert(1 <= kRank && kRank <= 5);
  static decltype(&cuTensorMapEncodeTiled) encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    FUSED_OPS_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  std::array<uint32_t, kRank> all_steps;
  for (size_t i = 0; i < kRank; ++i) all_steps[i] = i == 0 || steps[i] == 0 ? 1 : steps[i];
  TensorMap map;
  const CUresult status = encode(
      &map, detail::tensor_map_type<T>(), kRank, const_cast<T*>(base), sizes.data(), strides.data(), box.data(),
      all_steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(swizzle),
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      fill == Fill::nans ? CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA : CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: " + std::to_string(status));
  return map;
}

// "cp.async.bulk": `bytes` (a multiple of 16, as the addresses are) from device memory to this block's shared memory;
// the mbarrier, which must expect them, gets the bytes.
__device__ inline void bulk_load(void* shared, const void* global, uint32_t bytes, Mbarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   detail::shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(detail::shared_address(barrier))
               : "memory");
}
// To the same place in every block of the mask `blocks`, each of whose own mbarriers gets the bytes.
__device__ inline void bulk_load_multicast(void* shared, const void* global, uint32_t bytes, Mbarrier* barrier,
                                           uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(detail::shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(detail::shared_address(barrier)), "h"(blocks)
      : "memory");
}
// To device memory, in this thread's open group.
__device__ inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(global)),
               "r"(detail::shared_address(shared)), "r"(bytes)
               : "memory");
}

// "cp.async.bulk.tensor": the box whose first element has coordinates `at`, innermost dimension first, which may lie
// outside the tensor, negative ones included: what lies outside is filled in on the way in (its bytes count) and left
// out on the way out. The shared address is a multiple of 128. Coordinates are spelled in the instruction, one asm for
// each rank.
#define FUSED_OPS_COORDINATES_1 "r"(at[0])
#define FUSED_OPS_COORDINATES_2 FUSED_OPS_COORDINATES_1, "r"(at[1])
#define FUSED_OPS_COORDINATES_3 FUSED_OPS_COORDINATES_2, "r"(at[2])
#define FUSED_OPS_COORDINATES_4 FUSED_OPS_COORDINATES_3, "r"(at[3])
#define FUSED_OPS_COORDINATES_5 FUSED_OPS_COORDINATES_4, "r"(at[4])
#define FUSED_OPS_TENSOR_COPY(rank, before, list, after, ...)                                                        \
  if constexpr (kRank == rank) {                                                                                     \
    asm volatile("cp.async.bulk.tensor." #rank "d" before list after ::__VA_ARGS__, FUSED_OPS_COORDINATES_##rank     \
                 : "memory");                                                                                        \
  }
template <size_t kRank>
__device__ inline void tensor_load(void* shared, const TensorMap& map, Mbarrier* barrier, const int (&at)[kRank]) {
  static_assert(1 <= kRank && kRank <= 5);
  FUSED_OPS_TENSOR_COPY(1, ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, ", "{%3}", "], [%2];",
                        "r"(detail::shared_address(shared)), "l"(&map), "r"(detail::shared_address(barrier)))
  FUSED_OPS_TENSOR_COPY(2, ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, ", "{%3, %4}", "], [%2];",
                        "r"(detail::shared_address(shared)), "l"(&map), "r"(detail::shared_address(barrier)))
  FUSED_OPS_TENSOR_COPY(3, ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, ", "{%3, %4, %5}",
                        "], [%2];", "r"(detail::shared_address(shared)), "l"(&map),
                        "r"(detail::shared_address(barrier)))
  FUSED_OPS_TENSOR_COPY(4, ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, ", "{%3, %4, %5, %6}",
                        "], [%2];", "r"(detail::shared_address(shared)), "l"(&map),
                        "r"(detail::shared_address(barrier)))
  FUSED_OPS_TENSOR_COPY(5, ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, ", "{%3, %4, %5, %6, %7}",
                        "], [%2];", "r"(detail::shared_address(shared)), "l"(&map),
                        "r"(detail::shared_address(barrier)))
}
// To the same place in every block of the mask `blocks`, each of whose own mbarriers gets the bytes.
template <size_t kRank>
__device__ inline void tensor_load_multicast(void* shared, const TensorMap& map, Mbarrier* barrier,
                                             const int (&at)[kRank], uint16_t blocks) {
  static_assert(1 <= kRank && kRank <= 5);
  FUSED_OPS_TENSOR_COPY(1, ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, ",
                        "{%4}", "], [%2], %3;", "r"(detail::shared_address(shared)), "l"(&map),
                        "r"(detail::shared_address(barrier)), "h"(blocks))
  FUSED_OPS_TENSOR_COPY(2, ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, ",
                        "{%4, %5}", "], [%2], %3;", "r"(detail::shared_address(shared)), "l"(&map),
                        "r"(detail::shared_address(barrier)), "h"(blocks))
  FUSED_OPS_TENSOR_COPY(3, ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, ",
                        "{%4, %5, %6}", "], [%2], %3;", "r"(detail::shared_address(shared)), "l"(&map),
                        "r"(detail::shared_address(barrier)), "h"(blocks))
  FUSED_OPS_TENSOR_COPY(4, ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, ",
                        "{%4, %5, %6, %7}", "], [%2], %3;", "r"(detail::shared_address(shared)), "l"(&map),
                        "r"(detail::shared_address(barrier)), "h"(blocks))
  FUSED_OPS_TENSOR_COPY(5, ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, ",
                        "{%4, %5, %6, %7, %8}", "], [%2], %3;", "r"(detail::shared_address(shared)), "l"(&map),
                        "r"(detail::shared_address(barrier)), "h"(blocks))
}
template <size_t kRank>
__device__ inline void tensor_store(const TensorMap& map, const void* shared, const int (&at)[kRank]) {
  static_assert(1 <= kRank && kRank <= 5);
  FUSED_OPS_TENSOR_COPY(1, ".global.shared::cta.bulk_group [%0, ", "{%2}", "], [%1];", "l"(&map),
                        "r"(detail::shared_address(shared)))
  FUSED_OPS_TENSOR_COPY(2, ".global.shared::cta.bulk_group [%0, ", "{%2, %3}", "], [%1];", "l"(&map),
                        "r"(detail::shared_address(shared)))
  FUSED_OPS_TENSOR_COPY(3, ".global.shared::cta.bulk_group [%0, ", "{%2, %3, %4}", "], [%1];", "l"(&map),
                        "r"(detail::shared_address(shared)))
  FUSED_OPS_TENSOR_COPY(4, ".global.shared::cta.bulk_group [%0, ", "{%2, %3, %4, %5}", "], [%1];", "l"(&map),
                        "r"(detail::shared_address(shared)))
  FUSED_OPS_TENSOR_COPY(5, ".global.shared::cta.bulk_group [%0, ", "{%2, %3, %4, %5, %6}", "], [%1];", "l"(&map),
                        "r"(detail::shared_address(shared)))
}
#undef FUSED_OPS_TENSOR_COPY
#undef FUSED_OPS_COORDINATES_1
#undef FUSED_OPS_COORDINATES_2
#undef FUSED_OPS_COORDINATES_3
#undef FUSED_OPS_COORDINATES_4
#undef FUSED_OPS_COORDINATES_5

// "prefetch{.tensormap}": the first copy need not wait for the map itself.
__device__ inline void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// "cp.async.bulk.commit_group": this thread's copies to device memory since the last commit become a group.
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// "cp.async.bulk.wait_group": all but the newest `kPending` groups of this thread are done; _read: have read shared
// memory, which may be used again. A thread exits only after that.
template <int kPending>
__device__ inline void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ inline void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace fused_ops
