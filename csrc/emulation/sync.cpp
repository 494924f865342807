// What common/sync.cuh's twin does.
#include <algorithm>
#include <cstring>

#include "emulation/common/sync.cuh"

namespace fused_ops::emulation {

namespace {

constexpr std::array<const char*, 16> kSyncs{
    "bar.sync 0",  "bar.sync 1",  "bar.sync 2",  "bar.sync 3", "bar.sync 4",  "bar.sync 5",
    "bar.sync 6",  "bar.sync 7",  "bar.sync 8",  "bar.sync 9", "bar.sync 10", "bar.sync 11",
    "bar.sync 12", "bar.sync 13", "bar.sync 14", "bar.sync 15"};
constexpr std::array<const char*, 16> kArrivals{
    "bar.arrive 0",  "bar.arrive 1",  "bar.arrive 2",  "bar.arrive 3", "bar.arrive 4",  "bar.arrive 5",
    "bar.arrive 6",  "bar.arrive 7",  "bar.arrive 8",  "bar.arrive 9", "bar.arrive 10", "bar.arrive 11",
    "bar.arrive 12", "bar.arrive 13", "bar.arrive 14", "bar.arrive 15"};

void must_be_aligned(const void* address, size_t bytes, const Where& where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail("an atomic access to an address that is no multiple of " + std::to_string(bytes), where);
  }
}

}  // namespace

void counted_barrier(uint32_t id, uint32_t threads, bool wait, Where where) {
  const Block& block = *current->block;
  if (id == 0 || id >= 16) fail("barrier " + std::to_string(id) + ", 1 to 15 are for counted ones", where);
  if (threads == 0 || threads % 32 != 0) {
    fail("barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads, no multiple of 32", where);
  }
  if (threads > (block.threads.size() + 31) / 32 * 32) {
    fail("barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads, the block has " +
             std::to_string(block.threads.size()), where);
  }
  if (block.warps[current->warp()].lanes != 0xffffffffu) fail("a counted barrier in a warp of fewer than 32 threads", where);
  uint32_t counted = threads;
  collective(wait ? kSyncs[id] : kArrivals[id], 0xffffffffu, counted, [&](Lanes<uint32_t>& lanes) {
    if (std::ranges::all_of(lanes, [&](const uint32_t* lane) { return *lane == threads; })) return;
    fail("lanes of one warp come to barrier " + std::to_string(id) + " with different counts", where);
  }, where);
  current->block->barriers[id].arrive(threads, wait, where);
}

void atomic_load(void* result, const void* address, size_t bytes, bool acquires, Scope scope, Where where) {
  must_be_aligned(address, bytes, where);
  check::atomic(const_cast<void*>(address), bytes, true, false, acquires, false, scope, where);
  std::memcpy(result, address, bytes);
}

void atomic_store(void* address, const void* value, size_t bytes, bool releases, Scope scope, Where where) {
  must_be_aligned(address, bytes, where);
  check::atomic(address, bytes, false, true, false, releases, scope, where);
  std::memcpy(address, value, bytes);
  made_progress();
}

void atomic_change(void* address, size_t bytes, bool orders, Scope scope, Where where) {
  must_be_aligned(address, bytes, where);
  check::atomic(address, bytes, true, true, orders, orders, scope, where);
  made_progress();
}

}  // namespace fused_ops::emulation
