// The input projection of the RNN sequences: out = x·Wᵀ + bias for x (rows, depth) and W (columns, depth), in float32.
//
// The idea: both operands have the summed dimension contiguous, which is how mma.sync takes them. A block owns a tile
// of the output, 128 rows by 128 columns (64 where there are no more), and walks the depth in slices of 128 bytes,
// three of them in shared memory: cp.async fills one while another is multiplied. Chunks of 16 bytes are swizzled, so
// that neither the copies nor ldmatrix meet a bank conflict. On chip: the slices, and 64 (32) sums a thread in
// registers. No block waits for another. Neighbouring blocks share their rows of x, so that x comes from memory once
// and W, which is small, stays in L2.
//
// A row does not depend on the others: an element is summed over the depth in one order, by one thread's accumulator,
// whatever the number of rows. float32 operands are rounded to tf32, to the nearest.
//
// Bytes: sizeof(T)·(rows + columns)·depth in, 4·rows·columns out. Flops: 2·rows·columns·depth. Floor of an LSTM with
// B = 16, T = 1024, I = H = 768 in bf16: 230 MB, 48 us at 4.8 TB/s; 77 GFlop, 78 us at 990 TFLOP/s, of which mma.sync
// reaches about two thirds.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/async_copy.cuh"
#include "common/convert.cuh"
#include "common/mma.cuh"
#include "common/shared.cuh"
#include "common/swizzle.cuh"

namespace fused_ops::projection {

template <typename T>
struct Projection {
  const T* x;         // (rows, depth)
  const T* weight;    // (columns, depth)
  const float* bias;  // (columns,) or null
  float* out;         // (rows, columns)
  int64_t rows, columns, depth;
};

constexpr int kThreads = 256, kRows = 128, kStages = 3, kSliceBytes = 128;

// A block's tile of kColumns columns: warps of 32 columns each, side by side, share its rows.
template <int kColumns>
struct Tile {
  static constexpr int kAcross = kColumns / 32, kDown = kThreads / 32 / kAcross;
  static constexpr int kWarpRows = kRows / kDown;
  static constexpr int kStageBytes = (kRows + kColumns) * kSliceBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

// 64 columns to a tile where a wider one would be half empty.
constexpr bool is_narrow(int64_t columns) { return columns <= 64; }

// kCount rows of a (rows, depth) matrix from `first` on, their elements from `from` on, to a slice; zeros outside.
// kBytes are moved at once: rows start at multiples of it. Below 4, which cp.async cannot do, by way of registers.
template <int kBytes, int kCount, typename T>
__device__ inline void fetch(unsigned char* slice, const T* matrix, int64_t first, int64_t rows, int64_t from,
                             int64_t depth) {
  constexpr int kPieces = kSliceBytes / kBytes, kElements = kBytes / static_cast<int>(sizeof(T));
  for (int i = static_cast<int>(threadIdx.x); i < kCount * kPieces; i += kThreads) {
    const int64_t row = first + i / kPieces, k = from + i % kPieces * kElements;
    const bool there = row < rows && k < depth;
    const T* source = matrix + (there ? row * depth + k : 0);
    unsigned char* to = slice + swizzled(static_cast<uint32_t>(i * kBytes), Swizzle::bytes128);
    if constexpr (kBytes >= 4) {
      cp_async<kBytes>(to, source, there ? kBytes : 0);
    } else {
      *reinterpret_cast<T*>(to) = there ? *source : from_float<T>(0.0f);
    }
  }
}

// d += A·B of 32 bytes of depth.
template <typename T>
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>) mma_m16n8k8(d, a, b);
  else mma_m16n8k16<T>(d, a, b);
}

// Four matrices of 8 rows by 16 bytes; as operands, float32 becomes tf32.
template <typename T>
__device__ inline void load_fragments(uint32_t (&r)[4], const unsigned char* slice, int row, int byte) {
  ldmatrix_x4(r, slice + swizzled(static_cast<uint32_t>(row * kSliceBytes + byte), Swizzle::bytes128));
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = to_tf32(__uint_as_float(r[i]));
  }
}

template <typename T>
__device__ inline void store(const Projection<T>& p, int64_t row, int64_t column, float first, float second) {
  if (row >= p.rows || column >= p.columns) return;
  const bool both = column + 1 < p.columns;
  if (p.bias != nullptr) {
    first += p.bias[column];
    if (both) second += p.bias[column + 1];
  }
  float* to = p.out + row * p.columns + column;
  if (both && p.columns % 2 == 0) {  // a row starts at a multiple of 8 bytes, and `column` is even
    *reinterpret_cast<float2*>(to) = make_float2(first, second);
  } else {
    to[0] = first;
    if (both) to[1] = second;
  }
}

// Grid: tiles of rows · tiles of columns, columns first. kBytes: how much of a row one copy moves.
template <typename T, int kColumns, int kBytes>
__global__ void __launch_bounds__(kThreads, 2) rnn_project_kernel(const Projection<T> p) {
  using Shape = Tile<kColumns>;
  constexpr int kDepth = kSliceBytes / static_cast<int>(sizeof(T)), kM = Shape::kWarpRows / 16;
  unsigned char* shared = dynamic_shared<unsigned char>();
  const int64_t across = (p.columns + kColumns - 1) / kColumns;
  const int64_t first_row = blockIdx.x / across * kRows, first_column = blockIdx.x % across * kColumns;
  const int64_t slices = (p.depth + kDepth - 1) / kDepth;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_row = warp / Shape::kAcross * Shape::kWarpRows, warp_column = warp % Shape::kAcross * 32;

  const auto start = [&](int64_t slice) {
    if (slice < slices) {
      unsigned char* to = shared + slice % kStages * Shape::kStageBytes;
      fetch<kBytes, kRows>(to, p.x, first_row, p.rows, slice * kDepth, p.depth);
      fetch<kBytes, kColumns>(to + kRows * kSliceBytes, p.weight, first_column, p.columns, slice * kDepth, p.depth);
    }
    cp_async_commit();
  };
  for (int slice = 0; slice < kStages - 1; ++slice) start(slice);

  float sums[kM][4][4] = {};
  for (int64_t slice = 0; slice < slices; ++slice) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // everybody's part of this slice is there, and nobody reads the one before any more
    start(slice + kStages - 1);
    const unsigned char* rows = shared + slice % kStages * Shape::kStageBytes;
    const unsigned char* columns = rows + kRows * kSliceBytes;
#pragma unroll
    for (int byte = 0; byte < kSliceBytes; byte += 32) {
      uint32_t a[kM][4], b[2][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        load_fragments<T>(a[m], rows, warp_row + 16 * m + lane % 16, byte + lane / 16 * 16);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        load_fragments<T>(b[n], columns, warp_column + 16 * n + lane % 8 + lane / 16 * 8, byte + lane / 8 % 2 * 16);
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply<T>(sums[m][n], a[m], {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]});
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int64_t row = first_row + warp_row + 16 * m + lane / 4;
      const int64_t column = first_column + warp_column + 8 * n + lane % 4 * 2;
      store(p, row, column, sums[m][n][0], sums[m][n][1]);
      store(p, row + 8, column, sums[m][n][2], sums[m][n][3]);
    }
  }
}

}  // namespace fused_ops::projection
