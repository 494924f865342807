#include "emulation/check.h"

#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "emulation/fiber.h"
#include "emulation/runtime.h"
#include "emulation/shadow.h"
#include "emulation/symbols.h"

namespace fused_ops::emulation::check {

std::vector<std::vector<Access>> readers;
uint32_t threads_of_block = 0;

namespace {

constexpr uint64_t kEndless = 1u << 22;  // accesses of one thread while no other has run
constexpr uint32_t kWhereSites = 1u << 31;  // sites above are indices of `wheres`, those below offsets of code

struct SharedMemory {
  Range all;
  std::vector<std::pair<size_t, size_t>> parts;  // what is declared: offset, bytes
  size_t last = 0;
};

std::vector<Range> global;  // writable ones first
std::vector<SharedMemory> shared;  // by the block's slot
std::vector<Where> wheres;
Range arguments;
uintptr_t image_start = 0, image_end = 0;
uint32_t lives = 0, launch_life = 0;

uint32_t slot_of(const Block& block) { return block.slot; }

void find_image() {
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        const auto here = reinterpret_cast<uintptr_t>(&find_image);
        uintptr_t low = UINTPTR_MAX, high = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
          low = std::min(low, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
          high = std::max(high, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
        }
        if (here < low || here >= high) return 0;
        image_start = low, image_end = high;
        return 1;
      },
      nullptr);
}

}  // namespace

uint32_t site_of(const void* pc) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc) - image_start); }

uint32_t site_of(const Where& where) {
  for (size_t i = wheres.size(); i-- > 0 && i + 64 > wheres.size();) {
    if (wheres[i].line() == where.line() && wheres[i].file_name() == where.file_name()) {
      return kWhereSites | static_cast<uint32_t>(i);
    }
  }
  wheres.push_back(where);
  return kWhereSites | static_cast<uint32_t>(wheres.size() - 1);
}

std::string line_at(uint32_t site) {
  if (site & kWhereSites) return line_of(wheres[site & ~kWhereSites]);
  return line_of_code(reinterpret_cast<const void*>(image_start + site));
}

const char* verb(Kind kind) {
  return kind == Kind::write ? "writes" : kind == Kind::atomic ? "updates" : "reads";
}

void report(const std::string& what, uint32_t site) { fail(what + " (" + line_at(site) + ")", Where()); }

std::string describe(const Access& access) {
  const dim3 g = gridDim;
  std::string text = "block (" + std::to_string(access.block % g.x) + ", " + std::to_string(access.block / g.x % g.y) +
                     ", " + std::to_string(access.block / g.x / g.y) + ")";
  if (access.warp == kCopies) return text + "'s asynchronous copy";
  if (access.warp > kCopies) return text + "'s wgmma";
  return text + " warp " + std::to_string(access.warp) + " lane " + std::to_string(__builtin_ctz(access.lanes));
}

namespace {

// The lanes of `access` that this thread does not know of.
Access unknown(const Thread& self, Access access) {
  for (uint32_t lanes = access.lanes; lanes != 0; lanes &= lanes - 1) {
    Access one = access;
    one.lanes = lanes & -lanes;
    if (!knows(self, one)) return one;
  }
  return access;
}

}  // namespace

bool is_shared(const Range& range) { return &range < global.data() || &range >= global.data() + global.size(); }

std::string place_in(const Range& range, uintptr_t first) {
  return (is_shared(range) ? "shared memory, byte " : "a tensor, byte ") + std::to_string(first - range.start);
}

