// 1x1 convolution, stride 1, float32, contiguous (batch, channels, space): per image out = W (K x C) * X (C x P).
//
// The positions of all images are one row of columns, cut into panels of 3 vectors. A panel's C rows are gathered once
// into a contiguous buffer (C * 48 floats, second level cache) and met by 8 rows of W at a time; the 8 x 3 sums
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
constexpr int64_t kGroupFloats = 32 * 1024;  // gathered input a group may hold: it stays in the second level cache

// Work is cut into `groups` x `row_chunks` tasks: up to `group_panels` neighbouring panels, and a chunk of rows. The
// panels of a group are visited for 8 rows before the next 8, so that every output row is written in long runs.
struct PointwisePlan {
  int64_t groups, group_panels, row_chunks, rows_per_chunk;
  bool by_rows;  // tasks of a chunk are neighbours, not those of a group
  int64_t tasks() const { return groups * row_chunks; }
  int64_t group(int64_t task) const { return by_rows ? task % groups : task / row_chunks; }
  int64_t chunk(int64_t task) const { return by_rows ? task / groups : task % row_chunks; }
};

// Threads take equal runs of tasks. Where columns are few (49 are a panel and a bit) they share the rows instead, and each
// gathers all columns for itself.
inline PointwisePlan plan_pointwise(int64_t columns, int64_t channels, int64_t out_channels, int64_t lanes,
                                    int64_t threads) {
  const int64_t width = lanes * kPanelVectors, panels = (columns + width - 1) / width;
  const int64_t fitting = kGroupFloats / std::max<int64_t>(channels * width, 1);
  const int64_t group = std::max<int64_t>(1, std::min({fitting, int64_t{8}, panels / (4 * threads)}));
  const int64_t groups = (panels + group - 1) / group;
  const int64_t blocks = (out_channels + 7) / 8;
  const int64_t wanted = threads > 1 ? (8 * threads + groups - 1) / std::max<int64_t>(groups, 1) : 1;
  int64_t chunks = std::max<int64_t>(1, std::min(wanted, blocks / 2));
  // The first thread's columns and its rows, as multiples of its fair share.
  const int64_t run = (groups * chunks + threads - 1) / threads;
  const double by_columns = std::min<double>(columns, run * group * width / double(chunks)) * threads / columns;
  const double by_rows = (blocks + threads - 1) / threads * threads / double(blocks);
  const bool rows_first = blocks >= 2 * threads && by_columns > 1.1 * by_rows;
  if (rows_first) chunks = threads;
  const int64_t rows = (blocks + chunks - 1) / chunks * 8;
  return {groups, group, (out_channels + rows - 1) / rows, rows, rows_first};
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

// ROWS rows of one panel of up to kPanelVectors vectors.
template <int N, int ROWS>
FUSED_OPS_INLINE void pointwise_panel(const Pointwise& p, int64_t row, int64_t column, int64_t count,
                                      const float* panel) {
  if (count > 2 * N) return pointwise_tile<N, ROWS, 3>(p, row, column, count, panel);
  if (count > N) return pointwise_tile<N, ROWS, 2>(p, row, column, count, panel);
  pointwise_tile<N, ROWS, 1>(p, row, column, count, panel);
}

// Tasks [begin, end) of the plan, group by group: a group that two tasks share is gathered once.
template <int N, int ROWS>
FUSED_OPS_INLINE void pointwise_tasks(const Pointwise& p, const PointwisePlan& plan, int64_t begin, int64_t end) {
  const int64_t width = N * kPanelVectors, panel_floats = p.channels * width;
  std::vector<float> buffer(plan.group_panels * panel_floats);
  int64_t gathered = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = plan.group(task) * plan.group_panels * width;
    const int64_t last = std::min(first + plan.group_panels * width, p.columns());
    if (gathered != first) {
      float* panel = buffer.data();
      for (int64_t column = first; column < last; column += width, panel += panel_floats) {
        const int64_t count = std::min(width, last - column);
        pack_panel<N>(p, column, count, (count + N - 1) / N * N, panel);
      }
      gathered = first;
    }
    int64_t row = plan.chunk(task) * plan.rows_per_chunk;
    const int64_t stop = std::min(row + plan.rows_per_chunk, p.out_channels);
    while (row < stop) {
      const bool block = row + ROWS <= stop;
      const float* panel = buffer.data();
      for (int64_t column = first; column < last; column += width, panel += panel_floats) {
        const int64_t count = std::min(width, last - column);
        if (block) pointwise_panel<N, ROWS>(p, row, column, count, panel);
        else pointwise_panel<N, 1>(p, row, column, count, panel);
      }
      row += block ? ROWS : 1;
    }
  }
}

}  // namespace fused_ops::conv
