// Asynchronous operations' accesses between their issue and their completion, and accesses to other blocks' memory.
#include <algorithm>
#include <string>
#include <unordered_map>

#include "emulation/shadow.h"

namespace fused_ops::emulation::check {
namespace {

struct Reading {
  uintptr_t first, last;
  Access by;
  bool is_mbarrier;
};
bool recording = true;  // what is done to other blocks' memory
std::unordered_multimap<uintptr_t, Reading> readings;  // by their first byte

struct Cells {
  Cell* begin_ = nullptr;
  Cell* end_ = nullptr;
  Range* range = nullptr;
  Cell* begin() const { return begin_; }
  Cell* end() const { return end_; }
};

// What is remembered of memory that may be written.
Cells cells_of(const void* address, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(address), last = first + bytes;
  Range* range = bytes > 0 ? find(first, last) : nullptr;
  if (range == nullptr || !range->writable) return {};
  Cell* cells = range->cells.get();
  return {cells + ((first - range->start) >> range->unit_bits),
          cells + ((last - 1 - range->start) >> range->unit_bits) + 1, range};
}

Access epoch(const Where& where, const Copier* by) {
  if (by != nullptr) return {by->block, kCopies + by->slot / 32, 1u << by->slot % 32, by->clock, site_of(where)};
  const Thread& self = *current;
  return {self.block->linear, self.warp(), 1u << self.lane(), self.clock, site_of(where)};
}

void must_be_shown(const Access& write, const char* what, const Where& where) {
  if (write.warp >= kCopies || holds(current->shown_to_copies.get(), write)) return;
  report(std::string("an asynchronous operation ") + what + " what " + describe(write) + " wrote (" +
             line_at(write.site) + ") without a proxy fence by that thread between the two",
         site_of(where));
}

}  // namespace

void begin_write(void* address, size_t bytes, const Where& where) {
  if (!checked) return;
  write(address, bytes, where);
  for (Cell& cell : cells_of(address, bytes)) cell.in_flight = true;
}

void begin_async_write(void* address, size_t bytes, const Where& where) {
  if (!checked) return;
  const Cells cells = cells_of(address, bytes);
  std::vector<Access> before;
  for (const Cell& cell : cells) {
    if (cell.life == cells.range->life &&
        (before.empty() || before.back().clock != cell.write.clock || before.back().lanes != cell.write.lanes ||
         before.back().warp != cell.write.warp)) {
      before.push_back(cell.write);
    }
  }
  recording = false;  // whoever waits for the copy knows that it is over
  begin_write(address, bytes, where);
  recording = true;
  for (const Access& write : before) must_be_shown(write, "overwrites", where);
}

void end_write(void* address, size_t bytes, const Where& where, const Copier* by) {
  if (!checked) return;
  const Access mine = epoch(where, by);
  for (Cell& cell : cells_of(address, bytes)) cell.in_flight = false, cell.written = true, cell.write = mine;
}

void begin_async_read(const void* address, size_t bytes, const Where& where) {
  if (!checked) return;
  access(address, bytes, Kind::look, where);
  const Cells cells = cells_of(address, bytes);
  if (cells.range == nullptr) return;
  for (Cell& cell : cells) must_be_shown(cell.write, "reads", where), ++cell.in_use;
  const auto first = reinterpret_cast<uintptr_t>(address);
  readings.insert({first, {first, first + bytes, epoch(where, nullptr), false}});
}

void guard(const void* address, size_t bytes, const Where& where) {
  if (!checked) return;
  for (Cell& cell : cells_of(address, bytes)) ++cell.in_use;
  const auto first = reinterpret_cast<uintptr_t>(address);
  readings.insert({first, {first, first + bytes, epoch(where, nullptr), true}});
}

void unguard(const void* address, size_t bytes, const Where&) {
  if (!checked) return;
  for (Cell& cell : cells_of(address, bytes)) --cell.in_use;
  const auto first = reinterpret_cast<uintptr_t>(address);
  std::erase_if(readings, [&](const auto& entry) { return entry.first == first && entry.second.is_mbarrier; });
}

void end_read(const void* address, size_t bytes, const Where& where, const Copier* by) {
  if (!checked) return;
  const Cells cells = cells_of(address, bytes);
  if (cells.range == nullptr) return;
  const Access mine = epoch(where, by);
  for (Cell& cell : cells) {
    --cell.in_use;
    if (cell.read.clock == 0) {
      cell.read = mine;
      continue;
    }
    if (cell.more == 0) readers.emplace_back(), cell.more = static_cast<uint32_t>(readers.size());
    auto& list = readers[cell.more - 1];
    const auto same = [&](const Access& other) {
      return other.block == mine.block && other.warp == mine.warp && other.lanes == mine.lanes;
    };
    const auto older = std::ranges::find_if(list, same);
    if (older != list.end()) *older = mine;
    else list.push_back(mine);
  }
  const auto first = reinterpret_cast<uintptr_t>(address);
  auto [candidate, end] = readings.equal_range(first);
  while (candidate != end && (candidate->second.is_mbarrier || candidate->second.last != first + bytes)) ++candidate;
  if (candidate != end) readings.erase(candidate);
}

std::pair<std::string, uint32_t> user_of(uintptr_t address) {
  for (const auto& [first, reading] : readings) {
    if (address < reading.first || address >= reading.last) continue;
    return {reading.is_mbarrier ? "holds an mbarrier"
                                : "an asynchronous operation of " + describe(reading.by) + " still reads",
            reading.by.site};
  }
  return {"is in use", site_of(Where())};
}

void forget_in_flight() {
  readings.clear();
  recording = true;
}

void must_be_alive(const Block& owner, uint32_t site) {
  const Thread& self = *current;
  const std::string whose = "the shared memory of block (" + std::to_string(owner.index.x) + ", " +
                            std::to_string(owner.index.y) + ", " + std::to_string(owner.index.z) + ")";
  if (owner.exited == owner.threads.size()) report("touches " + whose + ", which has exited", site);
  const bool started = self.cluster_waits > 0 || (self.knows && self.knows->find(owner.linear) != nullptr);
  if (!started) {
    report("touches " + whose + ", which may not have started: no barrier of the cluster came before", site);
  }
}

void touch_remote(Block& owner, uint32_t site) {
  must_be_alive(owner, site);
  if (!recording) return;
  const Thread& self = *current;
  const Access mine{self.block->linear, self.warp(), 1u << self.lane(), self.clock, site};
  for (RemoteAccess& known : owner.remote_accesses) {
    if (known.block == mine.block && known.number == self.number) {
      known.clock = mine.clock, known.site = site;
      return;
    }
  }
  owner.remote_accesses.push_back({mine.block, self.number, mine.clock, site});
}

void end_block(Block& block) {
  for (const RemoteAccess& remote : block.remote_accesses) {
    const Access access{remote.block, remote.number / 32, 1u << remote.number % 32, remote.clock, remote.site};
    if (std::ranges::any_of(block.threads, [&](const Thread& thread) { return knows(thread, access); })) continue;
    report("its block exits while " + describe(access) + " may still touch its shared memory (" + line_at(access.site) +
               "): nothing orders the two", site_of(Where()));
  }
}

}  // namespace fused_ops::emulation::check
