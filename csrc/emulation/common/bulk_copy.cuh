// The twin of csrc/common/bulk_copy.cuh. Sections named are of the PTX ISA. A copy is made as late as a wait allows
// (with a seed other than 0, at some time before), of what the source holds by then; from its issue until the wait that
// covers it nobody may touch where it goes or write what it reads.
#pragma once

#include <array>
#include <limits>
#include <type_traits>

#include "common/mbarrier.cuh"
#include "common/swizzle.cuh"

namespace fused_ops {

enum class Fill : uint8_t { zeros, nans };

// CUDA Driver API, "Tensor Map Object Management": what cuTensorMapEncodeTiled is told.
struct alignas(64) TensorMap {
  std::byte* base;
  uint32_t rank, element_bytes;
  std::array<uint64_t, 5> sizes, strides;  // strides in bytes, of an element for the first dimension
  std::array<uint32_t, 5> box, steps;
  Swizzle swizzle;
  Fill fill;
};

namespace emulation {

// bulk_copy.cpp
void check_tensor_map(const TensorMap& map, bool is_float);
void bulk_to_shared(void* shared, const void* global, uint32_t bytes, Mbarrier* barrier, uint32_t blocks, Where where);
void bulk_to_global(void* global, const void* shared, uint32_t bytes, Where where);
void tensor_to_shared(void* shared, const TensorMap& map, Mbarrier* barrier, std::array<int, 5> at, size_t rank,
                      uint32_t blocks, Where where);
void tensor_to_global(const TensorMap& map, const void* shared, std::array<int, 5> at, size_t rank, Where where);
void commit_bulk_copies();
void wait_for_bulk_copies(size_t but_groups, bool only_reads, Where where);

constexpr uint32_t kThisBlock = 0;  // of a multicast's mask

}  // namespace emulation

template <typename T, size_t kRank>
TensorMap make_tensor_map(const T* base, const std::array<uint64_t, kRank>& sizes,
                          const std::array<uint64_t, kRank - 1>& strides, const std::array<uint32_t, kRank>& box,
                          Swizzle swizzle = Swizzle::none, Fill fill = Fill::zeros,
                          const std::array<uint32_t, kRank>& steps = {}) {
  static_assert(1 <= kRank && kRank <= 5);
  TensorMap map{};
  map.base = reinterpret_cast<std::byte*>(const_cast<T*>(base));
  map.rank = kRank, map.element_bytes = sizeof(T), map.swizzle = swizzle, map.fill = fill;
  for (size_t i = 0; i < kRank; ++i) {
    map.sizes[i] = sizes[i], map.box[i] = box[i], map.steps[i] = i == 0 || steps[i] == 0 ? 1 : steps[i];
    map.strides[i] = i == 0 ? sizeof(T) : strides[i - 1];
  }
  emulation::check_tensor_map(map, !std::numeric_limits<T>::is_integer);
  return map;
}

// "cp.async.bulk".
inline void bulk_load(void* shared, const void* global, uint32_t bytes, Mbarrier* barrier,
                      emulation::Where where = emulation::Where::current()) {
  emulation::bulk_to_shared(shared, global, bytes, barrier, emulation::kThisBlock, where);
}
inline void bulk_load_multicast(void* shared, const void* global, uint32_t bytes, Mbarrier* barrier, uint16_t blocks,
                                emulation::Where where = emulation::Where::current()) {
  emulation::bulk_to_shared(shared, global, bytes, barrier, blocks, where);
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes,
                       emulation::Where where = emulation::Where::current()) {
  emulation::bulk_to_global(global, shared, bytes, where);
}

// "cp.async.bulk.tensor". `at`: where the box starts, the innermost dimension first.
template <size_t kRank>
void tensor_load(void* shared, const TensorMap& map, Mbarrier* barrier, const int (&at)[kRank],
                 emulation::Where where = emulation::Where::current()) {
  std::array<int, 5> all{};
  std::copy(at, at + kRank, all.begin());
  emulation::tensor_to_shared(shared, map, barrier, all, kRank, emulation::kThisBlock, where);
}
template <size_t kRank>
void tensor_load_multicast(void* shared, const TensorMap& map, Mbarrier* barrier, const int (&at)[kRank],
                           uint16_t blocks, emulation::Where where = emulation::Where::current()) {
  std::array<int, 5> all{};
  std::copy(at, at + kRank, all.begin());
  emulation::tensor_to_shared(shared, map, barrier, all, kRank, blocks, where);
}
template <size_t kRank>
void tensor_store(const TensorMap& map, const void* shared, const int (&at)[kRank],
                  emulation::Where where = emulation::Where::current()) {
  std::array<int, 5> all{};
  std::copy(at, at + kRank, all.begin());
  emulation::tensor_to_global(map, shared, all, kRank, where);
}

// "prefetch{.tensormap}": nothing but time.
inline void prefetch_tensor_map(const TensorMap&) {}

// "cp.async.bulk.commit_group", "cp.async.bulk.wait_group".
inline void bulk_commit() { emulation::commit_bulk_copies(); }
template <int kPending>
void bulk_wait(emulation::Where where = emulation::Where::current()) {
  emulation::wait_for_bulk_copies(kPending, false, where);
}
template <int kPending>
void bulk_wait_read(emulation::Where where = emulation::Where::current()) {
  emulation::wait_for_bulk_copies(kPending, true, where);
}

}  // namespace fused_ops
