#include "common/wgmma.cuh"

#include "common/bulk_copy.cuh"
#include "common/shared.cuh"
#include "kernels/harness.h"

using namespace fused_ops;
using namespace fused_ops::test;

// How an operand lies in the image of shared memory that the test gives.
struct Layout {
  int start, leading, stride, step;  // bytes; `step` from one product's part of K to the next
  Swizzle swizzle;
};

// D (64 x N) = A B^T over `steps` products, D = -1 before, which the first product keeps or not. A's fragments come
// from `fragments` (step, thread, 4) in place of the image if kRegistersA.
template <typename T, int kN, Major kA, Major kB, bool kRegistersA>
__global__ void __launch_bounds__(128, 1) product_kernel(const uint4* image, int bytes, const uint32_t* fragments,
                                                         float* out, Layout a, Layout b, int steps, bool keep) {
  auto* shared = dynamic_shared<unsigned char>();
  const auto thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < bytes / 16; i += 128) reinterpret_cast<uint4*>(shared)[i] = image[i];
  float d[kN / 2];
  for (int i = 0; i < kN / 2; ++i) d[i] = -1;
  [[maybe_unused]] uint32_t registers[4][4];
  if constexpr (kRegistersA) {
    for (int step = 0; step < steps; ++step) {
      for (int i = 0; i < 4; ++i) registers[step][i] = fragments[(step * 128 + thread) * 4 + i];
    }
  }
  fence_proxy_async();
  __syncthreads();
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    if (step >= steps) break;
    const uint64_t from_b = wgmma_descriptor(shared + b.start + step * b.step, static_cast<unsigned>(b.leading),
                                             static_cast<unsigned>(b.stride), b.swizzle);
    const bool add = keep || step > 0;
    if constexpr (kRegistersA) {
      wgmma<T, kB>(d, registers[step], from_b, add);
    } else {
      const uint64_t from_a = wgmma_descriptor(shared + a.start + step * a.step, static_cast<unsigned>(a.leading),
                                               static_cast<unsigned>(a.stride), a.swizzle);
      wgmma<T, kA, kB>(d, from_a, from_b, add);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  for (int i = 0; i < kN / 2; ++i) out[(row + i / 2 % 2 * 8) * kN + i / 4 * 8 + column + i % 2] = d[i];
}

template <typename T, int kN, Major kA, Major kB, bool kRegistersA>
const char* product(const uint32_t* image, int64_t n, const uint32_t* fragments, int64_t k, float* out, int64_t m,
                    const int64_t* spec) {
  return tell([&] {
    const Array<const uint32_t> from(image, n), a_from(fragments, k);
    const Array<float> to(out, m);
    const auto layout = [&](int at) {
      const auto value = [&](int i) { return static_cast<int>(spec[at + i]); };
      return Layout{value(0), value(1), value(2), value(3), static_cast<Swizzle>(value(4))};
    };
    launch(product_kernel<T, kN, kA, kB, kRegistersA>, kOne, dim3(128), kOne, static_cast<size_t>(n) * 4, nullptr,
           reinterpret_cast<const uint4*>(static_cast<const uint32_t*>(from)), static_cast<int>(n) * 4, a_from, to,
           layout(0), layout(5), static_cast<int>(spec[10]), spec[11] != 0);
  });
}

#define PRODUCT(name, ...)                                                                                             \
  FUSED_OPS_TEST product_##name(const uint32_t* image, int64_t n, const uint32_t* fragments, int64_t k, float* out,    \
                                int64_t m, const int64_t* spec, int64_t) {                                             \
    return product<__VA_ARGS__>(image, n, fragments, k, out, m, spec);                                                 \
  }
PRODUCT(half_8_k_k, __half, 8, Major::k, Major::k, false)
PRODUCT(half_64_k_mn, __half, 64, Major::k, Major::mn, false)
PRODUCT(bfloat_16_k_k, __nv_bfloat16, 16, Major::k, Major::k, false)
PRODUCT(bfloat_64_mn_k, __nv_bfloat16, 64, Major::mn, Major::k, false)
PRODUCT(bfloat_128_mn_mn, __nv_bfloat16, 128, Major::mn, Major::mn, false)
PRODUCT(bfloat_192_k_k, __nv_bfloat16, 192, Major::k, Major::k, false)
PRODUCT(half_256_k_k, __half, 256, Major::k, Major::k, false)
PRODUCT(tf32_96_k_k, float, 96, Major::k, Major::k, false)
PRODUCT(half_32_r_k, __half, 32, Major::k, Major::k, true)
PRODUCT(bfloat_64_r_mn, __nv_bfloat16, 64, Major::k, Major::mn, true)
PRODUCT(tf32_32_r_k, float, 32, Major::k, Major::k, true)

