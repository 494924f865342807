// What common/async_copy.cuh's twin does.
#include <cstring>
#include <string>

#include "emulation/common/async_copy.cuh"

namespace fused_ops::emulation {

// A thread's copies that no wait has covered, in the order of their issue; `ends` of the groups among them.
struct Copies {
  struct Copy {
    std::byte* to;
    const std::byte* from;
    uint32_t bytes, source_bytes;
    Where where;
  };
  std::vector<Copy> pending;
  std::vector<size_t> ends;
};

namespace {

Copies& copies_of(Thread& thread) {
  if (thread.copies == nullptr) {
    auto mine = std::make_shared<Copies>();
    thread.copies = mine.get();
    thread.block->attached.push_back(std::move(mine));
  }
  return *thread.copies;
}

void land(const Copies::Copy& copy) {
  if (copy.source_bytes > 0) check::read(copy.from, copy.source_bytes, copy.where);
  if (copy.source_bytes > 0) std::memcpy(copy.to, copy.from, copy.source_bytes);
  std::memset(copy.to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  check::end_write(copy.to, copy.bytes, copy.where);
}

}  // namespace

void start_copy(void* shared, const void* global, uint32_t bytes, uint32_t source_bytes, Where where) {
  const std::string name = "cp_async<" + std::to_string(bytes) + ">";
  const auto aligned = [&](const void* address) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; };
  if (source_bytes > bytes) fail(name + " of " + std::to_string(source_bytes) + " bytes of its source", where);
  if (!aligned(shared)) fail(name + " to an address that is no multiple of " + std::to_string(bytes), where);
  if (!aligned(global)) fail(name + " from an address that is no multiple of " + std::to_string(bytes), where);
  if (!in_shared(shared, bytes)) fail(name + " to an address outside this block's shared memory", where);
  if (source_bytes > 0) {
    if (in_shared(global, 1)) fail(name + " from shared memory", where);
    check::read(global, source_bytes, where);
  }
  check::begin_write(shared, bytes, where);
  copies_of(*current).pending.push_back(
      {static_cast<std::byte*>(shared), static_cast<const std::byte*>(global), bytes, source_bytes, where});
}

void commit_copies() {
  Copies& mine = copies_of(*current);
  mine.ends.push_back(mine.pending.size());
}

void finish_copies(size_t but_groups, bool all, Where) {
  if (current->copies == nullptr) return;
  Copies& mine = *current->copies;
  size_t groups = mine.ends.size() > but_groups ? mine.ends.size() - but_groups : 0;
  size_t count = groups > 0 ? mine.ends[groups - 1] : 0;
  if (all) groups = mine.ends.size(), count = mine.pending.size();
  for (size_t i = 0; i < count; ++i) land(mine.pending[i]);
  mine.pending.erase(mine.pending.begin(), mine.pending.begin() + static_cast<ptrdiff_t>(count));
  mine.ends.erase(mine.ends.begin(), mine.ends.begin() + static_cast<ptrdiff_t>(groups));
  for (size_t& end : mine.ends) end -= count;
}

void end_copies(const Copies& copies) {
  if (!copies.pending.empty()) fail("exits before it has waited for its asynchronous copy", copies.pending.front().where);
}

}  // namespace fused_ops::emulation
