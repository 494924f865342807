// ldmatrix, mma.sync and the rounding to tf32, each alone: registers in, registers out.
#include "common/mma.cuh"
#include "common/shared.cuh"
#include "kernels/harness.h"

using namespace fused_ops;
using namespace fused_ops::test;

// Rows of 8 elements, in an order of their own: matrix m's row r is row (5 (8 m + r) + 3) % 32 of `in`.
template <int kCount, typename Load>
__device__ void load_matrices(const uint4* in, uint32_t* out, Load load) {
  SHARED(uint4, rows, 32);
  rows[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  uint32_t registers[kCount];
  load(registers, rows + (5 * threadIdx.x + 3) % 32);
  for (int i = 0; i < kCount; ++i) out[threadIdx.x * kCount + i] = registers[i];
}

#define LOAD(suffix, count)                                                                                            \
  __global__ void load_##suffix##_kernel(const uint4* in, uint32_t* out) {                                             \
    load_matrices<count>(in, out, [](uint32_t (&r)[count], const void* row) { ldmatrix_##suffix(r, row); });           \
  }                                                                                                                    \
  FUSED_OPS_TEST load_##suffix(const uint4* in, int64_t n, uint32_t* out, int64_t m) {                                 \
    return tell([&] {                                                                                                  \
      const Array<const uint4> from(in, n / 8);                                                                        \
      const Array<uint32_t> to(out, m);                                                                                \
      launch(load_##suffix##_kernel, kOne, dim3(32), kOne, 0, nullptr, from, to);                                      \
    });                                                                                                                \
  }
LOAD(x1, 1)
LOAD(x2, 2)
LOAD(x4, 4)
LOAD(x1_trans, 1)
LOAD(x2_trans, 2)
LOAD(x4_trans, 4)

template <typename T>
__device__ uint32_t two(const T* first, int apart) {
  uint16_t low, high;
  low = *reinterpret_cast<const uint16_t*>(first), high = *reinterpret_cast<const uint16_t*>(first + apart);
  return low | static_cast<uint32_t>(high) << 16;
}

// d = A B + c of one tile, A (16, K), B (K, 8), c and d (16, 8), row by row.
template <typename T>
__global__ void multiply_16_kernel(const T* A, const T* B, float* d) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const uint32_t a[4] = {two(A + g * 16 + 2 * t, 1), two(A + (g + 8) * 16 + 2 * t, 1), two(A + g * 16 + 2 * t + 8, 1),
                         two(A + (g + 8) * 16 + 2 * t + 8, 1)};
  const uint32_t b[2] = {two(B + 2 * t * 8 + g, 8), two(B + (2 * t + 8) * 8 + g, 8)};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_m16n8k16<T>(sum, a, b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

__global__ void multiply_8_kernel(const float* A, const float* B, float* d) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const uint32_t a[4] = {__float_as_uint(A[g * 8 + t]), __float_as_uint(A[(g + 8) * 8 + t]),
                         __float_as_uint(A[g * 8 + t + 4]), __float_as_uint(A[(g + 8) * 8 + t + 4])};
  const uint32_t b[2] = {__float_as_uint(B[t * 8 + g]), __float_as_uint(B[(t + 4) * 8 + g])};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_m16n8k8(sum, a, b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

template <typename T>
const char* multiply(void (*kernel)(const T*, const T*, float*), const T* a, int64_t n, const T* b, int64_t m, float* d,
                     int64_t k) {
  return tell([&] {
    const Array<const T> left(a, n), right(b, m);
    const Array<float> sum(d, k);
    launch(kernel, kOne, dim3(32), kOne, 0, nullptr, left, right, sum);
  });
}
FUSED_OPS_TEST multiply_half(const __half* a, int64_t n, const __half* b, int64_t m, float* d, int64_t k) {
  return multiply(multiply_16_kernel<__half>, a, n, b, m, d, k);
}
FUSED_OPS_TEST multiply_bfloat16(const __nv_bfloat16* a, int64_t n, const __nv_bfloat16* b, int64_t m, float* d, int64_t k) {
  return multiply(multiply_16_kernel<__nv_bfloat16>, a, n, b, m, d, k);
}
FUSED_OPS_TEST multiply_tf32(const float* a, int64_t n, const float* b, int64_t m, float* d, int64_t k) {
  return multiply(multiply_8_kernel, a, n, b, m, d, k);
}

__global__ void round_kernel(const float* in, uint32_t* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = to_tf32(in[i]);
}

FUSED_OPS_TEST round_tf32(const float* in, int64_t n, uint32_t* out, int64_t m) {
  return tell([&] {
    const Array<const float> from(in, n);
    const Array<uint32_t> to(out, m);
    launch(round_kernel, dim3(static_cast<unsigned>((n + 63) / 64)), dim3(64), kOne, 0, nullptr, from, to, static_cast<int>(n));
  });
}
