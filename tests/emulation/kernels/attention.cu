// softmax(scale Q K^T) V of one head, a block for 64 queries: what a kernel looks like that uses ldmatrix, mma.sync and
// cp.async, and what the emulator's speed is measured by.
//
// Four warps hold 16 rows of Q each in registers. Tiles of 64 keys and values come in two stages, the next while this one
// is multiplied. Rows of a tile are 128 bytes; chunk c of row r lies at c ^ (r % 8), so that the eight rows of an 8x8
// matrix lie in different banks.
#include "common/async_copy.cuh"
#include "common/mma.cuh"
#include "common/shared.cuh"
#include "kernels/harness.h"

using namespace fused_ops;
using namespace fused_ops::test;

constexpr int kTile = 64, kDim = 64, kChunks = kDim / 8, kThreads = 128;

__device__ inline __half* chunk(__half* tile, int row, int column) {
  return tile + row * kDim + (column ^ row % 8) * 8;
}

// Rows first..first + 63 of a (length, 64) matrix; those past the end are zeros.
__device__ void fetch(__half* tile, const __half* matrix, int first, int length) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kChunks; i += kThreads) {
    const int row = first + i / kChunks;
    const bool there = row < length;
    cp_async<16>(chunk(tile, i / kChunks, i % kChunks), matrix + (there ? row : 0) * kDim + i % kChunks * 8, there ? 16 : 0);
  }
}

__device__ inline uint32_t pack(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__global__ void __launch_bounds__(kThreads) attention_kernel(const __half* q, const __half* k, const __half* v, float* out,
                                                             int queries, int keys, float scale) {
  __half* tiles = dynamic_shared<__half>();  // Q, then K and V of two stages
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int first = static_cast<int>(blockIdx.x) * kTile;
  const auto stage = [&](int tile, int which) { return tiles + (1 + tile % 2 * 2 + which) * kTile * kDim; };
  const int count = (keys + kTile - 1) / kTile;

  fetch(tiles, q, first, queries);
  fetch(stage(0, 0), k, 0, keys);
  fetch(stage(0, 1), v, 0, keys);
  cp_async_commit();

  uint32_t a[kDim / 16][4];
  float acc[kDim / 8][4] = {}, top[2] = {-1e30f, -1e30f}, sum[2] = {};
  for (int tile = 0; tile < count; ++tile) {
    if (tile + 1 < count) {
      fetch(stage(tile + 1, 0), k, (tile + 1) * kTile, keys);
      fetch(stage(tile + 1, 1), v, (tile + 1) * kTile, keys);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    if (tile == 0) {
      for (int d = 0; d < kDim / 16; ++d) ldmatrix_x4(a[d], chunk(tiles, warp * 16 + lane % 16, 2 * d + lane / 16));
    }
    float scores[kTile / 8][4] = {};
    for (int n = 0; n < kTile / 8; n += 2) {
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t b[4];
        ldmatrix_x4(b, chunk(stage(tile, 0), n * 8 + lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2));
        mma_m16n8k16<__half>(scores[n], a[d], {b[0], b[1]});
        mma_m16n8k16<__half>(scores[n + 1], a[d], {b[2], b[3]});
      }
    }
    float highest[2] = {top[0], top[1]};
    for (int n = 0; n < kTile / 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        const bool there = tile * kTile + n * 8 + lane % 4 * 2 + i % 2 < keys;
        scores[n][i] = there ? scores[n][i] * scale : -1e30f;
        highest[i / 2] = fmaxf(highest[i / 2], scores[n][i]);
      }
    }
    for (int h = 0; h < 2; ++h) {
      for (int offset = 1; offset < 4; offset *= 2) highest[h] = fmaxf(highest[h], __shfl_xor_sync(0xffffffffu, highest[h], offset));
      const float shrink = __expf(top[h] - highest[h]);
      top[h] = highest[h], sum[h] *= shrink;
      for (int n = 0; n < kDim / 8; ++n) acc[n][2 * h] *= shrink, acc[n][2 * h + 1] *= shrink;
    }
    for (int n = 0; n < kTile / 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = __expf(scores[n][i] - top[i / 2]);
        sum[i / 2] += scores[n][i];
      }
    }
    for (int m = 0; m < kTile / 16; ++m) {
      const uint32_t p[4] = {pack(scores[2 * m][0], scores[2 * m][1]), pack(scores[2 * m][2], scores[2 * m][3]),
                             pack(scores[2 * m + 1][0], scores[2 * m + 1][1]), pack(scores[2 * m + 1][2], scores[2 * m + 1][3])};
      for (int n = 0; n < kDim / 8; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, chunk(stage(tile, 1), m * 16 + lane % 16, n + lane / 16));
        mma_m16n8k16<__half>(acc[n], p, {b[0], b[1]});
        mma_m16n8k16<__half>(acc[n + 1], p, {b[2], b[3]});
      }
    }
    __syncthreads();
  }
  for (int h = 0; h < 2; ++h) {
    for (int offset = 1; offset < 4; offset *= 2) sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], offset);
    const int row = first + warp * 16 + lane / 4 + 8 * h;
    if (row >= queries) continue;
    for (int n = 0; n < kDim / 8; ++n) {
      auto* to = reinterpret_cast<float2*>(out + row * kDim + n * 8 + lane % 4 * 2);
      *to = make_float2(acc[n][2 * h] / sum[h], acc[n][2 * h + 1] / sum[h]);
    }
  }
}

FUSED_OPS_TEST attention(const __half* q, int64_t nq, const __half* k, int64_t nk, const __half* v, int64_t nv, float* out,
                         int64_t no) {
  return tell([&] {
    const Array<const __half> queries(q, nq), keys(k, nk), values(v, nv);
    const Array<float> result(out, no);
    const auto rows = static_cast<int>(nq / kDim);
    launch(attention_kernel, dim3(static_cast<unsigned>((rows + kTile - 1) / kTile)), dim3(kThreads), kOne,
           5 * kTile * kDim * sizeof(__half), nullptr, queries, keys, values, result, rows, static_cast<int>(nk / kDim), 0.125f);
  });
}
