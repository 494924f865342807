#include "common/cluster.cuh"

#include "common/mbarrier.cuh"
#include "common/shared.cuh"
#include "kernels/harness.h"

using namespace fused_ops;
using namespace fused_ops::test;

// out = rank and size of every block's cluster.
__global__ void ranks_kernel(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (threadIdx.x == 0) {
    out[2 * block] = static_cast<int>(cluster_rank()), out[2 * block + 1] = static_cast<int>(cluster_size());
  }
}

FUSED_OPS_TEST ranks(int* out, int64_t n, int64_t x, int64_t y, int64_t z, int64_t cx, int64_t cy, int64_t cz) {
  return tell([&] {
    const Array<int> to(out, n);
    const auto three = [](int64_t a, int64_t b, int64_t c) {
      return dim3(static_cast<unsigned>(a), static_cast<unsigned>(b), static_cast<unsigned>(c));
    };
    launch(ranks_kernel, three(x, y, z), dim3(32), three(cx, cy, cz), 0, nullptr, to);
  });
}

// out[c] = the sum of in over cluster c's blocks: each block sums its part, then block 0 adds what the others hold.
__global__ void sum_kernel(const float* in, float* out, int n) {
  SHARED(float, parts, 64);
  SHARED(float, total, 1);
  const auto block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x),
             thread = static_cast<int>(threadIdx.x);
  float mine = 0;
  for (int i = block * 64 + thread; i < n; i += blocks * 64) mine += in[i];
  parts[thread] = mine;
  __syncthreads();
  if (thread == 0) {
    total[0] = 0;
    for (int i = 0; i < 64; ++i) total[0] += parts[i];
  }
  cluster_sync();
  if (cluster_rank() == 0 && thread == 0) {
    float all = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) all += *remote(total, rank);
    out[blockIdx.x / cluster_size()] = all;
  }
  cluster_sync();
}

FUSED_OPS_TEST sum(const float* in, int64_t n, float* out, int64_t m, int64_t blocks, int64_t cluster) {
  return tell([&] {
    const Array<const float> from(in, n);
    const Array<float> to(out, m);
    launch(sum_kernel, dim3(static_cast<unsigned>(blocks)), dim3(64), dim3(static_cast<unsigned>(cluster)), 0, nullptr,
           from, to, static_cast<int>(n));
  });
}

// A histogram of in over bins that the blocks of a cluster share: block r holds bins r, r + size, ...
__global__ void histogram_kernel(const int* in, int* out, int n, int bins) {
  int* mine = dynamic_shared<int>();
  const auto size = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
  for (int i = static_cast<int>(threadIdx.x); i * size < bins; i += 64) mine[i] = 0;
  cluster_sync();
  for (int i = rank * 64 + static_cast<int>(threadIdx.x); i < n; i += 64 * size) {
    atomicAdd(remote(mine, static_cast<unsigned>(in[i] % size)) + in[i] / size, 1);
  }
  cluster_sync();
  for (int i = static_cast<int>(threadIdx.x); i * size + rank < bins; i += 64) out[i * size + rank] = mine[i];
}

FUSED_OPS_TEST histogram(const int* in, int64_t n, int* out, int64_t bins, int64_t cluster) {
  return tell([&] {
    const Array<const int> from(in, n);
    const Array<int> to(out, bins);
    const dim3 blocks(static_cast<unsigned>(cluster));
    launch(histogram_kernel, blocks, dim3(64), blocks,
           static_cast<size_t>((bins + cluster - 1) / cluster) * sizeof(int), nullptr, from, to, static_cast<int>(n),
           static_cast<int>(bins));
  });
}

// Every block writes its number into the next one's shared memory, by parts: arrive, other work, wait.
__global__ void pass_on_kernel(int* out, bool relaxed) {
  SHARED(int, got, 32);
  SHARED(int, own, 32);
  cluster_arrive_relaxed();
  own[threadIdx.x] = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
  cluster_wait();
  remote(got, (cluster_rank() + 1) % cluster_size())[threadIdx.x] = own[threadIdx.x];
  if (relaxed) cluster_arrive_relaxed();
  else cluster_arrive();
  cluster_wait();
  out[blockIdx.x * 32 + threadIdx.x] = got[threadIdx.x];
}

FUSED_OPS_TEST pass_on(int* out, int64_t n, int64_t cluster, int64_t relaxed) {
  return tell([&] {
    const Array<int> to(out, n);
    launch(pass_on_kernel, dim3(static_cast<unsigned>(n / 32)), dim3(32), dim3(static_cast<unsigned>(cluster)), 0,
           nullptr, to, relaxed != 0);
  });
}

FUSED_OPS_TEST pass_on_cooperatively(int* out, int64_t n, int64_t cluster) {
  return tell([&] {
    const Array<int> to(out, n);
    launch_cooperative(pass_on_kernel, dim3(static_cast<unsigned>(n / 32)), dim3(32), dim3(static_cast<unsigned>(cluster)),
                       0, nullptr, to, false);
  });
}

// Some threads leave early: the cluster's barrier is of those that are left.
__global__ void leave_kernel(int* out) {
  if (threadIdx.x >= 32) return;
  for (int i = 0; i < 3; ++i) cluster_sync();
  out[blockIdx.x * 32 + threadIdx.x] = static_cast<int>(cluster_rank());
}

FUSED_OPS_TEST leave(int* out, int64_t n) {
  return tell([&] {
    const Array<int> to(out, n);
    const dim3 blocks(static_cast<unsigned>(n / 32));
    launch(leave_kernel, blocks, dim3(96), blocks, 0, nullptr, to);
  });
}
