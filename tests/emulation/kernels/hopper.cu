// Needs sm_90: stmatrix, and the scope of a cluster.
#include "common/mma.cuh"
#include "common/shared.cuh"
#include "common/sync.cuh"
#include "kernels/harness.h"

using namespace fused_ops;
using namespace fused_ops::test;

// Registers into rows of 8 elements: matrix m's row r is row (5 (8 m + r) + 3) % 32 of `out`; the others stay.
template <int kCount, typename Store>
__device__ void store_matrices(const uint32_t* in, uint4* out, Store store) {
  SHARED(uint4, rows, 32);
  rows[threadIdx.x] = out[threadIdx.x];
  __syncwarp();
  uint32_t registers[kCount];
  for (int i = 0; i < kCount; ++i) registers[i] = in[threadIdx.x * kCount + i];
  store(rows + (5 * threadIdx.x + 3) % 32, registers);
  __syncwarp();
  out[threadIdx.x] = rows[threadIdx.x];
}

#define STORE(suffix, count)                                                                                           \
  __global__ void store_##suffix##_kernel(const uint32_t* in, uint4* out) {                                            \
    store_matrices<count>(in, out, [](void* row, const uint32_t (&r)[count]) { stmatrix_##suffix(row, r); });          \
  }                                                                                                                    \
  FUSED_OPS_TEST store_##suffix(const uint32_t* in, int64_t n, uint4* out, int64_t m) {                                \
    return tell([&] {                                                                                                  \
      const Array<const uint32_t> from(in, n);                                                                         \
      const Array<uint4> to(out, m / 8);                                                                               \
      launch(store_##suffix##_kernel, kOne, dim3(32), kOne, 0, nullptr, from, to);                                     \
    });                                                                                                                \
  }
STORE(x1, 1)
STORE(x2, 2)
STORE(x4, 4)
STORE(x1_trans, 1)
STORE(x2_trans, 2)
STORE(x4_trans, 4)

template <typename T>
__global__ void cluster_words_kernel(T* words) {
  T value = load_acquire<Scope::cluster>(words) + load_relaxed<Scope::cluster>(words + 1);
  store_release<Scope::cluster>(words, value);
  store_relaxed<Scope::cluster>(words + 1, value + 1);
  value = atomic_add<Scope::cluster>(words + 2, value) + atomic_add_relaxed<Scope::cluster>(words + 3, value);
  fence<Scope::cluster>();
  words[4] = value;
}

template <typename T>
const char* run_words(T* words, int64_t n) {
  return tell([&] {
    const Array<T> at(words, n);
    launch(cluster_words_kernel<T>, kOne, dim3(1), kOne, 0, nullptr, at);
  });
}
FUSED_OPS_TEST words_float(float* words, int64_t n) { return run_words(words, n); }
FUSED_OPS_TEST words_int(int32_t* words, int64_t n) { return run_words(words, n); }
FUSED_OPS_TEST words_long(int64_t* words, int64_t n) { return run_words(words, n); }
