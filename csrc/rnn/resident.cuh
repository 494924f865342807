// A matrix kept in shared memory for a whole sequence, and its product with what a group exchanges in every step.
//
// A lane of mma.sync holds, of a row of either operand, words 2t and 2t + 1 of neighbouring products' k; which k these are
// is free, as long as both operands agree. So lane (g, t) = (lane / 4, lane % 4) takes the 16 bytes at t of row g's chunk of
// 64 bytes, of the matrix and of the exchanged row alike: two k-steps (m16n8k16 or, tf32, m16n8k8) of both operands in one
// access each, whole sectors of memory, no bank met twice, nothing to transpose. A strip's chunk (8 rows x 64 bytes; of the
// last strip those rows that there are) lies in one piece, in the order of the lanes.
//
// Warps share the work by `splits` of k and, what is left of them, by tiles of 16 rows. Each split's sums go to shared
// memory, from where they are added in order of the splits: the order of all terms depends on k and `splits` alone.
#pragma once

#include <cstdint>

#include "common/convert.cuh"
#include "common/mma.cuh"
#include "rnn/layer_plan.h"

namespace fused_ops::layers {

template <typename T> constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));  // elements
template <typename T> constexpr int kPiece = kPieceBytes / static_cast<int>(sizeof(T));

// How an operand of the products is stored: as T, but float32 rounded to tf32.
template <typename T>
__device__ inline T operand(T value) {
  if constexpr (std::is_same_v<T, float>) return __uint_as_float(to_tf32(value));
  else return value;
}

template <typename T>
__device__ inline void multiply_chunk(float (&sum)[4], const uint4& low, const uint4& high, const uint4& right) {
  if constexpr (std::is_same_v<T, float>) {
    mma_m16n8k8(sum, {low.x, high.x, low.y, high.y}, {right.x, right.y});
    mma_m16n8k8(sum, {low.z, high.z, low.w, high.w}, {right.z, right.w});
  } else {
    mma_m16n8k16<T>(sum, {low.x, high.x, low.y, high.y}, {right.x, right.y});
    mma_m16n8k16<T>(sum, {low.z, high.z, low.w, high.w}, {right.z, right.w});
  }
}

// A block's resident matrix, of `outputs` rows, and the partial sums of its products with `rows` rows of the batch.
struct Products {
  int outputs, chunks, splits, rows;
  int stride;      // SharedLayout::partial_stride
  float* partial;  // (splits, rows, stride)

  __device__ static Products of(const Product& product, int units, int rows, int splits, int stride, float* partial) {
    return {static_cast<int>(product.outputs) * units, static_cast<int>(product.chunks()), splits, rows, stride, partial};
  }

  // Fills the resident matrix by load(row, column), which is asked for all `outputs` rows and the columns below `columns`
  // and gives what `operand` gives; zeros beyond. A __syncthreads must follow.
  template <typename T, typename Load>
  __device__ void pack(T* resident, int columns, Load load) const {
    using Piece = Pack<T, kPiece<T>>;
    for (int i = static_cast<int>(threadIdx.x); i < outputs * chunks * 4; i += kThreads) {
      const int strip = i / (32 * chunks), lanes = lanes_of(strip), within = i - strip * 32 * chunks;
      const int lane = within % lanes, row = strip * kStrip + lane / 4;
      const int first = within / lanes * kChunk<T> + lane % 4 * kPiece<T>;
      Piece piece;
#pragma unroll
      for (int j = 0; j < kPiece<T>; ++j) {
        piece.values[j] = first + j < columns ? load(row, first + j) : from_float<T>(0.0f);
      }
      reinterpret_cast<Piece*>(resident)[i] = piece;
    }
  }

  // partial[split][row][j] = the split's part of Σ_k resident[j][k]·state[row][k], where row n starts at state + n·step,
  // a multiple of 16 bytes, in shared or device memory. The block's __syncthreads must follow. FEW: with fewer registers.
  template <bool FEW, typename T>
  __device__ void multiply(const T* resident, const T* state, int64_t step) const {
    if (rows == 8) multiply_rows<T, 1, FEW ? 2 : 4>(resident, state, step);
    else if (rows == 16) multiply_rows<T, 2, FEW ? 1 : 4>(resident, state, step);
    else multiply_rows<T, 4, FEW ? 1 : 2>(resident, state, step);
  }

  // After it: one product, all splits added.
  __device__ float sum(int row, int j) const {
    float total = partial[row * stride + j];
#pragma unroll 1
    for (int split = 1; split < splits; ++split) total += partial[(split * rows + row) * stride + j];
    return total;
  }

 private:
  __device__ int lanes_of(int strip) const { return min(kStrip, outputs - strip * kStrip) * 4; }

  // N: of 8 rows of the batch each. TILES: summed at once, and chunks loaded before they are used.
  template <typename T, int N, int TILES>
  __device__ void multiply_rows(const T* resident, const T* state, int64_t step) const {
    constexpr int kTiles = TILES, kAhead = TILES;
    // By a shuffle: the compiler then knows that it is one number for the warp, and keeps none of what follows from it
    // in registers from step to step.
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    const int lane = static_cast<int>(threadIdx.x % 32), split = warp % splits, shares = kWarps / splits;
    const int strips = (outputs + kStrip - 1) / kStrip, tiles = (strips + 1) / 2;
    const int begin = chunks * split / splits, end = chunks * (split + 1) / splits;
    const auto left = [&](int strip, int chunk) {
      const int lanes = lanes_of(strip);
      if (strip >= strips || lane >= lanes) return make_uint4(0, 0, 0, 0);
      return reinterpret_cast<const uint4*>(resident)[strip * chunks * 32 + chunk * lanes + lane];
    };
    const T* right = state + lane / 4 * step + lane % 4 * kPiece<T>;
#pragma unroll 1
    for (int first = warp / splits; first < tiles; first += kTiles * shares) {
      float sums[kTiles][N][4] = {};
#pragma unroll 1
      for (int chunk = begin; chunk < end; chunk += kAhead) {
        uint4 pieces[kAhead][N];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          if (chunk + a >= end) continue;
#pragma unroll
          for (int n = 0; n < N; ++n) {
            pieces[a][n] = *reinterpret_cast<const uint4*>(right + n * 8 * step + (chunk + a) * kChunk<T>);
          }
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          if (chunk + a >= end) continue;
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            const int strip = 2 * (first + i * shares);
            if (strip >= strips) continue;
            const uint4 low = left(strip, chunk + a), high = left(strip + 1, chunk + a);
#pragma unroll
            for (int n = 0; n < N; ++n) multiply_chunk<T>(sums[i][n], low, high, pieces[a][n]);
          }
        }
      }
      float* to = partial + (split * rows + lane % 4 * 2) * stride + lane / 4;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int strip = 2 * (first + i * shares);
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (strip + j / 2 < strips) to[(n * 8 + j % 2) * stride + (strip + j / 2) * kStrip] = sums[i][n][j];
          }
        }
      }
    }
  }
};

}  // namespace fused_ops::layers
