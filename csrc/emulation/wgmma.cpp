// What common/wgmma.cuh's twin does.
#include "emulation/builtins.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>

#include "emulation/common/wgmma.cuh"
#include "emulation/fiber.h"
#include "emulation/shadow.h"

namespace fused_ops::emulation {

namespace check {

// Words of a thread's stack: those a wgmma in flight uses, and when each was touched last, in number of fences.
struct Registers {
  struct InFlight {
    uintptr_t first, last;
    uint32_t site;
  };
  struct Touch {
    uint32_t fences, site;
  };
  uint32_t fences = 0;
  uintptr_t stack = 0;
  std::vector<InFlight> in_flight;
  std::unique_ptr<Touch, void (*)(void*)> touches{nullptr, std::free};
};

void touch_registers(Registers& registers, uintptr_t first, uintptr_t last, bool write, std::string (*line)(uint32_t),
                     uint32_t site) {
  for (const Registers::InFlight& used : registers.in_flight) {
    if (last <= used.first || first >= used.last) continue;
    report(std::string(write ? "writes" : "reads") + " registers of a wgmma that has not been waited for (" +
               line(used.site) + ")", site);
  }
  for (uintptr_t at = first; at < last; at += 4) {
    registers.touches.get()[(at - registers.stack) / 4] = {registers.fences, site};
  }
}

}  // namespace check

using check::Registers;

namespace {

// Accumulators of a warp that products under way add to.
struct Accumulators {
  std::array<float*, 32> of;  // by lane
  uint32_t count;
  std::vector<float> values;  // by lane, then register
  uint32_t uses = 0;
};

struct Operand {
  const std::byte* from;
  uint32_t bytes;
};

struct Product {
  Wgmma what;
  std::shared_ptr<Accumulators> d;
  std::array<std::array<uint32_t, 4>, 32> a;  // fragments in registers
  std::array<const uint32_t*, 32> a_at;
  std::vector<Operand> reads;
  Where where;
};

struct WarpProducts {
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  check::Copier copier;   // whose reads these are...
  check::Signal complete;  // ...which a wait tells to all lanes
  size_t issued = 0;
  uint32_t registers = 0, wanted = 0;
};

struct Operands {
  float* d;
  const uint32_t* a;
  bool last;
};

}  // namespace

struct WarpgroupOperations {
  std::vector<WarpProducts> warps;
  std::vector<std::deque<std::pair<Wgmma, Where>>> issued;  // by warpgroup: those that not all of its warps have issued
  std::vector<size_t> forgotten;                            // how many were before
  uint32_t free_registers = 0;
};

namespace {

constexpr uint32_t kRegisterFile = 64 * 1024;  // of a multiprocessor, in words

WarpgroupOperations& operations_of(Block& block) {
  if (block.warpgroups == nullptr) {
    auto mine = std::make_shared<WarpgroupOperations>();
    mine->warps.resize(block.warps.size());
    mine->issued.resize((block.warps.size() + 3) / 4), mine->forgotten.resize(mine->issued.size());
    const auto each = std::min<uint32_t>(kRegisterFile / static_cast<uint32_t>(block.warps.size() * 32) / 8 * 8, 256);
    for (uint32_t i = 0; i < mine->warps.size(); ++i) {
      mine->warps[i].registers = each, mine->warps[i].copier = {block.linear, check::kMbarriers + i, 1};
    }
    block.warpgroups = mine.get();
    block.attached.push_back(std::move(mine));
  }
  return *block.warpgroups;
}

WarpProducts& products_of(const Thread& thread) { return operations_of(*thread.block).warps[thread.warp()]; }

void must_be_a_warpgroup(const char* what, const Where& where) {
  const auto& warps = current->block->warps;
  const size_t first = current->warp() / 4 * 4;
  for (size_t i = first; i < first + 4; ++i) {
    if (i < warps.size() && warps[i].lanes == 0xffffffffu) continue;
    fail(std::string(what) + " in a warpgroup of fewer than 128 threads", where);
  }
}

// All lanes of the warp; true for the last one to come, before the others go on.
bool come_together(const char* kind, const Where& where) {
  must_be_a_warpgroup(kind, where);
  bool last = false;
  collective(kind, 0xffffffffu, last, [](Lanes<bool>& lanes) { *lanes[current->lane()] = true; }, where);
  return last;
}

// The fields of a descriptor, in bytes.
struct Layout {
  uint32_t start, leading, stride;
  Swizzle swizzle;
};

Layout decode(uint64_t descriptor, const char* name, const Where& where) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  constexpr std::array<Swizzle, 4> kModes{Swizzle::none, Swizzle::bytes128, Swizzle::bytes64, Swizzle::bytes32};
  const Layout layout{field(0), field(16), field(32), kModes[descriptor >> 62]};
  if (descriptor >> 49 & 7) {
    fail(std::string("a descriptor of ") + name + " with a base offset, which is not modelled", where);
  }
  const uint32_t row = swizzle_bytes(layout.swizzle);
  if (layout.swizzle != Swizzle::none && layout.start % (8 * row) >= std::max(row, 128u)) {
    fail(std::string("operand ") + name +
             " of a wgmma does not start in the first row of its swizzle's pattern, which starts at "
             "multiples of " +
             std::to_string(8 * row) + " bytes",
         where);
  }
  return layout;
}

// "Strides" and "Canonical layouts": where element (i of M or N, k) lies, in bytes of shared memory.
uint32_t place_of(const Layout& layout, Major major, uint32_t element_bytes, uint32_t i, uint32_t k) {
  const uint32_t in_chunk = 16 / element_bytes, row = swizzle_bytes(layout.swizzle);
  const bool plain = layout.swizzle == Swizzle::none;
  uint32_t at = layout.start;
  if (major == Major::k) {
    at += i % 8 * row + i / 8 * layout.stride + k / in_chunk * (plain ? layout.leading : 16) +
          k % in_chunk * element_bytes;
  } else if (plain) {
    at += i / in_chunk * layout.stride + k % 8 * 16 + k / 8 * layout.leading + i % in_chunk * element_bytes;
  } else {
    const uint32_t chunk = i / in_chunk, chunks = row / 16;
    at += chunk % chunks * 16 + chunk / chunks * layout.leading + k % 8 * row + k / 8 * layout.stride +
          i % in_chunk * element_bytes;
  }
  return swizzled(at, layout.swizzle);
}

uint32_t element_bytes(WgmmaType type) { return type == WgmmaType::tf32 ? 4 : 2; }
uint32_t depth(WgmmaType type) { return type == WgmmaType::tf32 ? 8 : 16; }

float value_of(WgmmaType type, uint32_t bits) {
  if (type == WgmmaType::tf32) return std::bit_cast<float>(bits & 0xffffe000u);
  if (type == WgmmaType::bfloat) return std::bit_cast<float>(bits << 16);
  const auto half = static_cast<uint16_t>(bits);
  return __half2float(std::bit_cast<__half>(half));
}

// Where an operand's rows [first, first + count) are, in runs without gaps.
std::vector<Operand> runs_of(const Layout& layout, Major major, WgmmaType type, uint32_t first, uint32_t count) {
  const uint32_t bytes = element_bytes(type), in_chunk = 16 / bytes;
  std::vector<uint32_t> chunks;
  if (major == Major::k) {
    for (uint32_t i = 0; i < count; ++i) {
      for (uint32_t k = 0; k < depth(type); k += in_chunk) {
        chunks.push_back(place_of(layout, major, bytes, first + i, k));
      }
    }
  } else {
    for (uint32_t i = 0; i < count; i += in_chunk) {
      for (uint32_t k = 0; k < depth(type); ++k) chunks.push_back(place_of(layout, major, bytes, first + i, k));
    }
  }
  std::ranges::sort(chunks);
  const std::byte* shared = current->block->shared;
  std::vector<Operand> runs;
  for (const uint32_t at : chunks) {
    if (!runs.empty() && runs.back().from + runs.back().bytes == shared + at) runs.back().bytes += 16;
    else runs.push_back({shared + at, 16});
  }
  return runs;
}

// Rows [first, first + count) of an operand, K values each.
std::vector<float> values_of(uint64_t descriptor, const char* name, Major major, WgmmaType type, uint32_t first,
                             uint32_t count, const Where& where) {
  const Layout layout = decode(descriptor, name, where);
  const uint32_t bytes = element_bytes(type), deep = depth(type);
  std::vector<float> values(size_t{count} * deep);
  for (uint32_t i = 0; i < count; ++i) {
    for (uint32_t k = 0; k < deep; ++k) {
      uint32_t bits = 0;
      std::memcpy(&bits, current->block->shared + place_of(layout, major, bytes, first + i, k), bytes);
      values[size_t{i} * deep + k] = value_of(type, bits);
    }
  }
  return values;
}

// "Register Fragments": of A, lane l's register r holds row l / 4 (+ 8 for odd r), and columns by l % 4 (the latter
// half from r = 2 on).
std::vector<float> fragments_of(const Product& product) {
  const WgmmaType type = product.what.type;
  const uint32_t deep = depth(type);
  std::vector<float> values(size_t{16} * deep);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t r = 0; r < 4; ++r) {
      const size_t row = lane / 4 + r % 2 * 8, register_bits = product.a[lane][r];
      float* to = values.data() + row * deep + r / 2 * (deep / 2);
      if (type == WgmmaType::tf32) to[lane % 4] = value_of(type, static_cast<uint32_t>(register_bits));
      else
        for (uint32_t i = 0; i < 2; ++i) {
          to[lane % 4 * 2 + i] = value_of(type, static_cast<uint32_t>(register_bits >> 16 * i & 0xffff));
        }
    }
  }
  return values;
}

