#include "emulation/builtins.h"

namespace fused_ops::emulation {

namespace {
void meet_all(Where where) {
  Block& block = *current->block;
  if (block.exited > 0) fail("__syncthreads after a thread of the block has exited", where);
  block.barriers[0].arrive(static_cast<uint32_t>(block.threads.size()), true, where);
}
}  // namespace

void sync_threads(Where where) { meet_all(where); }

int sync_threads_count(bool mine, Where where) {
  Block& block = *current->block;
  block.votes[0] += mine;
  meet_all(where);
  const int found = block.votes[0];
  if (++block.votes[1] == static_cast<int>(block.threads.size())) block.votes = {0, 0};
  meet_all(where);  // nobody votes again before all have read
  return found;
}

void sync_warp(unsigned mask, Where where) { collective("__syncwarp", mask, nullptr, nullptr, nullptr, true, where); }

unsigned active_mask() {
  const Warp& warp = current->block->warps[current->warp()];
  return warp.lanes & ~warp.exited;
}

uint64_t ticks() {
  static uint64_t count = 0;
  return count += 16;
}

}  // namespace fused_ops::emulation
