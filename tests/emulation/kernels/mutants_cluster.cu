// Faults of clusters and mbarriers.
#include "common/cluster.cuh"
#include "kernels/mutants_b.h"

// Clusters.

KERNEL(remote_before_start) {
  SHARED(float, mine, 32);
  mine[threadIdx.x] = in[threadIdx.x];
  if (!kFault) cluster_sync();
  const float other = remote(mine, cluster_rank() ^ 1)[threadIdx.x];  // remote_before_start
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = other;
}
CLUSTER_MUTANT(remote_before_start, 2, 32, 0)

KERNEL(remote_race) {
  SHARED(float, mine, 32);
  cluster_sync();
  mine[threadIdx.x] = in[threadIdx.x];  // remote_race
  if (!kFault) cluster_sync();
  const float other = remote(mine, cluster_rank() ^ 1)[31 - threadIdx.x];  // remote_race
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = other;
}
CLUSTER_MUTANT(remote_race, 2, 32, 0)

KERNEL(exit_before_neighbour) {
  SHARED(float, mine, 32);
  mine[threadIdx.x] = in[threadIdx.x];
  cluster_sync();
  if (cluster_rank() == 0) out[threadIdx.x] = remote(mine, 1)[threadIdx.x];  // exit_before_neighbour
  if (!kFault) cluster_sync();
}
CLUSTER_MUTANT(exit_before_neighbour, 2, 32, 0)

KERNEL(remote_out_of_bounds) {
  float* mine = dynamic_shared<float>();
  mine[threadIdx.x] = in[threadIdx.x];
  cluster_sync();
  const float other = remote(mine, cluster_rank() ^ 1)[threadIdx.x + (kFault ? 1 : 0)];  // remote_out_of_bounds
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = other;
}
CLUSTER_MUTANT(remote_out_of_bounds, 2, 32, 128)

KERNEL(no_such_block) {
  SHARED(float, mine, 32);
  mine[threadIdx.x] = in[threadIdx.x];
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = remote(mine, kFault ? 2 : 1)[threadIdx.x];  // no_such_block
  cluster_sync();
}
CLUSTER_MUTANT(no_such_block, 2, 32, 0)

KERNEL(wait_without_arrival) {
  if (!kFault || threadIdx.x != 5) cluster_arrive();
  cluster_wait();  // wait_without_arrival
  out[threadIdx.x] = in[threadIdx.x];
}
CLUSTER_MUTANT(wait_without_arrival, 1, 32, 0)

KERNEL(two_arrivals) {
  cluster_arrive();
  if (kFault && threadIdx.x == 3) cluster_arrive();  // two_arrivals
  cluster_wait();
  out[threadIdx.x] = in[threadIdx.x];
}
CLUSTER_MUTANT(two_arrivals, 1, 32, 0)

KERNEL(block_skips_barrier) {
  if (kFault && cluster_rank() == 1) {
    SHARED(Mbarrier, never, 1);
    make_ready(never, 1);
    mbarrier_wait(never, 0);
  }
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = in[threadIdx.x];
}
CLUSTER_MUTANT(block_skips_barrier, 2, 32, 0)

// Mbarriers.