void touch(Thread& self, Range& range, uintptr_t first, uintptr_t last, Kind kind, uint32_t site) {
  Cell* cell = range.cells.get() + ((first - range.start) >> range.unit_bits);
  Cell* const end = range.cells.get() + ((last - 1 - range.start) >> range.unit_bits) + 1;
  const Access mine{self.block->linear, self.warp(), 1u << self.lane(), self.clock, site};
  for (; cell != end; ++cell) {
    if (cell->life != range.life) {
      cell->life = range.life, cell->written = cell->atomic = cell->in_flight = false, cell->in_use = 0, cell->more = 0;
      cell->write = cell->read = Access{};
    }
    const auto at = [&] {
      return place_in(range, range.start + (static_cast<uintptr_t>(cell - range.cells.get()) << range.unit_bits));
    };
    if (cell->in_flight) {
      report(std::string(verb(kind)) + " " + at() + ", where an asynchronous copy by " + describe(cell->write) +
                 " has not been waited for (" + line_at(cell->write.site) + ")", site);
    }
    const bool reads = kind == Kind::read || kind == Kind::look;
    if (cell->in_use > 0 && !reads) {
      const auto [use, since] = user_of(range.start + (static_cast<uintptr_t>(cell - range.cells.get()) << range.unit_bits));
      report(std::string(verb(kind)) + " " + at() + ", which " + use + " (" + line_at(since) + ")", site);
    }
    const bool both_atomic = kind == Kind::atomic && cell->atomic;
    if (!both_atomic && !knows(self, cell->write)) {
      report(std::string("race: ") + verb(kind) + " " + at() + ", which " + describe(cell->write) + " wrote (" +
                 line_at(cell->write.site) + ") with no order between the two", site);
    }
    if (reads) {
      if (!cell->written && is_shared(range)) report("reads " + at() + ", which nobody has written", site);
      if (kind == Kind::look) continue;
      if (cell->read.clock == 0 || (cell->more == 0 && knows(self, cell->read))) {
        cell->read = mine;
        continue;
      }
      const auto merge = [&](Access& access) {
        if (access.block != mine.block || access.warp != mine.warp || access.clock != mine.clock) return false;
        access.lanes |= mine.lanes;
        return true;
      };
      if (merge(cell->read)) continue;
      if (cell->more == 0) readers.emplace_back(), cell->more = static_cast<uint32_t>(readers.size());
      auto& list = readers[cell->more - 1];
      if (!list.empty() && merge(list.back())) continue;
      if (!std::ranges::any_of(list, merge)) {
        if (list.size() % 64 == 63) std::erase_if(list, [&](const Access& access) { return knows(self, access); });
        list.push_back(mine);
      }
      continue;
    }
    const auto refuse = [&](const Access& access) {
      if (knows(self, access)) return;
      const Access other = unknown(self, access);
      report(std::string("race: ") + verb(kind) + " " + at() + ", which " + describe(other) + " read (" +
                 line_at(other.site) + ") with no order between the two", site);
    };
    refuse(cell->read);
    if (cell->more != 0) for (const Access& access : readers[cell->more - 1]) refuse(access);
    cell->written = true, cell->atomic = kind == Kind::atomic;
    cell->write = mine, cell->read = Access{}, cell->more = 0;
  }
}

namespace {

[[noreturn]] void out_of_bounds(uintptr_t first, size_t bytes, Kind kind, uint32_t site) {
  std::string nearest;
  uintptr_t closest = UINTPTR_MAX;
  const auto consider = [&](uintptr_t start, uintptr_t end, const std::string& name) {
    const bool before = first < start;
    const uintptr_t distance = before ? start - first : first >= end ? first - end : 0;
    if (distance >= closest) return;
    closest = distance;
    nearest = (distance == 0 && !before ? std::string("across or at") : std::to_string(distance) + " bytes " + (before ? "before the start of" : "past")) +
              (before ? " " : " the end of ") + name + " of " + std::to_string(end - start) + " bytes";
  };
  for (const Range& range : global) consider(range.start, range.end, range.writable ? "an output" : "an input");
  const auto base = reinterpret_cast<uintptr_t>(current->block->shared);
  for (const auto& [at, size] : shared[slot_of(*current->block)].parts) consider(base + at, base + at + size, "shared memory");
  report("out of bounds: " + std::string(verb(kind)) + " " + std::to_string(bytes) + " bytes " + nearest, site);
}

// The part of some block's shared memory that holds an access, or null.
Range* find_shared(const Block& block, uintptr_t first, uintptr_t last) {
  SharedMemory& memory = shared[slot_of(block)];
  const auto base = reinterpret_cast<uintptr_t>(block.shared);
  for (size_t i = 0; i < memory.parts.size(); ++i) {
    const auto& [at, size] = memory.parts[(memory.last + i) % memory.parts.size()];
    if (first < base + at || last > base + at + size) continue;
    memory.last = (memory.last + i) % memory.parts.size();
    return &memory.all;
  }
  return nullptr;
}

}  // namespace

