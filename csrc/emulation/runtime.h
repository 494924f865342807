// The emulated GPU: what runs, what waits, and what the emulated built-ins and PTX wrappers are made of.
//
// Every CUDA thread is a fiber. A fiber runs until it waits: for the others of a barrier, for the lanes of a warp
// collective, or for memory that another thread must write. Whoever is ready next is drawn from a generator seeded by
// FUSED_OPS_EMULATE_SEED (or `set_seed`): the same seed gives the same schedule. When nobody is ready the launch has
// hung, and says where everybody waits.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include "emulation/check.h"

// As in a kernel; the emulator sets them whenever another thread runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace fused_ops::emulation {

struct Block;
struct BulkCopies;
struct Mbarriers;
struct WarpgroupOperations;
struct Group;  // the blocks that must be alive together: one, a cluster, or a cooperative grid

enum class State : uint8_t { kReady, kWaiting, kPolling, kDone };

struct Thread {
  void* stack_pointer = nullptr;
  std::byte* stack = nullptr;  // its lowest address
  Block* block = nullptr;
  uint3 index{};
  uint32_t number = 0;  // within the block, x fastest
  State state = State::kReady;
  uint64_t polled_at = 0;         // value of the progress counter when it last polled in vain
  const char* waits_for = "";     // of a thread that is not ready
  Where where = Where::current();
  // The checker's, see check.h.
  uint32_t clock = 1;
  Ref<Knowledge> knows;
  const uint32_t* clocks = nullptr;  // what `knows` says of this block
  Ref<Knowledge> shown_to_copies;    // what asynchronous copies may see
  check::Signal fenced, heard;       // what its next relaxed atomics pass on; what they heard, until a fence
  struct Copies* copies = nullptr;   // its cp.async groups, see async_copy.cpp
  BulkCopies* bulk_copies = nullptr;        // its groups of them, see bulk_copy.cpp
  check::Registers* registers = nullptr;    // what it keeps of its registers for wgmma, see wgmma.cpp
  bool cluster_arrived = false;             // at the barrier of its cluster, and not waited yet...
  uint32_t cluster_generation = 0;          // ...in this use of it
  uint32_t cluster_waits = 0;
  const void* waits_on = nullptr;           // the mbarrier, if it is one
  uint32_t tests_in_vain = 0;               // of it, in a row
  uint32_t lane() const { return number % 32; }
  uint32_t warp() const { return number / 32; }
};

// The thread that runs. Null outside a launch.
extern Thread* current;

// Its lane. Instrumented code asks here: the emulator's own memory is none of its tensors.
uint32_t this_lane();

// A wrong program: ends the launch, which raises RuntimeError(kernel, block, thread, what, where).
[[noreturn]] void fail(const std::string& what, Where where = Where::current());

// "block (0,0,0) warp 1 lane 3", for messages about another thread.
std::string name_of(const Thread& thread);
std::string line_of(const Where& where);

// Threads that meet. The last one to come runs `complete`, in whose course everybody's accesses so far become known to
// everybody (if `orders`), and wakes the others.
class Meeting {
 public:
  explicit Meeting(const char* what = "a barrier", bool orders = true) : what_(what), orders_(orders) {}
  // `expected` threads, this one included. Waits, unless `wait` is false (an arrival only).
  void arrive(uint32_t expected, bool wait, Where where);
  bool awaits(const Thread& thread) const;  // its whole block is expected, and some wait
  const Thread& first() const { return *waiting_.front(); }

 private:
  const char* what_;
  bool orders_;
  uint32_t expected_ = 0;
  std::vector<Thread*> arrived_;
  std::vector<Thread*> waiting_;
  check::Signal announced_;  // by those who did not wait
};

// Lanes of a warp that compute together. `mine` is this lane's operand and result; when the last lane of `mask` has
// come, `all` gets every lane's (null for lanes outside the mask). No memory is ordered unless `orders`.
template <typename Mine>
using Lanes = std::array<Mine*, 32>;
void collective(const char* kind, unsigned mask, void* mine, void (*all)(Lanes<void>&, void*), void* context,
                bool orders, Where where);
template <typename Mine, typename All>
void collective(const char* kind, unsigned mask, Mine& mine, All all, Where where) {
  const auto call = [](Lanes<void>& lanes, void* context) {
    (*static_cast<All*>(context))(reinterpret_cast<Lanes<Mine>&>(lanes));
  };
  collective(kind, mask, &mine, call, &all, false, where);
}