// "Register Fragments": of D, lane l's register 4 j + 2 h + i is row l / 4 + 8 h, column 8 j + 2 (l % 4) + i.
void compute(const Product& product) {
  const Wgmma& what = product.what;
  const uint32_t deep = depth(what.type), first_row = current->warp() % 4 * 16;
  const std::vector<float> a = what.a_in_registers
                                   ? fragments_of(product)
                                   : values_of(what.a, "A", what.a_major, what.type, first_row, 16, product.where);
  const std::vector<float> b = values_of(what.b, "B", what.b_major, what.type, 0, what.n, product.where);
  Accumulators& d = *product.d;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t r = 0; r < d.count; ++r) {
      const float* row = a.data() + size_t{lane / 4 + r / 2 % 2 * 8} * deep;
      const float* column = b.data() + size_t{r / 4 * 8 + lane % 4 * 2 + r % 2} * deep;
      float& into = d.values[size_t{lane} * d.count + r];
      double sum = what.accumulates ? into : 0.0;
      for (uint32_t k = 0; k < deep; ++k) sum += double{row[k]} * column[k];
      into = static_cast<float>(sum);
    }
  }
}

void must_be_fenced(const Thread& thread, const void* first, size_t words, const char* what, const Where& where) {
  if (!checked) return;
  const Registers* registers = thread.registers;
  if (registers == nullptr) fail("a wgmma with no wgmma_fence before", where);
  const auto at = (reinterpret_cast<uintptr_t>(first) - registers->stack) / 4;
  if (at + words > kStackBytes / 4) {
    fail(std::string("the ") + what + " of a wgmma are not registers: they lie outside the thread's own variables",
         where);
  }
  for (size_t i = at; i < at + words; ++i) {
    const Registers::Touch& touch = registers->touches.get()[i];
    if (touch.site == 0 || touch.fences < registers->fences) continue;
    fail(std::string("the ") + what + " of a wgmma were touched after the last wgmma_fence (" +
             check::line_at(touch.site) + ")",
         where);
  }
}

