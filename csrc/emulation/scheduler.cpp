#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "emulation/check.h"
#include "emulation/fiber.h"
#include "emulation/runtime.h"
#include "emulation/symbols.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fused_ops::emulation {

Thread* current = nullptr;
Chip chip;
uint64_t accesses_since_switch = 0;
bool checked = true, suspended = false;

namespace {

constexpr size_t kBlocksAtOnce = 8;  // of a plain grid, so that schedules interleave blocks too
constexpr size_t kSharedGap = 16;    // between shared variables

std::mutex launching;
uint64_t seed = [] {
  const char* given = std::getenv("FUSED_OPS_EMULATE_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : 0;
}();

struct Static {
  const void* declaration;
  size_t at, bytes;
};

// A launch in progress: one at a time.
struct Launch {
  const void* kernel = nullptr;
  const Shape* shape = nullptr;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  std::vector<Thread*> ready;
  std::vector<std::unique_ptr<Group>> alive;
  void* main_stack = nullptr;
  uint64_t random = 0;
  uint64_t progress = 1;
  size_t stalled = 0;        // ready threads that have polled in vain...
  uint64_t stalled_at = 0;   // ...since progress was this
  std::string failure;
  std::vector<Static> statics;  // in the order of their first use, at the same place in every block
  size_t shared_bytes = 0;
};
Launch* launch = nullptr;

// Kept between launches: their stacks and arenas cost system calls.
std::vector<std::unique_ptr<Block>> free_blocks;
uint32_t slots = 0;

void to_main() { fused_ops_switch_stack(&current->stack_pointer, launch->main_stack); }

std::string everybody() {
  std::ostringstream text;
  size_t named = 0, others = 0;
  for (const auto& group : launch->alive) {
    for (const Block* block : group->blocks) {
      describe_mbarriers(*block);
      for (const Thread& thread : block->threads) {
        if (thread.state == State::kDone) continue;
        if (named > 0 && thread.lane() != 0 && &thread != &block->threads.front()) {
          const Thread& before = *(&thread - 1);
          if (before.state == thread.state && before.waits_for == thread.waits_for &&
              before.where.line() == thread.where.line()) {
            ++others;
            continue;
          }
        }
        if (++named > 8) continue;
        text << "\n  " << name_of(thread) << " waits for " << thread.waits_for << " at " << line_of(thread.where);
      }
    }
  }
  if (named > 8 || others > 0) text << "\n  and others likewise";
  return text.str();
}

// The next thread to run, taken off the ready list.
Thread* pick() {
  while (launch->ready.empty() && land_a_copy()) {}
  if (launch->ready.empty()) fail("nobody can go on:" + everybody(), current->where);
  Thread*& slot = launch->ready[draw(launch->ready.size())];
  Thread* chosen = slot;
  slot = launch->ready.back();
  launch->ready.pop_back();
  return chosen;
}

void resume(Thread* thread) {
  if (thread == current) return;
  Thread* from = current;
  current = thread, accesses_since_switch = 0;
  threadIdx = thread->index, blockIdx = thread->block->index;
  fused_ops_switch_stack(&from->stack_pointer, thread->stack_pointer);
}

void resume_from_main() {
  Thread* first = pick();
  current = first, accesses_since_switch = 0;
  threadIdx = first->index, blockIdx = first->block->index;
  fused_ops_switch_stack(&launch->main_stack, first->stack_pointer);
}

void leave_block() {
  Thread& self = *current;
  Block& block = *self.block;
  Warp& warp = block.warps[self.warp()];
  const auto refuse = [](const char* what, const Thread& waiting) {
    fail(std::string("exited, but ") + name_of(waiting) + " waits for it in " + what, waiting.where);
  };
  for (const Pending& pending : warp.pending) {
    if (pending.mask >> self.lane() & 1) refuse(pending.kind, *pending.threads[static_cast<size_t>(__builtin_ctz(pending.arrived))]);
  }
  for (const Meeting& barrier : block.barriers) {
    if (barrier.awaits(self)) refuse("a barrier of its block", barrier.first());
  }
  if (self.copies != nullptr) end_copies(*self.copies);
  end_bulk_copies();
  end_warpgroup_operations();
  self.state = State::kDone;
  warp.exited |= 1u << self.lane();
  ++launch->progress;
  leave_cluster();
  if (++block.exited < block.threads.size()) return;
  end_mbarriers(block);
  if (checked) check::end_block(block);
  if (--block.group->running == 0) to_main();
}

void start_thread() {
  launch->body(launch->arguments);
  leave_block();
  resume(pick());
  __builtin_unreachable();
}

dim3 place(uint64_t linear, dim3 of) {
  const auto x = static_cast<unsigned>(linear % of.x), y = static_cast<unsigned>(linear / of.x % of.y);
  return dim3(x, y, static_cast<unsigned>(linear / of.x / of.y));
}

std::unique_ptr<Block> new_block() {
  if (free_blocks.empty()) {
    auto block = std::make_unique<Block>();
    block->shared = static_cast<std::byte*>(std::aligned_alloc(1024, chip.shared_per_block));
    block->slot = slots++;
    return block;
  }
  auto block = std::move(free_blocks.back());
  free_blocks.pop_back();
  return block;
}

Block* start_block(Group& group, dim3 index) {
  const dim3 size = launch->shape->block;
  const uint32_t count = size.x * size.y * size.z;
  Block* block = new_block().release();
  block->index = {index.x, index.y, index.z};
  block->linear = index.x + launch->shape->grid.x * (index.y + launch->shape->grid.y * index.z);
  block->rank = static_cast<uint32_t>(group.blocks.size());
  const dim3 grid = launch->shape->grid, cluster = launch->shape->cluster;
  block->cluster = index.x / cluster.x +
                   grid.x / cluster.x * (index.y / cluster.y + grid.y / cluster.y * (index.z / cluster.z));
  block->group = &group;
  block->exited = 0;
  block->attached.clear(), block->remote_accesses.clear();
  block->mbarriers = nullptr, block->warpgroups = nullptr;
  block->dynamic_bytes = launch->shape->shared_bytes, block->shared_bytes = launch->shared_bytes;
  std::memset(block->shared, 0xff, block->shared_bytes);  // NaN in every floating type
  for (Meeting& barrier : block->barriers) barrier = Meeting("a barrier of its block");
  block->warps.assign((count + 31) / 32, Warp{});
  while (block->stacks.size() < count) block->stacks.push_back(new Stack);
  block->threads.assign(count, Thread{});
  for (uint32_t i = 0; i < count; ++i) {
    Thread& thread = block->threads[i];
    const dim3 at = place(i, size);
    thread.index = {at.x, at.y, at.z}, thread.number = i, thread.block = block;
    thread.stack = block->stacks[i]->bottom();
    thread.stack_pointer = prepare_stack(*block->stacks[i], i, start_thread);
    block->warps[i / 32].lanes |= 1u << i % 32;
    launch->ready.push_back(&thread);
  }
  if (!checked) return block;
  check::start_block(*block);
  for (const Static& variable : launch->statics) check::add_shared(*block, variable.at, variable.bytes);
  return block;
}

void start_group(uint64_t number) {
  const Shape& shape = *launch->shape;
  auto group = std::make_unique<Group>();
  group->number = static_cast<uint32_t>(number);
  const dim3 each = shape.cooperative ? shape.grid : shape.cluster;
  const dim3 groups(shape.grid.x / each.x, shape.grid.y / each.y, shape.grid.z / each.z);
  const dim3 first = place(number, groups);
  for (uint64_t rank = 0; rank < uint64_t{each.x} * each.y * each.z; ++rank) {
    const dim3 at = place(rank, each);
    group->blocks.push_back(
        start_block(*group, dim3(first.x * each.x + at.x, first.y * each.y + at.y, first.z * each.z + at.z)));
  }
  std::map<uint32_t, std::shared_ptr<Cluster>> clusters;
  for (Block* block : group->blocks) {
    auto& cluster = clusters[block->cluster];
    if (!cluster) cluster = std::make_shared<Cluster>();
    cluster->blocks.push_back(block);
    cluster->missing = cluster->running += static_cast<uint32_t>(block->threads.size());
    block->in_cluster = cluster;
  }
  group->running = static_cast<uint32_t>(group->blocks.size());
  launch->alive.push_back(std::move(group));
}

void end_group(Group& group) {
  for (Block* block : group.blocks) free_blocks.emplace_back(block);
}

void run_groups(uint64_t count) {
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; ++i) order[i] = i;
  if (seed != 0) for (uint64_t i = count; i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  uint64_t next = 0;
  auto& alive = launch->alive;
  while (next < count || !alive.empty()) {
    while (next < count && alive.size() < kBlocksAtOnce) start_group(order[next++]);
    Thread here;  // stands for the launching stack
    current = &here;
    resume_from_main();
    if (!launch->failure.empty()) return;
    for (size_t i = alive.size(); i-- > 0;) {
      if (alive[i]->running > 0) continue;
      end_group(*alive[i]);
      alive.erase(alive.begin() + static_cast<ptrdiff_t>(i));
    }
  }
}

// What is wrong with a cooperative grid whose blocks have so much shared memory each, or nothing.
std::string no_room(const Shape& shape, size_t shared_bytes) {
  const uint64_t blocks = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  const auto room = static_cast<uint64_t>(co_resident_blocks(shape.block, dim3(1), shared_bytes));
  if (!shape.cooperative || blocks <= room) return "";
  return std::to_string(blocks) + " blocks of a cooperative grid, only " + std::to_string(room) + " can be alive together";
}

void check_shape(const void* kernel, const Shape& shape) {
  const auto refuse = [&](const std::string& what) { throw std::runtime_error(symbol_name(kernel) + ": " + what); };
  const uint64_t threads = uint64_t{shape.block.x} * shape.block.y * shape.block.z;
  if (threads == 0 || threads > 1024) refuse(std::to_string(threads) + " threads in a block, 1 to 1024 are allowed");
  if (shape.shared_bytes > chip.shared_per_block) {
    refuse(std::to_string(shape.shared_bytes) + " bytes of shared memory, the chip gives a block " +
           std::to_string(chip.shared_per_block));
  }
  const dim3 grid = shape.grid, cluster = shape.cluster;
  if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) refuse("the grid is not a multiple of the cluster");
  if (cluster.x * cluster.y * cluster.z > 16) refuse("at most 16 blocks in a cluster");
  if (const std::string reason = no_room(shape, shape.shared_bytes); !reason.empty()) refuse(reason);
}

}  // namespace

