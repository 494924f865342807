// Who knows of whose accesses: what a thread learns at barriers, by acquiring, and from fences.
#include <algorithm>
#include <functional>
#include <string>
#include <unordered_map>

#include "emulation/shadow.h"

namespace fused_ops::emulation {

const Clocks* Knowledge::find(uint32_t block) const {
  const auto at = std::ranges::lower_bound(entries, block, {}, &Entry::block);
  return at != entries.end() && at->block == block ? at->clocks.get() : nullptr;
}

namespace check {
namespace {

std::unordered_map<const void*, Signal> atomics;  // what went through an address

// Joins knowledge: the newest clock of everybody, copying only what differs.
class Joined {
 public:
  explicit Joined(Ref<Knowledge> start) : base_(std::move(start)) {}

  void add(const Ref<Knowledge>& other) {
    if (!other || other == base_ || other == last_) return;
    last_ = other;
    for (const Knowledge::Entry& entry : other->entries) {
      Ref<Clocks>& mine = at(entry.block);
      if (!mine) mine = entry.clocks;
      if (mine == entry.clocks) continue;
      Clocks& own = owned(entry.block);
      for (size_t i = 0; i < own.of.size(); ++i) own.of[i] = std::max(own.of[i], entry.clocks->of[i]);
    }
  }

  void add(uint32_t block, uint32_t number, uint32_t clock) {
    uint32_t& known = owned(block).of[number];
    known = std::max(known, clock);
  }

  Ref<Knowledge> result() { return made_ ? made_ : base_; }

 private:
  Knowledge& made() {
    if (!made_ && base_ && base_->references == 1) made_ = std::move(base_);
    if (!made_) {
      made_ = Ref<Knowledge>(new Knowledge);
      if (base_) made_->entries = base_->entries;
    }
    return *made_;
  }
  Ref<Clocks>& at(uint32_t block) {
    auto& entries = made().entries;
    auto found = std::ranges::lower_bound(entries, block, {}, &Knowledge::Entry::block);
    if (found == entries.end() || found->block != block) found = entries.insert(found, {block, {}});
    return found->clocks;
  }
  Clocks& owned(uint32_t block) {
    Ref<Clocks>& clocks = at(block);
    if (clocks && clocks->references == 1) return *clocks;
    auto* own = new Clocks;
    if (clocks) own->of = clocks->of;
    own->of.resize(threads_of_block + kCopiers);
    clocks = Ref<Clocks>(own);
    return *own;
  }

