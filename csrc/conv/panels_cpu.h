// What the kernels for channels_last share: output channels in panels 3 vectors wide, and the product of a few pixels,
// whose sums stay in registers, with a panel.
#pragma once

#include <algorithm>
#include <utility>

#include "conv/vector_cpu.h"

namespace fused_ops::conv {

constexpr int kLastVectors = 3;

inline int64_t count_panels(int64_t channels, int64_t lanes) {
  return (channels + lanes * kLastVectors - 1) / (lanes * kLastVectors);
}

// The i-th panel: `count` output channels from `begin` on, in vectors. All have the same number of vectors, or one less.
struct Panel {
  int64_t begin, count, vectors;
  Panel(int64_t i, int64_t channels, int64_t lanes) {
    const int64_t panels = count_panels(channels, lanes), all = (channels + lanes - 1) / lanes;
    const int64_t first = i * all / panels, last = (i + 1) * all / panels;
    begin = first * lanes, vectors = last - first, count = std::min(last * lanes, channels) - begin;
  }
};

// Panels x pixels, cut into parts of equal size; a thread takes one.
struct LastPlan {
  int64_t panel_parts, pixel_parts;
  int64_t tasks() const { return panel_parts * pixel_parts; }
  std::pair<int64_t, int64_t> panels(int64_t task, int64_t count) const {
    return part(task / pixel_parts, panel_parts, count);
  }
  std::pair<int64_t, int64_t> pixels(int64_t task, int64_t count) const {
    return part(task % pixel_parts, pixel_parts, count);
  }

 private:
  static std::pair<int64_t, int64_t> part(int64_t i, int64_t parts, int64_t count) {
    return {i * count / parts, (i + 1) * count / parts};
  }
};

// Threads that share pixels each make all panels, which costs as much as 16 pixels; those that share panels each read all
// pixels and write beside each other, which costs as much as a panel.
inline LastPlan plan_last(int64_t panels, int64_t pixels, int64_t threads) {
  const auto part = [](int64_t count, int64_t parts) { return (count + parts - 1) / parts; };
  LastPlan best{1, 1};
  int64_t least = (panels + 1) * pixels + panels * 16;
  for (int64_t parts = 1; parts <= threads; ++parts) {
    const LastPlan plan{threads / parts, parts};
    const int64_t of_panels = part(panels, plan.panel_parts), cost = (of_panels + 1) * part(pixels, parts) + of_panels * 16;
    if (cost < least) least = cost, best = plan;
  }
  return best;
}

template <int N, int HALF, std::size_t... I>
FUSED_OPS_INLINE void exchange(Vector<N>& a, Vector<N>& b, std::index_sequence<I...>) {
  const Vector<N> first = __builtin_shufflevector(a, b, (I & HALF ? N + I - HALF : I)...);
  b = __builtin_shufflevector(a, b, (I & HALF ? N + I : I + HALF)...);
  a = first;
}

// Halves, quarters, ... change places between rows.
template <int N, int HALF = N / 2>
FUSED_OPS_INLINE void transpose(Vector<N> (&rows)[N]) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    if (!(i & HALF)) exchange<N, HALF>(rows[i], rows[i + HALF], std::make_index_sequence<N>{});
  if constexpr (HALF > 1) transpose<N, HALF / 2>(rows);
}

// sum += X W for ROWS rows of X and a panel of W, VECTORS wide.
template <int N, int ROWS, int VECTORS>
FUSED_OPS_INLINE void accumulate(Vector<N> (&sum)[ROWS][VECTORS], const float* const (&x)[ROWS], int64_t channels,
                                 const float* panel) {
  for (int64_t c = 0; c < channels; ++c, panel += N * VECTORS) {
    Vector<N> w[VECTORS];
    for (int v = 0; v < VECTORS; ++v) load<N>(w[v], panel + v * N);
    for (int r = 0; r < ROWS; ++r) {
      const float factor = x[r][c];
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += w[v] * factor;
    }
  }
}

}  // namespace fused_ops::conv