KERNEL(not_initialised) {
  SHARED(Mbarrier, barrier, 2);
  make_ready(barrier, 32);
  mbarrier_arrive(barrier + (kFault ? 1 : 0));  // not_initialised
  mbarrier_wait(barrier, 0);
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(not_initialised, 1, 32, 0)

KERNEL(initialisation_not_ordered) {
  SHARED(Mbarrier, barrier, 1);
  SHARED(unsigned, ready, 1);
  if (threadIdx.x == 0) mbarrier_init(barrier, 64), atomicExch(ready, 1);  // initialisation_not_ordered
  if (kFault) wait_until([&] { return atomicAdd(ready, 0) == 1; });
  else __syncthreads();
  mbarrier_arrive(barrier);  // initialisation_not_ordered
  mbarrier_wait(barrier, 0);
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(initialisation_not_ordered, 1, 64, 0)

KERNEL(initialisation_not_announced) {
  SHARED(Mbarrier, barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 2);  // initialisation_not_announced
    if (!kFault) fence_mbarrier_init();
  }
  cluster_arrive_relaxed();
  cluster_wait();
  for (unsigned i = threadIdx.x; i < 2; i += 32) {
    mbarrier_arrive_remote(remote(barrier, i));  // initialisation_not_announced
  }
  if (threadIdx.x == 0) mbarrier_wait(barrier, 0);
  out[blockIdx.x * 32 + threadIdx.x] = in[threadIdx.x];
}
CLUSTER_MUTANT(initialisation_not_announced, 2, 32, 0)

KERNEL(initialised_twice) {
  SHARED(Mbarrier, barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 32);
    if (!kFault) mbarrier_inval(barrier);
    mbarrier_init(barrier, 32);  // initialised_twice
  }
  __syncthreads();
  mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(initialised_twice, 1, 32, 0)

KERNEL(overwritten) {
  SHARED(Mbarrier, barrier, 1);
  make_ready(barrier, 32);
  mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);
  __syncwarp();
  if (!kFault && threadIdx.x == 0) mbarrier_inval(barrier);
  if (threadIdx.x == 0) barrier[0] = 1;  // overwritten
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(overwritten, 1, 32, 0)

KERNEL(invalidated_too_early) {
  SHARED(Mbarrier, barrier, 1);
  make_ready(barrier, 32);
  mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);  // invalidated_too_early
  if (!kFault) __syncwarp();
  if (threadIdx.x == 0) mbarrier_inval(barrier);  // invalidated_too_early
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(invalidated_too_early, 1, 32, 0)

KERNEL(too_many_arrivals) {
  SHARED(Mbarrier, barrier, 1);
  make_ready(barrier, 32);
  mbarrier_arrive(barrier, kFault && threadIdx.x == 7 ? 33 : 1);  // too_many_arrivals
  mbarrier_wait(barrier, 0);
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(too_many_arrivals, 1, 32, 0)

KERNEL(too_few_arrivals) {
  SHARED(Mbarrier, barrier, 1);
  make_ready(barrier, kFault ? 33 : 32);
  mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);  // too_few_arrivals
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(too_few_arrivals, 1, 32, 0)

KERNEL(endless_test) {
  SHARED(Mbarrier, barrier, 1);
  make_ready(barrier, kFault ? 33 : 32);
  mbarrier_arrive(barrier);
  while (!mbarrier_test_wait_parity(barrier, 0)) {  // endless_test
  }
  out[threadIdx.x] = in[threadIdx.x];
}
MUTANT(endless_test, 1, 32, 0)

KERNEL(wrong_parity) {
  SHARED(Mbarrier, barrier, 1);
  SHARED(float, value, 32);
  make_ready(barrier, 32);
  if (threadIdx.x < 32) {
    value[threadIdx.x] = in[threadIdx.x];  // wrong_parity
    mbarrier_arrive(barrier);
    return;
  }
  mbarrier_wait(barrier, kFault ? 1 : 0);
  out[threadIdx.x - 32] = value[63 - threadIdx.x];  // wrong_parity
}
MUTANT(wrong_parity, 1, 64, 0)

// The parity is not flipped: the second turn's wait is for the first turn's phase.
KERNEL(parity_kept) {
  SHARED(Mbarrier, barrier, 1);
  SHARED(float, value, 64);
  make_ready(barrier, 32);
  for (unsigned turn = 0; turn < 2; ++turn) {
    if (threadIdx.x < 32) {
      value[turn * 32 + threadIdx.x] = in[threadIdx.x] + static_cast<float>(turn);  // parity_kept
      mbarrier_arrive(barrier);
    } else {
      mbarrier_wait(barrier, kFault ? 0 : turn);
      out[turn * 32 + threadIdx.x - 32] = value[turn * 32 + 63 - threadIdx.x];  // parity_kept
    }
    if (turn == 0) __syncthreads();
  }
}
MUTANT(parity_kept, 1, 64, 0)

KERNEL(missing_mbarrier_wait) {
  SHARED(Mbarrier, barrier, 1);
  SHARED(float, value, 32);
  make_ready(barrier, 32);
  if (threadIdx.x < 32) {
    value[threadIdx.x] = in[threadIdx.x];  // missing_mbarrier_wait
    mbarrier_arrive(barrier);
  } else {
    if (!kFault) mbarrier_wait(barrier, 0);
    out[threadIdx.x - 32] = value[63 - threadIdx.x];  // missing_mbarrier_wait
  }
}
MUTANT(missing_mbarrier_wait, 1, 64, 0)

KERNEL(narrow_wait) {
  SHARED(Mbarrier, barrier, 1);
  SHARED(float, value, 32);
  if (threadIdx.x == 0) mbarrier_init(barrier, 32);
  cluster_sync();
  remote(value, cluster_rank() ^ 1)[threadIdx.x] = in[threadIdx.x];  // narrow_wait
  mbarrier_arrive_remote(remote(barrier, cluster_rank() ^ 1));
  mbarrier_wait<kFault ? Scope::block : Scope::cluster>(barrier, 0);
  const float got = value[31 - threadIdx.x];  // narrow_wait
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = got;
}
CLUSTER_MUTANT(narrow_wait, 2, 32, 0)

KERNEL(exit_before_arrival) {
  SHARED(Mbarrier, barrier, 1);
  if (threadIdx.x == 0) mbarrier_init(barrier, 32);
  cluster_sync();
  if (cluster_rank() == 0) mbarrier_arrive_remote(remote(barrier, 1));  // exit_before_arrival
  else if (!kFault) mbarrier_wait(barrier, 0);
  out[blockIdx.x * 32 + threadIdx.x] = in[threadIdx.x];
}
CLUSTER_MUTANT(exit_before_arrival, 2, 32, 0)

KERNEL(wait_elsewhere) {
  SHARED(Mbarrier, barrier, 1);
  if (threadIdx.x == 0) mbarrier_init(barrier, 32);
  cluster_sync();
  mbarrier_arrive(barrier);
  mbarrier_wait(kFault ? remote(barrier, cluster_rank() ^ 1) : barrier, 0);  // wait_elsewhere
  cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = in[threadIdx.x];
}
CLUSTER_MUTANT(wait_elsewhere, 2, 32, 0)