// Lets others run until `ready()`. Every loop that waits for another thread's write is one of these; when everybody
// left polls in vain, the launch has hung.
template <typename Ready>
void poll_until(const char* what, Ready&& ready, Where where);
void poll_in_vain(const char* what, Where where);
void poll_succeeded();

template <typename Ready>
void poll_until(const char* what, Ready&& ready, Where where) {
  while (!ready()) poll_in_vain(what, where);
  poll_succeeded();
}

// Something happened that a polling thread may see (an asynchronous copy landed).
void made_progress();

// Lets another ready thread run.
void yield();

// Waits until somebody wakes this thread.
void wait(const char* what, const Where& where);
void wake(Thread* thread);

// A number below n, from the schedule's generator; `late` is true where everything is to happen as late as it can.
uint32_t draw(size_t n);
bool late();

// Lanes waiting in a collective.
struct Pending {
  const char* kind = "";
  unsigned mask = 0, arrived = 0;
  std::array<Thread*, 32> threads{};
  Lanes<void> operands{};
};

struct Warp {
  unsigned lanes = 0, exited = 0;
  std::vector<Pending> pending;
};

struct Cluster;

// The last that a thread of another block of the cluster did to a block's shared memory.
struct RemoteAccess {
  uint32_t block, number, clock, site;
};

struct Block {
  uint3 index{};
  uint32_t linear = 0;
  uint32_t rank = 0;  // within the group
  uint32_t cluster = 0;  // number of its cluster within the grid
  uint32_t slot = 0;  // of those that exist at once
  Group* group = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<class Stack*> stacks;
  uint32_t exited = 0;
  std::array<Meeting, 16> barriers;  // 0 is __syncthreads
  std::array<int, 2> votes{};        // of __syncthreads_count: for, and read
  std::byte* shared = nullptr;       // dynamic memory, then static variables
  size_t dynamic_bytes = 0, shared_bytes = 0;
  std::vector<std::shared_ptr<void>> attached;          // what twins of PTX wrappers keep for this block
  std::shared_ptr<Cluster> in_cluster;
  std::vector<RemoteAccess> remote_accesses;
  Mbarriers* mbarriers = nullptr;              // see mbarrier.cpp
  WarpgroupOperations* warpgroups = nullptr;   // see wgmma.cpp
};

// PTX ISA, "barrier.cluster": all threads of the cluster that have not exited.
struct Cluster {
  std::vector<Block*> blocks;  // by rank
  uint32_t running = 0, missing = 0, generation = 0;  // threads; those that have not arrived; completed uses
  check::Signal arriving, complete;
  std::vector<Thread*> waiting;
};

struct Group {
  uint32_t number = 0;
  std::vector<Block*> blocks;  // by rank
  uint32_t running = 0;        // blocks with threads left
  Meeting barrier{"the barrier of all blocks"};
};

struct Chip {
  int multiprocessors = 132, capability = 90;
  size_t shared_per_block = 227 * 1024, shared_per_multiprocessor = 228 * 1024;
  uint32_t threads_per_multiprocessor = 2048, blocks_per_multiprocessor = 32;
};
extern Chip chip;

// This block's memory for a SHARED variable, told apart by `declaration`.
void* static_shared(const void* declaration, size_t bytes, size_t alignment, Where where);
void* dynamic_shared_memory();
bool in_shared(const void* address, size_t bytes);  // of the running thread's block

void end_copies(const Copies& copies);  // of a thread that exits

// cluster.cpp, mbarrier.cpp, bulk_copy.cpp, wgmma.cpp: what the running thread, which exits, leaves behind.
void leave_cluster();
void end_bulk_copies();
void end_warpgroup_operations();
void end_mbarriers(Block& block);
// Completes one asynchronous copy of those under way; false where there is none.
bool land_a_copy();
void forget_copies();
void describe_mbarriers(const Block& block);  // as what threads wait for

void set_seed(uint64_t seed);
void set_checked(bool checked);
extern uint64_t accesses_since_switch;
extern bool checked, suspended;  // suspended: within the emulator's own work on several lanes' operands

struct Shape {
  dim3 grid, block, cluster;
  size_t shared_bytes;
  bool cooperative;
};
// How many blocks can be alive together, in whole clusters.
int64_t co_resident_blocks(dim3 block, dim3 cluster, size_t shared_bytes);
// Calls body(arguments) once for every thread; `kernel` names it in errors. Throws std::runtime_error for a finding.
void run(const void* kernel, const Shape& shape, void (*body)(const void*), const void* arguments, size_t bytes);

}  // namespace fused_ops::emulation
