// What common/mbarrier.cuh's twin does.
#include "emulation/builtins.h"

#include <algorithm>

#include "emulation/common/mbarrier.cuh"
#include "emulation/mbarrier.h"

namespace fused_ops::emulation {
namespace {

constexpr uint32_t kMost = (1u << 20) - 1;  // arrivals and bytes: PTX ISA, "Contents of the mbarrier object"

constexpr uint32_t kTests = 256;            // in vain and in a row, that are not yet a loop

Mbarriers& mbarriers_of(Block& block) {
  if (block.mbarriers == nullptr) {
    auto mine = std::make_shared<Mbarriers>();
    for (uint32_t i = 0; i < check::kMbarriers; ++i) mine->copiers[i] = {block.linear, i, 1};
    block.mbarriers = mine.get();
    block.attached.push_back(std::move(mine));
  }
  return *block.mbarriers;
}

Block* owner_of(const void* address) {
  const auto* at = static_cast<const std::byte*>(address);
  for (Block* block : current->block->in_cluster->blocks) {
    if (at >= block->shared && at + sizeof(Mbarrier) <= block->shared + block->shared_bytes) return block;
  }
  return nullptr;
}

MbarrierState* find_mbarrier(const Block& block, const uint64_t* address) {
  if (block.mbarriers == nullptr) return nullptr;
  for (const auto& barrier : block.mbarriers->all) if (barrier->address == address) return barrier.get();
  return nullptr;
}

check::Access now(const Where& where) {
  const Thread& self = *current;
  return {self.block->linear, self.warp(), 1u << self.lane(), self.clock, check::site_of(where)};
}

// By the order of memory, or (fence.mbarrier_init) by a barrier of the cluster that this thread has waited for.
bool knows_initialisation(const Thread& self, const MbarrierState& barrier) {
  if (barrier.maker == &self || check::knows(self, barrier.made)) return true;
  const uint32_t passed = self.cluster_waits == 0 ? 0 : self.cluster_generation + (self.cluster_arrived ? 0 : 1);
  return barrier.announced && passed > barrier.announced_in;
}

void complete_if_all_came(MbarrierState& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  barrier.complete = std::move(barrier.arriving);
  barrier.arriving.parts.clear();
  for (Thread* thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
  made_progress();
}

bool is_complete(const MbarrierState& barrier, uint64_t phase, bool parity_only) {
  return parity_only ? (barrier.phase & 1) != phase : barrier.phase > phase;
}

void observe(MbarrierState& barrier, Scope scope) {
  check::acquire(barrier.complete, scope);
  barrier.observed = barrier.phase;
  current->waits_on = nullptr, current->tests_in_vain = 0;
  poll_succeeded();
}

MbarrierState& own_mbarrier(const uint64_t* address, const char* use, const Where& where) {
  MbarrierState& barrier = mbarrier_at(address, use, where);
  if (barrier.block != current->block) fail(std::string(use) + " an mbarrier of another block", where);
  barrier.users[current->number] = now(where);
  return barrier;
}

}  // namespace

MbarrierState& mbarrier_at(const uint64_t* address, const char* use, const Where& where) {
  Block* owner = owner_of(address);
  if (owner == nullptr) fail(std::string(use) + " an mbarrier outside the shared memory of its cluster", where);
  if (owner != current->block) check::must_be_alive(*owner, check::site_of(where));
  MbarrierState* barrier = find_mbarrier(*owner, address);
  if (barrier == nullptr) fail(std::string(use) + " an mbarrier that is not initialised", where);
  if (checked && !knows_initialisation(*current, *barrier)) {
    fail(std::string(use) + " an mbarrier with no order after its initialisation by " + check::describe(barrier->made) +
             " (" + check::line_at(barrier->made.site) + ")",
         where);
  }
  return *barrier;
}

void make_mbarrier(Mbarrier* address, uint32_t count, Where where) {
  Block& block = *current->block;
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Mbarrier) != 0) {
    fail("an mbarrier at an address that is no multiple of 8", where);
  }
  if (owner_of(address) != &block) fail("initialises an mbarrier outside this block's shared memory", where);
  if (count == 0 || count > kMost) {
    fail("an mbarrier of " + std::to_string(count) + " arrivals, 1 to " + std::to_string(kMost) + " are allowed",
         where);
  }
  if (find_mbarrier(block, address) != nullptr) fail("initialises an mbarrier that is initialised", where);
  check::write(address, sizeof(Mbarrier), where);
  *address = 0;
  Mbarriers& mine = mbarriers_of(block);
  auto barrier = std::make_unique<MbarrierState>();
  barrier->block = &block, barrier->address = address, barrier->expected = barrier->pending = count;
  barrier->users.resize(block.threads.size());
  barrier->copier = &mine.copiers[mine.made++ % check::kMbarriers];
  barrier->maker = current, barrier->made = now(where);
  check::guard(address, sizeof(Mbarrier), where);
  mine.all.push_back(std::move(barrier));
}

