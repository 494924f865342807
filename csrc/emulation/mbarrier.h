// The mbarriers of a block, shared by what arrives at them: threads and asynchronous copies.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "emulation/shadow.h"

namespace fused_ops::emulation {

// PTX ISA, "mbarrier": a phase is complete when no arrivals are pending and no bytes are to come.
struct MbarrierState {
  Block* block = nullptr;
  uint64_t* address = nullptr;
  uint32_t expected = 0, pending = 0;
  int32_t bytes = 0;
  uint32_t phase = 0;
  check::Signal arriving, complete;
  check::Copier* copier = nullptr;
  std::vector<Thread*> waiting;
  // Its initialisation; whether a fence showed it to the async proxy, and whether one (fence.mbarrier_init) and then an
  // arrival at the cluster's barrier, in `announced_in`, showed it to the cluster.
  const Thread* maker = nullptr;
  check::Access made;
  bool fenced = false, fenced_for_cluster = false, announced = false;
  uint32_t announced_in = 0;
  uint32_t observed = 0;  // phases that a thread of its block knows to be complete
  bool arrived_remotely = false;
  uint32_t remote_phase = 0;  // of the last arrival from another block
  check::Access remote_arrival;
  std::vector<check::Access> users;  // the last use by each thread of the block
  bool dropped = false;
  std::string description;  // what is missing, for messages
};

struct Mbarriers {
  std::vector<std::unique_ptr<MbarrierState>> all, dropped;
  std::array<check::Copier, check::kMbarriers> copiers;
  uint32_t made = 0;
};

// The mbarrier at `address`, for the running thread to use. Fails where there is none or its initialisation is not
// known to this thread.
MbarrierState& mbarrier_at(const uint64_t* address, const char* use, const Where& where);
// Adds to the bytes to come: those that a copy brought are negative.
void add_bytes(MbarrierState& barrier, int64_t bytes, const Where& where);
// What it knows of is shown to the cluster by an arrival at its barrier.
void announce_fenced_mbarriers();

// bulk_copy.cpp: completes a copy that `barrier` waits for, or, of those under way, any; false where there is none.
bool land_a_copy(const MbarrierState* barrier);
// A copy under way into this block's shared memory or to one of its mbarriers: where it was issued.
const Where* copy_into(const Block& block);

}  // namespace fused_ops::emulation