Range* find(uintptr_t first, uintptr_t last, Block** owner) {
  Block& mine = *current->block;
  if (owner != nullptr) *owner = &mine;
  if (Range* found = find_shared(mine, first, last)) return found;
  for (Range& range : global) if (range.holds(first, last)) return &range;
  for (Block* block : mine.in_cluster->blocks) {
    Range* found = block != &mine ? find_shared(*block, first, last) : nullptr;
    if (found == nullptr) continue;
    if (owner != nullptr) *owner = block;
    return found;
  }
  return nullptr;
}

namespace {

template <typename Site>
void access_at(const void* address, size_t bytes, Kind kind, const Site& where) {
  Thread* self = current;
  if (self == nullptr || self->block == nullptr || !checked || suspended || bytes == 0) return;
  if (++accesses_since_switch > kEndless) report("runs without end: a loop that waits must poll", site_of(where));
  const auto first = reinterpret_cast<uintptr_t>(address), last = first + bytes;
  const auto stack = reinterpret_cast<uintptr_t>(self->stack);
  if (first >= stack && last <= stack + kStackBytes) {
    if (self->registers) touch_registers(*self->registers, first, last, kind != Kind::read, line_at, site_of(where));
    return;
  }
  if (first >= image_start && last <= image_end) return;
  Block* owner;
  if (Range* range = find(first, last, &owner)) {
    if (owner != self->block) touch_remote(*owner, site_of(where));
    if (range->writable) return touch(*self, *range, first, last, kind, site_of(where));
    if (kind == Kind::read || kind == Kind::look) return;
    report(std::string(verb(kind)) + " an input, byte " + std::to_string(first - range->start), site_of(where));
  }
  if ((kind == Kind::read || kind == Kind::look) && arguments.holds(first, last)) return;
  out_of_bounds(first, bytes, kind, site_of(where));
}

}  // namespace

void start_launch(const Shape& shape, const void* launch_arguments, size_t bytes) {
  if (image_end == 0) find_image();
  launch_life = ++lives;
  threads_of_block = shape.block.x * shape.block.y * shape.block.z;
  arguments.start = reinterpret_cast<uintptr_t>(launch_arguments), arguments.end = arguments.start + bytes;
  for (Range& range : global) range.life = launch_life;
  readers.clear(), forget_atomics(), forget_in_flight();
}

void end_launch() { readers.clear(), forget_atomics(), forget_in_flight(), wheres.clear(); }

void start_block(Block& block) {
  if (shared.size() <= slot_of(block)) shared.resize(slot_of(block) + 1);
  SharedMemory& memory = shared[slot_of(block)];
  memory.all.start = reinterpret_cast<uintptr_t>(block.shared);
  memory.all.end = memory.all.start + chip.shared_per_block;
  memory.all.life = ++lives;
  if (!memory.all.cells) memory.all.make_cells();
  memory.parts.clear();
  if (block.dynamic_bytes > 0) memory.parts.emplace_back(0, block.dynamic_bytes);
}

void add_shared(Block& block, size_t at, size_t bytes) { shared[slot_of(block)].parts.emplace_back(at, bytes); }

void add_range(const void* start, size_t bytes, size_t element, bool writable) {
  Range range;
  range.start = reinterpret_cast<uintptr_t>(start), range.end = range.start + bytes;
  range.unit_bits = element >= 4 ? 2 : element == 2 ? 1 : 0;
  range.writable = writable;
  if (writable) range.make_cells();
  global.insert(writable ? global.begin() : global.end(), std::move(range));
}

size_t ranges() { return global.size(); }

void drop_ranges_to(size_t count) {
  if (count == 0) global.clear();
}

void access(const void* address, size_t bytes, Kind kind, const void* pc) { access_at(address, bytes, kind, pc); }
void access(const void* address, size_t bytes, Kind kind, const Where& where) {
  access_at(address, bytes, kind, where);
}

}  // namespace fused_ops::emulation::check