void fly(Thread& thread, const void* first, size_t words, const Where& where) {
  if (!checked) return;
  const auto at = reinterpret_cast<uintptr_t>(first);
  thread.registers->in_flight.push_back({at, at + words * 4, check::site_of(where)});
}

void land(Thread& thread, const void* first) {
  if (!checked) return;
  auto& flying = thread.registers->in_flight;
  const auto found = std::ranges::find(flying, reinterpret_cast<uintptr_t>(first), &Registers::InFlight::first);
  if (found != flying.end()) flying.erase(found);
}

// The accumulators of products under way that start at d, or those of `lanes`, which then hold NaN.
std::shared_ptr<Accumulators> take(WarpProducts& warp, const std::array<Operands, 32>& lanes, uint32_t count,
                                   const Where& where) {
  const auto same = [&](const Product& product) { return product.d->of[0] == lanes[0].d; };
  std::shared_ptr<Accumulators> found;
  for (const Product& product : warp.open) if (same(product)) found = product.d;
  for (const auto& group : warp.groups) for (const Product& product : group) if (same(product)) found = product.d;
  if (found) {
    if (found->count != count) {
      fail("wgmmas of different shapes on the same accumulators with no wait in between", where);
    }
    return found;
  }
  found = std::make_shared<Accumulators>();
  found->count = count, found->values.resize(size_t{32} * count);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    Thread& thread = current->block->threads[current->warp() * 32 + lane];
    must_be_fenced(thread, lanes[lane].d, count, "accumulators", where);
    fly(thread, lanes[lane].d, count, where);
    found->of[lane] = lanes[lane].d;
    std::copy(lanes[lane].d, lanes[lane].d + count, found->values.begin() + lane * count);
    std::fill(lanes[lane].d, lanes[lane].d + count, std::numeric_limits<float>::quiet_NaN());
  }
  return found;
}

