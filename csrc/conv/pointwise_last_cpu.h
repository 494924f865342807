// 1x1 convolution, float32, channels_last: out = X (P x C) * W^T (C x K), where a pixel's channels lie together.
//
// 3 vectors of output channels make a panel: their rows of W, transposed. As many panels as the second level cache holds
// are made, and met by 8 pixels at a time; the 8 x 3 sums stay in registers from the first channel to the last and leave
// through the epilogue. A stride skips pixels. W is read once in a call: a layout kept between calls would be read
// beside W itself, which it must be checked against. 2KCP flops over (C + K)P + KC floats, bound by the FMA units from
// about 16 pixels up.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "conv/vector_cpu.h"

namespace fused_ops::conv {

struct PointwiseLast {
  const float *input, *weight, *scale, *shift, *residual;  // the last three may be null
  float* output;
  int64_t batch, height, width, channels, out_height, out_width, out_channels;
  int64_t stride[2];
  int64_t activation;

  int64_t pixels() const { return batch * out_height * out_width; }
  const float* pixel(int64_t i) const {  // what the i-th output pixel is made of
    const int64_t x = i % out_width * stride[1], rest = i / out_width;
    const int64_t y = rest % out_height * stride[0], image = rest / out_height;
    return input + ((image * height + y) * width + x) * channels;
  }
};

constexpr int kLastVectors = 3;
constexpr int64_t kLastFloats = 96 * 1024;  // of panels made together

// Panels x pixels, cut into parts of equal size; a thread takes one.
struct LastPlan {
  int64_t panel_parts, pixel_parts;
  int64_t tasks() const { return panel_parts * pixel_parts; }
};

// Threads that share pixels each make all panels, which costs as much as 16 pixels; those that share panels each read all
// pixels and write beside each other, which costs as much as a panel.
inline LastPlan plan_pointwise_last(int64_t panels, int64_t pixels, int64_t threads) {
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

// Rows [k, k + count) of W as columns of a panel `width` wide; 0 past `count`.
template <int N>
FUSED_OPS_INLINE void make_panel(const PointwiseLast& p, int64_t k, int64_t count, int64_t width, float* panel) {
  for (int64_t begin = 0; begin < width; begin += N) {
    const float* from = p.weight + (k + begin) * p.channels;
    const int64_t lanes = std::min<int64_t>(N, count - begin);
    int64_t c = 0;
    for (; lanes == N && c + N <= p.channels; c += N) {
      Vector<N> rows[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) load<N>(rows[i], from + i * p.channels + c);
      transpose<N>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) store<N>(panel + (c + i) * width + begin, rows[i]);
    }
    for (; c < p.channels; ++c)
      for (int64_t lane = 0; lane < N; ++lane)
        panel[c * width + begin + lane] = lane < lanes ? from[lane * p.channels + c] : 0.0f;
  }
}

// ROWS pixels of `count` output channels from k on.
template <int N, int ROWS, int VECTORS>
FUSED_OPS_INLINE void last_tile(const PointwiseLast& p, int64_t pixel, int64_t k, int64_t count, const float* panel) {
  Vector<N> sum[ROWS][VECTORS] = {};
  const float* x[ROWS];
  for (int r = 0; r < ROWS; ++r) x[r] = p.pixel(pixel + r);
  for (int64_t c = 0; c < p.channels; ++c, panel += N * VECTORS) {
    Vector<N> w[VECTORS];
    for (int v = 0; v < VECTORS; ++v) load<N>(w[v], panel + v * N);
    for (int r = 0; r < ROWS; ++r) {
      const float factor = x[r][c];
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += w[v] * factor;
    }
  }
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t first = k + v * N, lanes = std::min<int64_t>(N, count - v * N);
    const auto read = [&](const float* from, Vector<N>& to) {
      if (lanes == N) return load<N>(to, from);
      alignas(64) float staged[N] = {};
      std::memcpy(staged, from, lanes * sizeof(float));
      load<N>(to, staged);
    };
    Vector<N> scale = Vector<N>{} + 1.0f, shift = {};
    if (p.scale) read(p.scale + first, scale);
    if (p.shift) read(p.shift + first, shift);
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = (pixel + r) * p.out_channels + first;
      Vector<N> y = sum[r][v] * scale + shift;
      if (p.residual) {
        Vector<N> other;
        read(p.residual + at, other);
        y += other;
      }
      activate<N>(y, p.activation);
      if (lanes == N) store<N>(p.output + at, y);
      else std::memcpy(p.output + at, &y, lanes * sizeof(float));
    }
  }
}

// Pixels [begin, end) of output channels [first, last), whose panels are made: blocks of ROWS, then of half as many.
template <int N, int ROWS>
FUSED_OPS_INLINE void last_pixels(const PointwiseLast& p, int64_t begin, int64_t end, int64_t first, int64_t last,
                                  const float* panels) {
  constexpr int64_t kWidth = N * kLastVectors;
  for (; begin + ROWS <= end; begin += ROWS) {
    const float* panel = panels;
    for (int64_t k = first; k < last; k += kWidth, panel += p.channels * kWidth) {
      const int64_t count = std::min(kWidth, last - k);
      if (count > 2 * N) last_tile<N, ROWS, 3>(p, begin, k, count, panel);
      else if (count > N) last_tile<N, ROWS, 2>(p, begin, k, count, panel);
      else last_tile<N, ROWS, 1>(p, begin, k, count, panel);
    }
  }
  if constexpr (ROWS > 1) last_pixels<N, ROWS / 2>(p, begin, end, first, last, panels);
}

// Tasks [begin, end) of the plan.
template <int N, int ROWS>
FUSED_OPS_INLINE void last_tasks(const PointwiseLast& p, const LastPlan& plan, int64_t begin, int64_t end) {
  constexpr int64_t kWidth = N * kLastVectors;
  const int64_t panels = (p.out_channels + kWidth - 1) / kWidth, pixels = p.pixels(), floats = p.channels * kWidth;
  const int64_t fitting = std::max<int64_t>(1, kLastFloats / std::max<int64_t>(floats, 1));
  std::vector<float> memory(std::min(fitting, panels) * floats);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t of_panels = task / plan.pixel_parts, of_pixels = task % plan.pixel_parts;
    const int64_t stop = (of_panels + 1) * panels / plan.panel_parts;
    for (int64_t panel = of_panels * panels / plan.panel_parts; panel < stop; panel += fitting) {
      const int64_t first = panel * kWidth;
      const int64_t last = std::min(std::min(panel + fitting, stop) * kWidth, p.out_channels);
      for (int64_t k = first; k < last; k += kWidth) {
        const int64_t count = std::min(kWidth, last - k);
        make_panel<N>(p, k, count, (count + N - 1) / N * N, memory.data() + (k - first) / kWidth * floats);
      }
      last_pixels<N, ROWS>(p, of_pixels * pixels / plan.pixel_parts, (of_pixels + 1) * pixels / plan.pixel_parts, first,
                           last, memory.data());
    }
  }
}

}  // namespace fused_ops::conv
