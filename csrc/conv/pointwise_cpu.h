// 1x1 convolution, stride 1, float32, contiguous (batch, channels, space): per image out = W (K x C) * X (C x P).
//
// The positions of all images are one row of columns, cut into panels of 3 vectors. A panel's C rows are gathered once
// into a contiguous buffer (C * 48 floats: first or second level cache) and met by 8 rows of W at a time; the 8 x 3 sums
// stay in registers from the first channel to the last and leave through the epilogue, straight into the caller's layout.
// Nothing else touches memory: 2KCP flops over (C + K)P + KC floats, bound by the FMA units from C, K of about 16 up.
#pragma once

#include <algorithm>
#include <vector>

#include "conv/vector_cpu.h"

namespace fused_ops::conv {

struct Pointwise {
  const float *input, *weight, *scale, *shift, *residual;  // the last three may be null
  float* output;
  int64_t batch, channels, out_channels, positions, activation;
  int64_t columns() const { return batch * positions; }
};

constexpr int kPanelVectors = 3;

// Work is cut into `panels` x `row_chunks` tasks; a task's rows are those of its chunk.
struct PointwisePlan {
  int64_t panels, row_chunks, rows_per_chunk;
  int64_t tasks() const { return panels * row_chunks; }
};

inline PointwisePlan plan_pointwise(int64_t columns, int64_t out_channels, int64_t lanes, int64_t threads) {
  const int64_t width = lanes * kPanelVectors;
  const int64_t panels = (columns + width - 1) / width;
  const int64_t wanted = threads > 1 ? (8 * threads + panels - 1) / std::max<int64_t>(panels, 1) : 1;
  const int64_t blocks = (out_channels + 7) / 8;
  const int64_t chunks = std::max<int64_t>(1, std::min(wanted, blocks / 2));
  const int64_t rows = (blocks + chunks - 1) / chunks * 8;
  return {panels, (out_channels + rows - 1) / rows, rows};
}

template <int N>
FUSED_OPS_INLINE void pack_panel(const Pointwise& p, int64_t column, int64_t count, int64_t width, float* panel) {
  int64_t image = column / p.positions, position = column % p.positions;
  if (count == width && position + count <= p.positions) {
    const float* from = p.input + image * p.channels * p.positions + position;
    for (int64_t c = 0; c < p.channels; ++c, from += p.positions, panel += width) {
      for (int64_t i = 0; i < width; i += N) {
        Vector<N> x;
        load<N>(x, from + i);
        store<N>(panel + i, x);
      }
    }
    return;
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    float* row = panel + c * width;
    int64_t done = 0, b = image, at = position;
    while (done < count) {
      const int64_t run = std::min(count - done, p.positions - at);
      std::memcpy(row + done, p.input + (b * p.channels + c) * p.positions + at, run * sizeof(float));
      done += run, ++b, at = 0;
    }
    std::memset(row + count, 0, (width - count) * sizeof(float));
  }
}

template <int N, int ROWS, int VECTORS>
FUSED_OPS_INLINE void pointwise_tile(const Pointwise& p, int64_t row, int64_t column, int64_t count,
                                     const float* panel) {
  Vector<N> sum[ROWS][VECTORS] = {};
  const float* w = p.weight + row * p.channels;
  for (int64_t c = 0; c < p.channels; ++c, panel += N * VECTORS) {
    Vector<N> x[VECTORS];
    for (int v = 0; v < VECTORS; ++v) load<N>(x[v], panel + v * N);
    for (int r = 0; r < ROWS; ++r) {
      const float factor = w[r * p.channels + c];
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += x[v] * factor;
    }
  }
  const int64_t image = column / p.positions, position = column % p.positions;
  const bool whole = count == N * VECTORS && position + count <= p.positions;
  for (int r = 0; r < ROWS; ++r) {
    const int64_t k = row + r;
    const float scale = p.scale ? p.scale[k] : 1.0f, shift = p.shift ? p.shift[k] : 0.0f;
    const int64_t start = (image * p.out_channels + k) * p.positions + position;
    alignas(64) float staged[N * VECTORS];
    if (p.residual && !whole) {
      int64_t done = 0, b = image, at = position;
      while (done < count) {
        const int64_t run = std::min(count - done, p.positions - at);
        std::memcpy(staged + done, p.residual + (b * p.out_channels + k) * p.positions + at, run * sizeof(float));
        done += run, ++b, at = 0;
      }
      std::memset(staged + count, 0, (N * VECTORS - count) * sizeof(float));
    }
    for (int v = 0; v < VECTORS; ++v) {
      Vector<N> y = sum[r][v] * scale + shift;
      if (p.residual) {
        Vector<N> other;
        load<N>(other, whole ? p.residual + start + v * N : staged + v * N);
        y += other;
      }
      activate<N>(y, p.activation);
      store<N>(whole ? p.output + start + v * N : staged + v * N, y);
    }
    if (!whole) {
      int64_t done = 0, b = image, at = position;
      while (done < count) {
        const int64_t run = std::min(count - done, p.positions - at);
        std::memcpy(p.output + (b * p.out_channels + k) * p.positions + at, staged + done, run * sizeof(float));
        done += run, ++b, at = 0;
      }
    }
  }
}

template <int N, int ROWS, int VECTORS>
FUSED_OPS_INLINE void pointwise_rows(const Pointwise& p, int64_t row, int64_t stop, int64_t column, int64_t count,
                                     const float* panel) {
  for (; row + ROWS <= stop; row += ROWS) pointwise_tile<N, ROWS, VECTORS>(p, row, column, count, panel);
  for (; row < stop; ++row) pointwise_tile<N, 1, VECTORS>(p, row, column, count, panel);
}

// Tasks [begin, end) of the plan, panel by panel: a panel that two tasks share is gathered once.
template <int N, int ROWS>
FUSED_OPS_INLINE void pointwise_tasks(const Pointwise& p, const PointwisePlan& plan, int64_t begin, int64_t end) {
  const int64_t full = N * kPanelVectors;
  std::vector<float> buffer(p.channels * full + N);
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t column = task / plan.row_chunks * full, count = std::min(full, p.columns() - column);
    const int64_t vectors = (count + N - 1) / N;
    if (packed != column) pack_panel<N>(p, column, count, vectors * N, buffer.data());
    packed = column;
    const int64_t row = task % plan.row_chunks * plan.rows_per_chunk;
    const int64_t stop = std::min(row + plan.rows_per_chunk, p.out_channels);
    if (vectors == 3) pointwise_rows<N, ROWS, 3>(p, row, stop, column, count, buffer.data());
    if (vectors == 2) pointwise_rows<N, ROWS, 2>(p, row, stop, column, count, buffer.data());
    if (vectors == 1) pointwise_rows<N, ROWS, 1>(p, row, stop, column, count, buffer.data());
  }
}

}  // namespace fused_ops::conv