// C (m x n) = A (m x k) B (n x k)^T by tiles of 128 x 64: one warp copies tiles of A and B in, 64 of K at a time,
// kStages ahead; two warpgroups multiply 64 rows each. What lies outside A and B is zero.
constexpr int kStages = 3, kTileM = 128, kTileN = 64, kTileK = 64;
struct Stage {
  __nv_bfloat16 a[kTileM * kTileK], b[kTileN * kTileK];
};
__global__ void __launch_bounds__(384, 1)
    gemm_kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, float* c, int m,
                int n, int k) {
  Stage* stages = dynamic_shared<Stage>();
  SHARED(Mbarrier, full, kStages);
  SHARED(Mbarrier, empty, kStages);
  const auto warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int row = static_cast<int>(blockIdx.y) * kTileM, column = static_cast<int>(blockIdx.x) * kTileN;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) mbarrier_init(full + i, 1), mbarrier_init(empty + i, 8);
    fence_mbarrier_init();
  }
  __syncthreads();
  const int turns = (k + kTileK - 1) / kTileK;
  if (warp < 4) {
    release_registers<24>();
    if (threadIdx.x != 0) return;
    for (int turn = 0; turn < turns; ++turn) {
      const int stage = turn % kStages;
      mbarrier_wait(empty + stage, static_cast<unsigned>(turn / kStages % 2 ^ 1));
      mbarrier_arrive_expect_tx(full + stage, sizeof(Stage));
      tensor_load(stages[stage].a, map_a, full + stage, {turn * kTileK, row});
      tensor_load(stages[stage].b, map_b, full + stage, {turn * kTileK, column});
    }
  } else {
    request_registers<240>();
    const int group = warp / 4 - 1;
    float d[kTileN / 2];
    for (int i = 0; i < kTileN / 2; ++i) d[i] = 0;
    for (int turn = 0; turn < turns; ++turn) {
      const int stage = turn % kStages;
      mbarrier_wait(full + stage, static_cast<unsigned>(turn / kStages % 2));
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kTileK; step += 16) {
        wgmma<__nv_bfloat16>(
            d, wgmma_descriptor(stages[stage].a + group * 64 * kTileK + step, 16, 1024, Swizzle::bytes128),
            wgmma_descriptor(stages[stage].b + step, 16, 1024, Swizzle::bytes128), true);
      }
      wgmma_commit();
      wgmma_wait<1>();  // the turn before has read its stage
      if (turn > 0 && lane == 0) mbarrier_arrive(empty + (turn - 1) % kStages);
    }
    wgmma_wait<0>();
    const int first = row + group * 64 + warp % 4 * 16 + lane / 4;
    for (int i = 0; i < kTileN / 2; ++i) {
      const int y = first + i / 2 % 2 * 8, x = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (y < m && x < n) c[static_cast<int64_t>(y) * n + x] = d[i];
    }
  }
}

FUSED_OPS_TEST gemm(const __nv_bfloat16* a, int64_t na, const __nv_bfloat16* b, int64_t nb, float* c, int64_t nc,
                    int64_t m, int64_t n, int64_t k) {
  return tell([&] {
    const Array<const __nv_bfloat16> from_a(a, na), from_b(b, nb);
    const Array<float> to(c, nc);
    const auto map = [&](const __nv_bfloat16* base, int64_t rows, int64_t all, uint32_t tile) {
      return make_tensor_map<__nv_bfloat16, 2>(base, {static_cast<uint64_t>(k), static_cast<uint64_t>(rows)},
                                               {static_cast<uint64_t>(all / rows * 2)}, {kTileK, tile},
                                               Swizzle::bytes128);
    };
    const dim3 grid(static_cast<unsigned>((n + kTileN - 1) / kTileN), static_cast<unsigned>((m + kTileM - 1) / kTileM));
    launch(gemm_kernel, grid, dim3(384), kOne, kStages * sizeof(Stage), nullptr, map(from_a, m, na, kTileM),
           map(from_b, n, nb, kTileN), to, static_cast<int>(m), static_cast<int>(n), static_cast<int>(k));
  });
}
