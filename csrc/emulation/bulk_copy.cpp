// What common/bulk_copy.cuh's twin does.
#include "emulation/builtins.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <stdexcept>

#include "emulation/common/bulk_copy.cuh"
#include "emulation/mbarrier.h"

namespace fused_ops::emulation {
namespace {

// A run of bytes of a tensor and where in a box, which has no gaps, it goes.
struct Run {
  std::byte* global;
  size_t in_box;
  size_t bytes;
};

struct Copy {
  MbarrierState* barrier = nullptr;
  std::byte* shared = nullptr;
  size_t bytes = 0;  // in shared memory
  std::vector<Run> runs;
  Swizzle swizzle = Swizzle::none;
  std::byte fill{};            // repeated, with the next one...
  std::byte fill_last{};       // ...as the last byte of each element
  size_t element_bytes = 1;
  Where where = Where::current();
  bool was_read = false;
  std::vector<std::byte> staged;  // of a store: what it read
};

std::vector<std::unique_ptr<Copy>> under_way;  // to shared memory

Block* owner_of(const void* shared) {
  const auto* at = static_cast<const std::byte*>(shared);
  for (Block* block : current->block->in_cluster->blocks) {
    if (at >= block->shared && at < block->shared + chip.shared_per_block) return block;
  }
  return nullptr;
}

// Calls move(in shared memory, in the box, bytes) for pieces that the swizzle, which is of address bits, leaves in one.
template <typename Move>
void for_pieces(const Copy& copy, size_t in_box, size_t bytes, Move move) {
  const auto start = static_cast<size_t>(copy.shared - owner_of(copy.shared)->shared);
  while (bytes > 0) {
    const size_t at = start + in_box;
    const size_t piece = copy.swizzle == Swizzle::none ? bytes : std::min(bytes, 16 - at % 16);
    move(copy.shared - start + swizzled(static_cast<uint32_t>(at), copy.swizzle), in_box, piece);
    in_box += piece, bytes -= piece;
  }
}

void must_be_aligned(const void* address, size_t to, const char* what, const Where& where) {
  if (reinterpret_cast<uintptr_t>(address) % to != 0) {
    fail(std::string(what) + " at an address that is no multiple of " + std::to_string(to), where);
  }
}

void must_be_in_shared(const void* address, size_t bytes, const Where& where) {
  if (!in_shared(address, bytes)) fail("a bulk copy to or from what is not this block's shared memory", where);
}

void must_be_global(const void* address, const Where& where) {
  if (owner_of(address) != nullptr) fail("a bulk copy of shared memory where device memory is wanted", where);
}

void must_be_whole(size_t bytes, const Where& where) {
  if (bytes % 16 != 0) fail("a bulk copy of " + std::to_string(bytes) + " bytes, no multiple of 16", where);
}

void begin(std::unique_ptr<Copy> copy, Mbarrier* barrier) {
  const Where& where = copy->where;
  copy->barrier = &mbarrier_at(barrier, "a bulk copy completes on", where);
  if (checked && !copy->barrier->fenced) {
    fail("a bulk copy completes on an mbarrier whose initialisation no fence has shown to the async proxy", where);
  }
  for (const Run& run : copy->runs) check::begin_async_read(run.global, run.bytes, where);
  check::begin_async_write(copy->shared, copy->bytes, where);
  under_way.push_back(std::move(copy));
  made_progress();
}

// Once for every block of the mask; kThisBlock: here.
void begin_in(const Copy& copy, Mbarrier* barrier, uint32_t blocks) {
  if (blocks == kThisBlock) return begin(std::make_unique<Copy>(copy), barrier);
  Block& mine = *current->block;
  const auto& all = mine.in_cluster->blocks;
  if (blocks >> all.size() != 0) fail("a multicast to blocks that the cluster does not have", copy.where);
  for (size_t rank = 0; rank < all.size(); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    auto one = std::make_unique<Copy>(copy);
    one->shared = all[rank]->shared + (copy.shared - mine.shared);
    const auto at = reinterpret_cast<std::byte*>(barrier) - mine.shared;
    begin(std::move(one), reinterpret_cast<Mbarrier*>(all[rank]->shared + at));
  }
}

void land(size_t number) {
  const std::unique_ptr<Copy> copy = std::move(under_way[number]);
  under_way.erase(under_way.begin() + static_cast<ptrdiff_t>(number));
  Thread* const self = current;
  MbarrierState& barrier = *copy->barrier;
  current = &barrier.block->threads.front();  // whose cluster the memory is of
  size_t brought = 0;
  for (const Run& run : copy->runs) brought += run.bytes;
  if (brought < copy->bytes) {
    for_pieces(*copy, 0, copy->bytes, [&](std::byte* to, size_t in_box, size_t bytes) {
      for (size_t i = 0; i < bytes; ++i) {
        to[i] = (in_box + i) % copy->element_bytes + 1 == copy->element_bytes ? copy->fill_last : copy->fill;
      }
    });
  }
  for (const Run& run : copy->runs) {
    for_pieces(*copy, run.in_box, run.bytes, [&](std::byte* to, size_t in_box, size_t bytes) {
      std::memcpy(to, run.global + (in_box - run.in_box), bytes);
    });
    check::end_read(run.global, run.bytes, copy->where, barrier.copier);
  }
  check::end_write(copy->shared, copy->bytes, copy->where, barrier.copier);
  check::release(barrier.arriving, *barrier.block, *barrier.copier);
  add_bytes(barrier, -static_cast<int64_t>(copy->bytes), copy->where);
  made_progress();
  current = self;
}

std::string text(const std::array<int, 5>& at, size_t rank) {
  std::string all;
  for (size_t i = 0; i < rank; ++i) all += (i ? ", " : "") + std::to_string(at[i]);
  return "(" + all + ")";
}

// The runs of the box at `at` that lie within the tensor.
Copy box_of(const TensorMap& map, void* shared, std::array<int, 5> at, size_t rank, const Where& where) {
  if (map.rank != rank) {
    fail("coordinates " + text(at, rank) + " for a tensor map of " + std::to_string(map.rank) + " dimensions", where);
  }
  must_be_aligned(shared, 128, "a tensor copy's shared memory", where);
  Copy copy;
  copy.shared = static_cast<std::byte*>(shared), copy.where = where;
  copy.swizzle = map.swizzle, copy.element_bytes = map.element_bytes;
  if (map.fill == Fill::nans) copy.fill = std::byte{0xff}, copy.fill_last = std::byte{0x7f};
  std::array<uint64_t, 5> count{1, 1, 1, 1, 1};
  for (size_t i = 0; i < rank; ++i) count[i] = (map.box[i] + map.steps[i] - 1) / map.steps[i];
  const size_t row_bytes = count[0] * map.element_bytes;
  const int64_t size = static_cast<int64_t>(map.sizes[0]);
  const int64_t first = std::clamp<int64_t>(-int64_t{at[0]}, 0, map.box[0]);
  const int64_t last = std::clamp<int64_t>(size - at[0], first, map.box[0]);
  const uint64_t rows = count[1] * count[2] * count[3] * count[4];
  copy.bytes = rows * row_bytes;
  for (uint64_t row = 0; row < rows && last > first; ++row) {
    uint64_t rest = row;
    int64_t offset = (at[0] + first) * static_cast<int64_t>(map.element_bytes);
    bool inside = true;
    for (size_t i = 1; i < rank; ++i) {
      const int64_t index = at[i] + static_cast<int64_t>(rest % count[i] * map.steps[i]);
      rest /= count[i];
      inside &= index >= 0 && index < static_cast<int64_t>(map.sizes[i]);
      offset += index * static_cast<int64_t>(map.strides[i]);
    }
    if (!inside) continue;
    copy.runs.push_back({map.base + offset, row * row_bytes + static_cast<size_t>(first) * map.element_bytes,
                         static_cast<size_t>(last - first) * map.element_bytes});
  }
  return copy;
}

}  // namespace

// A thread's copies to device memory that no wait has covered: complete groups, and those not committed.
struct BulkCopies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

namespace {

BulkCopies& bulk_copies_of(Thread& thread) {
  if (thread.bulk_copies == nullptr) {
    auto mine = std::make_shared<BulkCopies>();
    thread.bulk_copies = mine.get();
    thread.block->attached.push_back(std::move(mine));
  }
  return *thread.bulk_copies;
}

void begin_store(Copy copy) {
  check::begin_async_read(copy.shared, copy.bytes, copy.where);
  for (const Run& run : copy.runs) check::begin_async_write(run.global, run.bytes, copy.where);
  bulk_copies_of(*current).open.push_back(std::move(copy));
}

void read_source(Copy& copy) {
  if (copy.was_read) return;
  copy.was_read = true;
  copy.staged.resize(copy.bytes);
  for_pieces(copy, 0, copy.bytes, [&](const std::byte* from, size_t in_box, size_t bytes) {
    std::memcpy(copy.staged.data() + in_box, from, bytes);
  });
  check::end_read(copy.shared, copy.bytes, copy.where);
}

void write_result(const Copy& copy) {
  for (const Run& run : copy.runs) {
    std::memcpy(run.global, copy.staged.data() + run.in_box, run.bytes);
    check::end_write(run.global, run.bytes, copy.where);
  }
}

}  // namespace

bool land_a_copy(const MbarrierState* barrier) {
  std::vector<size_t> fitting;
  for (size_t i = 0; i < under_way.size(); ++i) {
    if (barrier == nullptr || under_way[i]->barrier == barrier) fitting.push_back(i);
  }
  if (fitting.empty()) return false;
  land(fitting[draw(fitting.size())]);
  return true;
}

bool land_a_copy() { return land_a_copy(nullptr); }
void forget_copies() { under_way.clear(); }

const Where* copy_into(const Block& block) {
  for (const auto& copy : under_way) if (copy->barrier->block == &block) return &copy->where;
  return nullptr;
}

void end_bulk_copies() {
  BulkCopies* mine = current->bulk_copies;
  if (mine == nullptr) return;
  mine->groups.push_back(std::move(mine->open));
  for (const auto& group : mine->groups) {
    for (const Copy& copy : group) {
      if (!copy.was_read) {
        fail("exits while its bulk copy still reads shared memory: no bulk_wait_read has covered it", copy.where);
      }
    }
  }
  ++current->clock;
  for (const auto& group : mine->groups) for (const Copy& copy : group) write_result(copy);
}

void check_tensor_map(const TensorMap& map, bool is_float) {
  const auto refuse = [](const std::string& what) { throw std::runtime_error("make_tensor_map: " + what); };
  if (reinterpret_cast<uintptr_t>(map.base) % 16 != 0) refuse("the tensor's address is no multiple of 16");
  if (map.fill == Fill::nans && !is_float) refuse("NaN fills only floating-point types");
  const size_t row = map.box[0] * map.element_bytes;
  if (row % 16 != 0) refuse("a row of the box has " + std::to_string(row) + " bytes, no multiple of 16");
  const size_t most = map.swizzle == Swizzle::none ? row : swizzle_bytes(map.swizzle);
  if (row > most) {
    refuse("a row of the box has " + std::to_string(row) + " bytes, the swizzle's has " + std::to_string(most));
  }
  for (size_t i = 0; i < map.rank; ++i) {
    const std::string dimension = " in dimension " + std::to_string(i);
    if (map.sizes[i] == 0 || map.sizes[i] > uint64_t{1} << 32) {
      refuse("a size of " + std::to_string(map.sizes[i]) + dimension);
    }
    if (map.box[i] == 0 || map.box[i] > 256) {
      refuse("a box of " + std::to_string(map.box[i]) + dimension + ", 1 to 256 are allowed");
    }
    if (map.steps[i] > 8) refuse("a step of " + std::to_string(map.steps[i]) + dimension + ", at most 8 is allowed");
    if (i > 0 && (map.strides[i] % 16 != 0 || map.strides[i] >= uint64_t{1} << 40)) {
      refuse("a stride of " + std::to_string(map.strides[i]) + " bytes" + dimension + ", no multiple of 16 below 2^40");
    }
  }
}

void bulk_to_shared(void* shared, const void* global, uint32_t bytes, Mbarrier* barrier, uint32_t blocks, Where where) {
  must_be_whole(bytes, where);
  must_be_aligned(shared, 16, "a bulk copy's shared memory", where);
  must_be_aligned(global, 16, "a bulk copy's device memory", where);
  must_be_in_shared(shared, bytes, where);
  must_be_global(global, where);
  Copy copy;
  copy.shared = static_cast<std::byte*>(shared), copy.bytes = bytes, copy.where = where;
  copy.runs.push_back({static_cast<std::byte*>(const_cast<void*>(global)), 0, bytes});
  begin_in(copy, barrier, blocks);
}

void bulk_to_global(void* global, const void* shared, uint32_t bytes, Where where) {
  must_be_whole(bytes, where);
  must_be_aligned(shared, 16, "a bulk copy's shared memory", where);
  must_be_aligned(global, 16, "a bulk copy's device memory", where);
  must_be_in_shared(shared, bytes, where);
  must_be_global(global, where);
  Copy copy;
  copy.shared = static_cast<std::byte*>(const_cast<void*>(shared)), copy.bytes = bytes, copy.where = where;
  copy.runs.push_back({static_cast<std::byte*>(global), 0, bytes});
  begin_store(std::move(copy));
}

void tensor_to_shared(void* shared, const TensorMap& map, Mbarrier* barrier, std::array<int, 5> at, size_t rank,
                      uint32_t blocks, Where where) {
  const Copy copy = box_of(map, shared, at, rank, where);
  must_be_in_shared(shared, copy.bytes, where);
  begin_in(copy, barrier, blocks);
}

void tensor_to_global(const TensorMap& map, const void* shared, std::array<int, 5> at, size_t rank, Where where) {
  Copy copy = box_of(map, const_cast<void*>(shared), at, rank, where);
  must_be_in_shared(shared, copy.bytes, where);
  begin_store(std::move(copy));
}

void commit_bulk_copies() {
  BulkCopies& mine = bulk_copies_of(*current);
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void wait_for_bulk_copies(size_t but_groups, bool only_reads, Where) {
  BulkCopies& mine = bulk_copies_of(*current);
  const size_t done = mine.groups.size() > but_groups ? mine.groups.size() - but_groups : 0;
  for (size_t i = 0; i < done; ++i) {
    for (Copy& copy : mine.groups[i]) {
      read_source(copy);
      if (!only_reads) write_result(copy);
    }
  }
  if (!only_reads) mine.groups.erase(mine.groups.begin(), mine.groups.begin() + static_cast<ptrdiff_t>(done));
}

}  // namespace fused_ops::emulation