// All four warps issue the same.
void compare(const Wgmma& what, const Where& where) {
  WarpgroupOperations& all = operations_of(*current->block);
  WarpProducts& mine = all.warps[current->warp()];
  const size_t group = current->warp() / 4, number = mine.issued++;
  auto& issued = all.issued[group];
  if (number - all.forgotten[group] == issued.size()) issued.emplace_back(what, where);
  const auto& [theirs, at] = issued[number - all.forgotten[group]];
  if (!(theirs == what)) fail("a wgmma that differs from its warpgroup's other warps' (" + line_of(at) + ")", where);
  size_t least = number + 1;
  for (size_t i = group * 4; i < group * 4 + 4; ++i) least = std::min(least, all.warps[i].issued);
  while (all.forgotten[group] < least) issued.pop_front(), ++all.forgotten[group];
}

void complete(const Product& product, const check::Copier& copier) {
  compute(product);
  for (const Operand& read : product.reads) check::end_read(read.from, read.bytes, product.where, &copier);
  Accumulators& d = *product.d;
  const bool over = --d.uses == 0;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    Thread& thread = current->block->threads[current->warp() * 32 + lane];
    if (product.what.a_in_registers) land(thread, product.a_at[lane]);
    if (!over) continue;
    land(thread, d.of[lane]);
    std::copy_n(d.values.begin() + lane * d.count, d.count, d.of[lane]);
  }
}

}  // namespace

uint64_t describe_operand(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes, Swizzle swizzle,
                          Where where) {
  const Block& block = *current->block;
  const auto start = static_cast<const std::byte*>(shared) - block.shared;
  if (start < 0 || static_cast<size_t>(start) >= block.shared_bytes) {
    fail("a wgmma's operand outside this block's shared memory", where);
  }
  const auto encode = [&](uint64_t bytes, const char* what) {
    if (bytes % 16 != 0 || bytes >= 1u << 18) {
      fail(std::string("a wgmma's ") + what + " of " + std::to_string(bytes) + ", no multiple of 16 below 2^18", where);
    }
    return bytes >> 4;
  };
  constexpr std::array<uint64_t, 4> kModes{0, 3, 2, 1};
  return encode(static_cast<uint64_t>(start), "address") | encode(leading_bytes, "leading offset") << 16 |
         encode(stride_bytes, "stride offset") << 32 | kModes[static_cast<size_t>(swizzle)] << 62;
}

void fence_warpgroup(Where where) {
  come_together("wgmma_fence", where);
  if (!checked) return;
  Thread& self = *current;
  if (self.registers == nullptr) {
    auto mine = std::make_shared<Registers>();
    mine->stack = reinterpret_cast<uintptr_t>(self.stack);
    mine->touches.reset(static_cast<Registers::Touch*>(std::calloc(kStackBytes / 4, sizeof(Registers::Touch))));
    self.registers = mine.get();
    self.block->attached.push_back(std::move(mine));
  }
  ++self.registers->fences;
}