  Ref<Knowledge> base_, made_, last_;
};

// What this thread knows, its own accesses included; those after it are new.
Ref<Knowledge> published(Thread& thread) {
  Joined joined(thread.knows);
  joined.add(thread.block->linear, thread.number, thread.clock++);
  learn(thread, joined.result());
  return thread.knows;
}

bool covers(Scope scope, const Signal::Part& part, const Thread& thread) {
  if (scope == Scope::block) return part.block == thread.block->linear;
  if (scope == Scope::cluster) return part.cluster == thread.block->cluster;
  return true;
}

// The part of `signal` that is for the same listeners, made if there is none.
Signal::Part& part_like(Signal& signal, Scope scope, uint32_t block, uint32_t cluster) {
  for (Signal::Part& known : signal.parts) {
    if (known.scope == scope && known.block == block && known.cluster == cluster) return known;
  }
  return signal.parts.emplace_back(Signal::Part{{}, {}, scope, block, cluster});
}

void join(Ref<Knowledge>& to, const Ref<Knowledge>& from) {
  if (!from || from == to) return;
  if (!to) to = from;
  Joined joined(std::move(to));
  joined.add(from);
  to = joined.result();
}

void add_part(Signal& signal, const Signal::Part& part) {
  Signal::Part& mine = part_like(signal, part.scope, part.block, part.cluster);
  join(mine.knowledge, part.knowledge), join(mine.shown, part.shown);
}

bool includes(const Ref<Knowledge>& all, const Ref<Knowledge>& part) {
  if (!part || all == part) return true;
  return all && std::ranges::all_of(part->entries, [&](const Knowledge::Entry& entry) {
    const Clocks* known = all->find(entry.block);
    return known == entry.clocks.get() ||
           (known != nullptr && std::ranges::equal(known->of, entry.clocks->of, std::greater_equal()));
  });
}

}  // namespace

void learn(Thread& thread, const Ref<Knowledge>& knowledge) {
  thread.knows = knowledge;
  const Clocks* own = knowledge ? knowledge->find(thread.block->linear) : nullptr;
  thread.clocks = own ? own->of.data() : nullptr;
}

bool holds(const Knowledge* knowledge, const Access& access) {
  if (access.clock == 0) return true;
  const Clocks* found = knowledge != nullptr ? knowledge->find(access.block) : nullptr;
  const uint32_t first = access.warp >= kCopies ? threads_of_block + (access.warp - kCopies) * 32 : access.warp * 32;
  for (uint32_t lanes = access.lanes; lanes != 0; lanes &= lanes - 1) {
    if (found == nullptr || found->of[first + static_cast<uint32_t>(__builtin_ctz(lanes))] < access.clock) return false;
  }
  return true;
}

bool knows(const Thread& self, const Access& access) {
  if (access.clock == 0) return true;
  if (access.block != self.block->linear || access.warp >= kCopies) return holds(self.knows.get(), access);
  for (uint32_t lanes = access.lanes; lanes != 0; lanes &= lanes - 1) {
    const uint32_t number = access.warp * 32 + static_cast<uint32_t>(__builtin_ctz(lanes));
    if (number != self.number && (self.clocks == nullptr || self.clocks[number] < access.clock)) return false;
  }
  return true;
}

void forget_atomics() { atomics.clear(); }

void meet(std::span<Thread* const> threads, const Signal* announced) {
  Joined joined{Ref<Knowledge>()}, shown{Ref<Knowledge>()};
  for (Thread* thread : threads) {
    if (thread == nullptr) continue;
    joined.add(thread->knows), shown.add(thread->shown_to_copies);
  }
  for (Thread* thread : threads) if (thread) joined.add(thread->block->linear, thread->number, thread->clock++);
  if (announced != nullptr) {
    for (const Signal::Part& part : announced->parts) joined.add(part.knowledge), shown.add(part.shown);
  }
  const Ref<Knowledge> all = joined.result(), visible = shown.result();
  for (Thread* thread : threads) if (thread) learn(*thread, all), thread->shown_to_copies = visible;
}

void release(Signal& signal, Scope scope) {
  if (!checked) return;
  Thread& self = *current;
  Signal::Part& part = part_like(signal, scope, self.block->linear, self.block->cluster);
  Joined joined(std::move(part.knowledge));
  joined.add(self.knows);
  joined.add(self.block->linear, self.number, self.clock++);
  part.knowledge = joined.result();
  join(part.shown, self.shown_to_copies);
}

void release(Signal& signal, const Block& block, Copier& copier) {
  if (!checked) return;
  Signal::Part& part = part_like(signal, Scope::cluster, block.linear, block.cluster);
  Joined joined(std::move(part.knowledge));
  joined.add(copier.block, threads_of_block + copier.slot, copier.clock++);
  part.knowledge = joined.result();
}

void acquire(const Signal& signal, Scope scope) {
  if (!checked) return;
  Thread& self = *current;
  for (const Signal::Part& part : signal.parts) {
    if (!covers(part.scope, part, self) || !covers(scope, part, self)) continue;
    if (includes(part.knowledge, self.knows)) self.knows = part.knowledge;
    else join(self.knows, part.knowledge);
    join(self.shown_to_copies, part.shown);
  }
  learn(self, self.knows);
}

void fence(Scope scope) {
  if (!checked) return;
  Thread& self = *current;
  acquire(self.heard, scope);
  self.heard.parts.clear();
  self.fenced.parts.clear();
  add_part(self.fenced, {published(self), self.shown_to_copies, scope, self.block->linear, self.block->cluster});
}

void atomic(void* address, size_t bytes, bool reads, bool writes, bool acquires, bool releases, Scope scope,
            const Where& where) {
  if (!checked || current == nullptr) return;
  Thread& self = *current;
  access(address, bytes, Kind::atomic, where);
  Signal& signal = atomics[address];
  if (reads) {
    if (acquires) acquire(signal, scope);
    else for (const Signal::Part& part : signal.parts) add_part(self.heard, part);
  }
  if (!writes) return;
  if (!reads) signal.parts.clear();  // a plain store ends what earlier stores released
  if (releases) release(signal, scope);
  else for (const Signal::Part& part : self.fenced.parts) add_part(signal, part);
}

void proxy_fence() {
  if (!checked) return;
  Thread& self = *current;
  Joined shown(self.shown_to_copies);
  shown.add(self.block->linear, self.number, self.clock++);
  self.shown_to_copies = shown.result();
}

}  // namespace check
}  // namespace fused_ops::emulation
