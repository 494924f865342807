// What common/cluster.cuh's twin does.
#include <algorithm>
#include <string>

#include "emulation/common/cluster.cuh"
#include "emulation/mbarrier.h"

namespace fused_ops {

uint32_t cluster_rank() {
  const emulation::Block& block = *emulation::current->block;
  return static_cast<uint32_t>(std::ranges::find(block.in_cluster->blocks, &block) - block.in_cluster->blocks.begin());
}

uint32_t cluster_size() { return static_cast<uint32_t>(emulation::current->block->in_cluster->blocks.size()); }

namespace emulation {
namespace {

void complete_if_all_came(Cluster& cluster) {
  if (cluster.missing > 0) return;
  ++cluster.generation;
  cluster.missing = cluster.running;
  cluster.complete = std::move(cluster.arriving);
  cluster.arriving.parts.clear();
  for (Thread* thread : cluster.waiting) wake(thread);
  cluster.waiting.clear();
  made_progress();
}

}  // namespace

void arrive_at_cluster(bool releases, Where where) {
  Thread& self = *current;
  Cluster& cluster = *self.block->in_cluster;
  if (self.cluster_arrived) fail("arrives again at the barrier of its cluster without a wait in between", where);
  self.cluster_arrived = true, self.cluster_generation = cluster.generation;
  if (releases) check::release(cluster.arriving, Scope::cluster);
  announce_fenced_mbarriers();
  --cluster.missing;
  complete_if_all_came(cluster);
}

void wait_for_cluster(Where where) {
  Thread& self = *current;
  Cluster& cluster = *self.block->in_cluster;
  if (!self.cluster_arrived) fail("waits at the barrier of its cluster without having arrived", where);
  while (cluster.generation == self.cluster_generation) {
    cluster.waiting.push_back(&self);
    wait("the barrier of its cluster", where);
  }
  check::acquire(cluster.complete, Scope::cluster);
  self.cluster_arrived = false;
  ++self.cluster_waits;
}

void leave_cluster() {
  Thread& self = *current;
  Cluster& cluster = *self.block->in_cluster;
  --cluster.running;
  if (!self.cluster_arrived || self.cluster_generation != cluster.generation) --cluster.missing;
  if (cluster.running > 0) complete_if_all_came(cluster);
}

void* remote_shared(const void* mine, uint32_t rank, Where where) {
  const Block& block = *current->block;
  const auto& blocks = block.in_cluster->blocks;
  if (rank >= blocks.size()) {
    fail("block " + std::to_string(rank) + " of a cluster of " + std::to_string(blocks.size()), where);
  }
  const auto offset = static_cast<const std::byte*>(mine) - block.shared;
  if (offset < 0 || static_cast<size_t>(offset) > block.shared_bytes) {
    fail("maps an address outside this block's shared memory to another block", where);
  }
  return blocks[rank]->shared + offset;
}

}  // namespace emulation
}  // namespace fused_ops