void drop_mbarrier(Mbarrier* address, Where where) {
  MbarrierState& barrier = own_mbarrier(address, "invalidates", where);
  if (!barrier.waiting.empty()) {
    fail("invalidates an mbarrier that " + name_of(*barrier.waiting.front()) + " waits for", where);
  }
  barrier.users.push_back(barrier.remote_arrival);
  for (const check::Access& user : barrier.users) {
    if (!checked || check::knows(*current, user)) continue;
    fail("invalidates an mbarrier that " + check::describe(user) + " may still use (" + check::line_at(user.site) + ")",
         where);
  }
  barrier.dropped = true;
  check::unguard(address, sizeof(Mbarrier), where);
  check::write(address, sizeof(Mbarrier), where);
  auto& all = current->block->mbarriers->all;
  const auto mine = std::ranges::find_if(all, [&](const auto& known) { return known.get() == &barrier; });
  current->block->mbarriers->dropped.push_back(std::move(*mine));
  all.erase(mine);
}

void add_bytes(MbarrierState& barrier, int64_t bytes, const Where& where) {
  const int64_t all = barrier.bytes + bytes;
  if (all > kMost || all < -int64_t{kMost}) {
    fail("an mbarrier with " + std::to_string(all) + " bytes to come, the most are " + std::to_string(kMost), where);
  }
  barrier.bytes = static_cast<int32_t>(all);
  complete_if_all_came(barrier);
}

void change_bytes(Mbarrier* address, int64_t bytes, Where where) {
  MbarrierState& barrier = own_mbarrier(address, "expects bytes at", where);
  if (barrier.pending == 0 && bytes > 0) fail("expects bytes at an mbarrier whose arrivals have all come", where);
  add_bytes(barrier, bytes, where);
}

uint64_t arrive_at_mbarrier(Mbarrier* address, uint32_t count, int64_t bytes, bool remote, Where where) {
  MbarrierState& barrier =
      remote ? mbarrier_at(address, "arrives at", where) : own_mbarrier(address, "arrives at", where);
  if (count == 0 || count > kMost) {
    fail("arrives " + std::to_string(count) + " times, 1 to " + std::to_string(kMost) + " are allowed", where);
  }
  if (count > barrier.pending) {
    fail("arrives at an mbarrier too often: of " + std::to_string(barrier.expected) + " arrivals " +
             std::to_string(barrier.pending) + " are pending in phase " + std::to_string(barrier.phase), where);
  }
  if (barrier.block != current->block) {
    barrier.arrived_remotely = true, barrier.remote_phase = barrier.phase, barrier.remote_arrival = now(where);
  }
  check::release(barrier.arriving, remote ? Scope::cluster : Scope::block);
  const uint64_t phase = barrier.phase;
  if (bytes > 0) add_bytes(barrier, bytes, where);
  barrier.pending -= count;
  complete_if_all_came(barrier);
  made_progress();
  return phase;
}

