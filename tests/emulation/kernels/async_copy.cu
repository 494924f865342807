// Asynchronous copies: stages of a pipeline, and rows that end early.
#include "common/async_copy.cuh"
#include "common/shared.cuh"
#include "kernels/harness.h"

using namespace fused_ops;
using namespace fused_ops::test;

// out[tile][i] = in[tile][last - i], with kStages tiles of a chunk for each thread on their way.
template <int kBytes, int kStages>
__global__ void staged_kernel(const float* in, float* out, int tiles) {
  constexpr uint32_t kFloats = kBytes / 4;
  float* stages = dynamic_shared<float>();
  const uint32_t size = blockDim.x * kFloats;
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      cp_async<kBytes>(stages + static_cast<uint32_t>(tile) % kStages * size + threadIdx.x * kFloats,
                       in + static_cast<uint32_t>(tile) * size + threadIdx.x * kFloats);
    }
    cp_async_commit();
  };
  for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    fetch(tile + kStages - 1);
    const float* mine = stages + static_cast<uint32_t>(tile) % kStages * size;
    for (uint32_t i = threadIdx.x; i < size; i += blockDim.x) out[static_cast<uint32_t>(tile) * size + i] = mine[size - 1 - i];
  }
  cp_async_wait_all();
}

template <int kBytes>
void run_staged(const float* in, float* out, int64_t n, int64_t threads, int64_t stages) {
  const Array<const float> from(in, n);
  const Array<float> to(out, n);
  const auto bytes = static_cast<size_t>(threads) * kBytes * static_cast<size_t>(stages);
  const auto tiles = static_cast<int>(n / (threads * kBytes / 4));
  const auto kernel = stages == 2 ? staged_kernel<kBytes, 2> : staged_kernel<kBytes, 4>;
  launch(kernel, kOne, dim3(static_cast<unsigned>(threads)), kOne, bytes, nullptr, from, to, tiles);
}

FUSED_OPS_TEST staged(const float* in, int64_t n, float* out, int64_t, int64_t bytes, int64_t threads, int64_t stages) {
  return tell([&] { (bytes == 4 ? run_staged<4> : bytes == 8 ? run_staged<8> : run_staged<16>)(in, out, n, threads, stages); });
}

// n bytes into rows that are full of zeros after them: out has 32 chunks.
template <int kBytes>
__global__ void padded_kernel(const unsigned char* in, unsigned char* out, int n) {
  unsigned char* row = dynamic_shared<unsigned char>();
  const int at = static_cast<int>(threadIdx.x) * kBytes, left = n - at;
  const auto there = static_cast<uint32_t>(left < 0 ? 0 : left < kBytes ? left : kBytes);
  cp_async<kBytes>(row + at, there == 0 ? in : in + at, there);
  cp_async_wait_all();
  for (int i = 0; i < kBytes; ++i) out[at + i] = row[at + i];
}

FUSED_OPS_TEST padded(const unsigned char* in, int64_t n, unsigned char* out, int64_t m, int64_t bytes) {
  return tell([&] {
    const Array<const unsigned char> from(in, n);
    const Array<unsigned char> to(out, m);
    const auto kernel = bytes == 4 ? padded_kernel<4> : bytes == 8 ? padded_kernel<8> : padded_kernel<16>;
    launch(kernel, kOne, dim3(32), kOne, static_cast<size_t>(m), nullptr, from, to, static_cast<int>(n));
  });
}