int64_t co_resident_blocks(dim3 block, dim3 cluster, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t by_threads = chip.threads_per_multiprocessor / ((threads + 31) / 32 * 32);
  const uint64_t by_shared = chip.shared_per_multiprocessor / (shared_bytes + 1024);  // 1 KB is the system's
  const uint64_t resident = std::min({by_threads, by_shared, uint64_t{chip.blocks_per_multiprocessor}});
  const uint64_t blocks = resident * static_cast<uint64_t>(chip.multiprocessors);
  const uint64_t size = uint64_t{cluster.x} * cluster.y * cluster.z;
  return static_cast<int64_t>(blocks / size * size);
}

uint32_t draw(size_t n) {
  uint64_t& x = launch->random;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return static_cast<uint32_t>((static_cast<unsigned __int128>(x) * n) >> 64);
}

bool late() { return seed == 0; }

void wake(Thread* thread) {
  thread->state = State::kReady;
  launch->ready.push_back(thread);
}

void wait(const char* what, const Where& where) {
  current->state = State::kWaiting, current->waits_for = what, current->where = where;
  resume(pick());
}

std::string line_of(const Where& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

std::string name_of(const Thread& thread) {
  std::ostringstream text;
  const uint3 b = thread.block->index;
  text << "block (" << b.x << ", " << b.y << ", " << b.z << ") warp " << thread.warp() << " lane " << thread.lane();
  return text.str();
}

void fail(const std::string& what, Where where) {
  const std::string who = current->block ? name_of(*current) : "the launch";
  launch->failure = symbol_name(launch->kernel) + ": " + who + ": " + what +
                    (where.line() ? " (" + line_of(where) + ")" : "");
  if (current->block == nullptr) throw std::runtime_error(launch->failure);
  to_main();
  __builtin_unreachable();
}

bool Meeting::awaits(const Thread& thread) const {
  return !waiting_.empty() && expected_ == thread.block->threads.size() &&
         (arrived_.size() == waiting_.size() || std::ranges::find(arrived_, &thread) == arrived_.end());
}

void Meeting::arrive(uint32_t expected, bool waits, Where where) {
  if (arrived_.empty()) expected_ = expected;
  if (expected != expected_) {
    fail(std::string("comes to ") + what_ + " of " + std::to_string(expected) + " threads, others to one of " +
             std::to_string(expected_), where);
  }
  const bool all_wait = arrived_.size() == waiting_.size();
  if (!all_wait && std::ranges::find(arrived_, current) != arrived_.end()) {
    fail(std::string("comes again to ") + what_ + " that it has arrived at and that is not complete", where);
  }
  arrived_.push_back(current);
  if (waits) waiting_.push_back(current);
  else if (orders_) check::release(announced_, Scope::cluster);
  if (arrived_.size() < expected_) {
    if (waits) wait(what_, where);
    return;
  }
  if (orders_ && checked) check::meet(waiting_, &announced_);
  for (Thread* thread : waiting_) if (thread != current) wake(thread);
  arrived_.clear(), waiting_.clear(), announced_.parts.clear();
  ++launch->progress;
}

void collective(const char* kind, unsigned mask, void* mine, void (*all)(Lanes<void>&, void*), void* context,
                bool orders, Where where) {
  Thread& self = *current;
  Warp& warp = self.block->warps[self.warp()];
  const unsigned bit = 1u << self.lane();
  if (!(mask & bit)) fail(std::string(kind) + " with a mask that leaves this lane out", where);
  if (mask & ~warp.lanes) fail(std::string(kind) + " with a mask of lanes that the block does not have", where);
  if (mask & warp.exited) fail(std::string(kind) + " waits for a lane that has exited", where);
  Pending* found = nullptr;
  for (Pending& pending : warp.pending) {
    if (!(pending.mask & mask)) continue;
    found = &pending;
    if (pending.mask == mask && pending.kind == kind) continue;
    const Thread& other = *pending.threads[static_cast<size_t>(__builtin_ctz(pending.arrived))];
    const std::string there = name_of(other) + " is in " + pending.kind + " at " + line_of(other.where);
    if (pending.mask != mask) fail(std::string(kind) + " with a mask that overlaps another: " + there, where);
    fail(std::string("comes to ") + kind + " where " + there, where);
  }
  if (found == nullptr) {
    found = &warp.pending.emplace_back();
    found->kind = kind, found->mask = mask;
  }
  found->arrived |= bit;
  found->threads[self.lane()] = &self, found->operands[self.lane()] = mine;
  if (found->arrived != mask) return wait(kind, where);
  Pending done = *found;
  *found = warp.pending.back();
  warp.pending.pop_back();
  if (all != nullptr) {
    suspended = true;  // it reads and writes operands on other lanes' stacks
    all(done.operands, context);
    suspended = false;
  }
  if (orders && checked) check::meet(done.threads);
  for (Thread* thread : done.threads) if (thread != nullptr && thread != &self) wake(thread);
  ++launch->progress;
}

uint32_t this_lane() { return current->lane(); }

void made_progress() { ++launch->progress; }

void yield() {
  launch->ready.push_back(current);
  resume(pick());
}

void poll_in_vain(const char* what, Where where) {
  Thread& self = *current;
  self.state = State::kPolling, self.waits_for = what, self.where = where;
  if (self.polled_at != launch->progress) launch->stalled = launch->stalled_at == launch->progress ? launch->stalled + 1 : 1;
  launch->stalled_at = self.polled_at = launch->progress;
  if (launch->stalled > launch->ready.size() && !land_a_copy()) fail("polls without end:" + everybody(), where);
  yield();
}

void poll_succeeded() {
  current->state = State::kReady, current->polled_at = 0;
  ++launch->progress;
}

void* static_shared(const void* declaration, size_t bytes, size_t alignment, Where where) {
  std::byte* const mine = current->block->shared;
  for (const Static& known : launch->statics) if (known.declaration == declaration) return mine + known.at;
  const size_t at = (launch->shared_bytes + kSharedGap + alignment - 1) / alignment * alignment;
  if (at + bytes > chip.shared_per_block) {
    fail("needs " + std::to_string(at + bytes) + " bytes of shared memory, the chip gives a block " +
             std::to_string(chip.shared_per_block), where);
  }
  if (const std::string reason = no_room(*launch->shape, at + bytes); !reason.empty()) fail(reason, where);
  launch->statics.push_back({declaration, at, bytes});
  launch->shared_bytes = at + bytes;
  for (const auto& group : launch->alive) {
    for (Block* block : group->blocks) {
      block->shared_bytes = at + bytes;
      std::memset(block->shared + at, 0xff, bytes);
      if (checked) check::add_shared(*block, at, bytes);
    }
  }
  return mine + at;
}

void* dynamic_shared_memory() { return current->block->shared; }

bool in_shared(const void* address, size_t bytes) {
  const Block& block = *current->block;
  const auto* first = static_cast<const std::byte*>(address);
  return first >= block.shared && first + bytes <= block.shared + block.shared_bytes;
}

void set_seed(uint64_t value) { seed = value; }
void set_checked(bool value) { checked = value; }

void run(const void* kernel, const Shape& shape, void (*body)(const void*), const void* arguments, size_t bytes) {
  const std::lock_guard<std::mutex> lock(launching);
  const uint64_t blocks = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  if (blocks == 0) return;
  check_shape(kernel, shape);
  Launch now;
  now.kernel = kernel, now.shape = &shape, now.body = body, now.arguments = arguments;
  now.random = seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
  now.shared_bytes = shape.shared_bytes;
  launch = &now, suspended = false;
  forget_copies();
  blockDim = shape.block, gridDim = shape.grid;
  if (checked) check::start_launch(shape, arguments, bytes);
  const dim3 each = shape.cooperative ? shape.grid : shape.cluster;
  try {
    run_groups(blocks / (uint64_t{each.x} * each.y * each.z));
  } catch (const std::runtime_error&) {
  }
  for (const auto& group : now.alive) end_group(*group);
  if (checked) check::end_launch();
  launch = nullptr, current = nullptr;
  if (!now.failure.empty()) throw std::runtime_error(now.failure);
}

}  // namespace fused_ops::emulation