void issue_wgmma(const Wgmma& what, float* d, const uint32_t* a, Where where) {
  must_be_a_warpgroup("wgmma", where);
  Operands mine{d, a, false};
  std::array<Operands, 32> lanes;
  std::array<std::array<uint32_t, 4>, 32> fragments{};
  collective("wgmma", 0xffffffffu, mine, [&](Lanes<Operands>& all) {
    for (size_t i = 0; i < 32; ++i) {
      lanes[i] = *all[i];
      if (a != nullptr) std::copy_n(all[i]->a, 4, fragments[i].begin());
    }
    all[current->lane()]->last = true;
  }, where);
  if (!mine.last) return;
  compare(what, where);
  WarpProducts& warp = products_of(*current);
  Product product{what, take(warp, lanes, what.n / 2, where), fragments, {}, {}, where};
  ++product.d->uses;
  const auto read = [&](std::vector<Operand> runs) {
    product.reads.insert(product.reads.end(), runs.begin(), runs.end());
  };
  if (what.a_in_registers) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
      Thread& thread = current->block->threads[current->warp() * 32 + lane];
      must_be_fenced(thread, lanes[lane].a, 4, "fragments of A", where);
      fly(thread, lanes[lane].a, 4, where);
      product.a_at[lane] = lanes[lane].a;
    }
  } else {
    read(runs_of(decode(what.a, "A", where), what.a_major, what.type, current->warp() % 4 * 16, 16));
  }
  read(runs_of(decode(what.b, "B", where), what.b_major, what.type, 0, what.n));
  for (const Operand& run : product.reads) check::begin_async_read(run.from, run.bytes, where);
  warp.open.push_back(std::move(product));
}

void commit_wgmmas(Where where) {
  if (!come_together("wgmma_commit", where)) return;
  WarpProducts& warp = products_of(*current);
  warp.groups.push_back(std::move(warp.open));
  warp.open.clear();
}

void wait_for_wgmmas(size_t but_groups, Where where) {
  const bool last = come_together("wgmma_wait", where);
  WarpProducts& warp = products_of(*current);
  while (last && warp.groups.size() > but_groups) {
    for (const Product& product : warp.groups.front()) complete(product, warp.copier);
    warp.groups.pop_front();
  }
  if (last) check::release(warp.complete, *current->block, warp.copier);
  check::acquire(warp.complete, Scope::block);
}

void change_registers(uint32_t count, bool request, Where where) {
  const char* kind = request ? "request_registers" : "release_registers";
  const bool last = come_together(kind, where);
  WarpgroupOperations& all = operations_of(*current->block);
  WarpProducts& warp = all.warps[current->warp()];
  if (last) {
    if (request ? count < warp.registers : count > warp.registers) {
      fail(std::string(kind) + "<" + std::to_string(count) + "> in a warp whose threads have " +
               std::to_string(warp.registers),
           where);
    }
    warp.wanted = count;
    if (!request) {
      all.free_registers += (warp.registers - count) * 32, warp.registers = count;
      made_progress();
    }
  }
  const auto granted = [&] {
    if (warp.registers == warp.wanted) return true;
    const uint32_t more = (warp.wanted - warp.registers) * 32;
    if (more > all.free_registers) return false;
    all.free_registers -= more, warp.registers = warp.wanted;
    return true;
  };
  if (request) poll_until("registers that other warps must release", granted, where);
}

void end_warpgroup_operations() {
  const Block& block = *current->block;
  if (block.warpgroups == nullptr) return;
  const WarpProducts& warp = block.warpgroups->warps[current->warp()];
  const Product* left = !warp.open.empty() ? &warp.open.front() : nullptr;
  for (const auto& group : warp.groups) if (!group.empty()) left = &group.front();
  if (left != nullptr) fail("exits before it has waited for its wgmma", left->where);
  if (block.exited + 1 < block.threads.size()) return;
  for (const auto& issued : block.warpgroups->issued) {
    if (!issued.empty()) fail("a wgmma that not all warps of its warpgroup have issued", issued.front().second);
  }
}

}  // namespace fused_ops::emulation
