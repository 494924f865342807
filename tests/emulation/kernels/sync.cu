// Counted barriers, scoped loads, stores, atomics and fences, polling, the barrier of the grid.
#include "common/shared.cuh"
#include "common/sync.cuh"
#include "kernels/harness.h"

using namespace fused_ops;
using namespace fused_ops::test;

constexpr uint32_t kFull = 1, kEmpty = 3;  // barriers, one for each of two buffers

// Warp 0 doubles rows of 32, warp 1 adds them up: out[lane] = 2 sum over rows of in[row][lane].
__global__ void produce_kernel(const float* in, float* out, int rows) {
  SHARED(float, buffer, 2 * 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  float sum = 0;
  for (int row = 0; row < rows; ++row) {
    const uint32_t which = static_cast<uint32_t>(row) % 2;
    float* mine = buffer + which * 32;
    if (threadIdx.x < 32) {
      if (row >= 2) bar_sync(kEmpty + which, 64);
      mine[lane] = 2 * in[row * 32 + lane];
      bar_arrive(kFull + which, 64);
    } else {
      bar_sync(kFull + which, 64);
      sum += mine[31 - lane];
      if (row + 2 < rows) bar_arrive(kEmpty + which, 64);
    }
  }
  if (threadIdx.x >= 32) out[31 - lane] = sum;
}

FUSED_OPS_TEST produce(const float* in, int64_t n, float* out, int64_t m) {
  return tell([&] {
    const Array<const float> from(in, n);
    const Array<float> to(out, m);
    launch(produce_kernel, kOne, dim3(64), kOne, 0, nullptr, from, to, static_cast<int>(n / 32));
  });
}

// Each half of a block turns its part round `turns` times, the second half once more; neither waits for the other.
__global__ void halves_kernel(const float* in, float* out, int turns) {
  SHARED(float, tile, 128);
  const uint32_t half = threadIdx.x / 64, i = threadIdx.x % 64;
  float* mine = tile + half * 64;
  float value = in[threadIdx.x];
  for (int turn = 0; turn < turns + static_cast<int>(half); ++turn) {
    mine[i] = value;
    bar_sync(1 + half, 64);
    value = mine[63 - i];
    bar_sync(1 + half, 64);
  }
  out[threadIdx.x] = value;
}

FUSED_OPS_TEST halves(const float* in, int64_t n, float* out, int64_t m, int64_t turns) {
  return tell([&] {
    const Array<const float> from(in, n);
    const Array<float> to(out, m);
    launch(halves_kernel, kOne, dim3(128), kOne, 0, nullptr, from, to, static_cast<int>(turns));
  });
}

// A prefix sum over blocks of 32, each waiting for the one before it. `flags` are 0 before.
__global__ void chain_kernel(const float* in, float* out, uint32_t* flags) {
  const uint32_t b = blockIdx.x, i = b * 32 + threadIdx.x;
  float before = 0;
  if (b > 0) {
    wait_until([&] { return load_acquire<Scope::device>(flags + b - 1) == 1; });
    before = out[i - 32];
  }
  out[i] = before + in[i];
  __syncwarp();
  if (threadIdx.x == 0) store_release<Scope::device>(flags + b, 1);
}

FUSED_OPS_TEST chain(const float* in, int64_t n, float* out, int64_t m, uint32_t* flags, int64_t blocks) {
  return tell([&] {
    const Array<const float> from(in, n);
    const Array<float> to(out, m);
    const Array<uint32_t> set(flags, blocks);
    launch_cooperative(chain_kernel, dim3(static_cast<unsigned>(blocks)), dim3(32), kOne, 0, nullptr, from, to, set);
  });
}

// The last block to come sums what all have written; it learns of it by a fence and a relaxed atomic, or by one that
// acquires and releases.
template <bool kFence>
__global__ void last_kernel(const float* in, float* partial, float* out, uint32_t* counter) {
  if (threadIdx.x == 0) {
    float sum = 0;
    for (uint32_t i = 0; i < 16; ++i) sum += in[blockIdx.x * 16 + i];
    partial[blockIdx.x] = sum;
    uint32_t before;
    if constexpr (kFence) {
      fence<Scope::device>();
      before = atomic_add_relaxed<Scope::device>(counter, 1);
      fence<Scope::device>();
    } else {
      before = atomic_add<Scope::device>(counter, 1);
    }
    if (before != gridDim.x - 1) return;
    float all = 0;
    for (uint32_t b = 0; b < gridDim.x; ++b) all += partial[b];
    *out = all;
  }
}

FUSED_OPS_TEST last(const float* in, int64_t n, float* partial, int64_t blocks, float* out, int64_t, uint32_t* counter,
                    int64_t, int64_t fenced) {
  return tell([&] {
    const Array<const float> from(in, n);
    const Array<float> parts(partial, blocks), to(out, 1);
    const Array<uint32_t> count(counter, 1);
    const auto kernel = fenced ? last_kernel<true> : last_kernel<false>;
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(32), kOne, 0, nullptr, from, parts, to, count);
  });
}

// x[i] += x[i + 1], `steps` times over the whole array, whose two versions take turns.
__global__ void steps_kernel(float* x, float* y, int n, int steps, uint32_t* counter) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  for (int step = 0; step < steps; ++step) {
    const float* from = step % 2 == 0 ? x : y;
    float* to = step % 2 == 0 ? y : x;
    if (i < n) to[i] = from[i] + from[(i + 1) % n];
    grid_sync(counter);
  }
}

FUSED_OPS_TEST steps(float* x, int64_t n, float* y, int64_t, uint32_t* counter, int64_t, int64_t count, int64_t threads) {
  return tell([&] {
    const Array<float> first(x, n), second(y, n);
    const Array<uint32_t> place(counter, 1);
    const auto blocks = static_cast<unsigned>((n + threads - 1) / threads);
    launch_cooperative(steps_kernel, dim3(blocks), dim3(static_cast<unsigned>(threads)), kOne, 0, nullptr, first, second,
                       static_cast<int>(n), static_cast<int>(count), place);
  });
}

// One thread takes every width through every load, store and sum, at each scope below a cluster's and above it.
template <Scope scope, typename T>
__device__ void words_of(T* words) {
  T value = load_acquire<scope>(words) + load_relaxed<scope>(words + 1);
  store_release<scope>(words, value);
  store_relaxed<scope>(words + 1, value + 1);
  value = atomic_add<scope>(words + 2, value) + atomic_add_relaxed<scope>(words + 3, value);
  fence<scope>();
  words[4] = value;
}

template <typename T>
__global__ void words_kernel(T* words) {
  words_of<Scope::block>(words);
  words_of<Scope::device>(words + 5);
  words_of<Scope::system>(words + 10);
}

template <typename T>
const char* run_words(T* words, int64_t n) {
  return tell([&] {
    const Array<T> at(words, n);
    launch(words_kernel<T>, kOne, dim3(1), kOne, 0, nullptr, at);
  });
}
FUSED_OPS_TEST words_float(float* words, int64_t n) { return run_words(words, n); }
FUSED_OPS_TEST words_int(int32_t* words, int64_t n) { return run_words(words, n); }
FUSED_OPS_TEST words_long(int64_t* words, int64_t n) { return run_words(words, n); }