bool phase_is_complete(Mbarrier* address, uint64_t phase, bool parity_only, Scope scope, Where where) {
  MbarrierState& barrier = own_mbarrier(address, "waits for", where);
  if (parity_only && phase > 1) fail("a parity of " + std::to_string(phase) + ", it is 0 or 1", where);
  if (!is_complete(barrier, phase, parity_only) && !late() && draw(2) == 0) land_a_copy(&barrier);
  if (is_complete(barrier, phase, parity_only)) return observe(barrier, scope), true;
  if (++current->tests_in_vain < kTests) {
    yield();
    return false;
  }
  current->waits_on = &barrier;
  poll_in_vain("an mbarrier", where);
  return false;
}

void wait_for_parity(Mbarrier* address, uint32_t parity, Scope scope, Where where) {
  MbarrierState& barrier = own_mbarrier(address, "waits for", where);
  if (parity > 1) fail("a parity of " + std::to_string(parity) + ", it is 0 or 1", where);
  while (!is_complete(barrier, parity, true)) {
    if (!late() && draw(2) == 0 && land_a_copy(&barrier)) continue;
    barrier.waiting.push_back(current);
    current->waits_on = &barrier;
    wait("an mbarrier", where);
    if (barrier.dropped) fail("waits for an mbarrier that another thread invalidates", where);
  }
  observe(barrier, scope);
}

void fence_mbarriers(bool for_cluster) {
  if (current->block->mbarriers == nullptr) return;
  for (auto& barrier : current->block->mbarriers->all) {
    if (barrier->maker != current) continue;
    barrier->fenced = true;
    barrier->fenced_for_cluster |= for_cluster;
  }
}

void fence_async_proxy() {
  fence_mbarriers(false);
  check::proxy_fence();
}

void announce_fenced_mbarriers() {
  if (current->block->mbarriers == nullptr) return;
  for (auto& barrier : current->block->mbarriers->all) {
    if (barrier->maker != current || !barrier->fenced_for_cluster || barrier->announced) continue;
    barrier->announced = true, barrier->announced_in = current->cluster_generation;
  }
}

void end_mbarriers(Block& block) {
  if (const Where* issued = copy_into(block)) {
    fail("its block exits while an asynchronous copy into its shared memory is under way", *issued);
  }
  if (block.mbarriers == nullptr || !checked) return;
  for (const auto& barrier : block.mbarriers->all) {
    if (!barrier->arrived_remotely || barrier->remote_phase < barrier->observed) continue;
    const auto known = [&](const Thread& thread) { return check::knows(thread, barrier->remote_arrival); };
    if (std::ranges::any_of(block.threads, known)) continue;
    check::report("its block exits while " + check::describe(barrier->remote_arrival) +
                      " may still arrive at its mbarrier, whose phase " + std::to_string(barrier->remote_phase) +
                      " nobody here has waited for", barrier->remote_arrival.site);
  }
}

void describe_mbarriers(const Block& block) {
  if (block.mbarriers == nullptr) return;
  for (const auto& barrier : block.mbarriers->all) {
    barrier->description = "the mbarrier at shared memory's byte " +
                           std::to_string(reinterpret_cast<std::byte*>(barrier->address) - block.shared) +
                           ", in phase " + std::to_string(barrier->phase) + " (" + std::to_string(barrier->pending) +
                           " of " + std::to_string(barrier->expected) + " arrivals and " +
                           std::to_string(barrier->bytes) + " bytes are missing)";
  }
  for (const Thread& thread : block.threads) {
    if (thread.state != State::kDone && thread.waits_on != nullptr) {
      const_cast<Thread&>(thread).waits_for = static_cast<const MbarrierState*>(thread.waits_on)->description.c_str();
    }
  }
}

}  // namespace fused_ops::emulation
