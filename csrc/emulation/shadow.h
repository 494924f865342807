// What the checker's files share: what is remembered of every unit of memory, and who knows of whom.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "emulation/check.h"
#include "emulation/runtime.h"

namespace fused_ops::emulation::check {

// Accesses of threads of one warp at one clock.
struct Access {
  uint32_t block = 0, warp = 0;  // from kCopies on: the block's asynchronous operations, a lane for each Copier
  uint32_t lanes = 0, clock = 0, site = 0;
};
constexpr uint32_t kCopies = 32, kCopiers = 64;
constexpr uint32_t kMbarriers = 32;  // Copiers below are mbarriers', those above warps' wgmma

struct Cell {
  uint32_t life = 0;  // of the launch or block it speaks of; otherwise it is empty
  bool written : 1, atomic : 1, in_flight : 1;
  uint16_t in_use = 0;  // asynchronous reads under way
  uint32_t more = 0;    // further readers: an index of `readers`, plus one
  Access write, read;
};

// Memory that may be touched.
struct Range {
  uintptr_t start = 0, end = 0;
  uint32_t unit_bits = 0, life = 0;  // shared memory is remembered byte by byte
  bool writable = true;
  std::unique_ptr<Cell, void (*)(void*)> cells{nullptr, std::free};  // zeroed, one a unit

  bool holds(uintptr_t first, uintptr_t last) const { return first >= start && last <= end; }
  void make_cells() {
    const size_t count = ((end - start) >> unit_bits) + 2;
    cells.reset(static_cast<Cell*>(std::calloc(count, sizeof(Cell))));
  }
};

extern std::vector<std::vector<Access>> readers;
extern uint32_t threads_of_block;

// check.cpp
bool is_shared(const Range& range);
uint32_t site_of(const void* pc);
uint32_t site_of(const Where& where);
std::string line_at(uint32_t site);
std::string describe(const Access& access);
[[noreturn]] void report(const std::string& what, uint32_t site);
std::string place_in(const Range& range, uintptr_t first);
void touch(Thread& self, Range& range, uintptr_t first, uintptr_t last, Kind kind, uint32_t site);
// The memory that holds an access, or null; `owner`: whose shared memory it is.
Range* find(uintptr_t first, uintptr_t last, Block** owner = nullptr);

// order.cpp
void learn(Thread& thread, const Ref<Knowledge>& knowledge);
bool knows(const Thread& self, const Access& access);
bool holds(const Knowledge* knowledge, const Access& access);
void forget_atomics();

// in_flight.cpp
// What keeps others from writing to memory, as "which ...", and where it began.
std::pair<std::string, uint32_t> user_of(uintptr_t address);
void touch_remote(Block& owner, uint32_t site);
void must_be_alive(const Block& owner, uint32_t site);  // a block of the cluster
// An mbarrier's memory, which is for its own operations only.
void guard(const void* address, size_t bytes, const Where& where);
void unguard(const void* address, size_t bytes, const Where& where);
void forget_in_flight();

}  // namespace fused_ops::emulation::check
