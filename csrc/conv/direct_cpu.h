// Convolution, float32, channels_last: out = X (P x D) * W^T (D x K). A pixel's channels lie together, and so does a row of
// the kernel where its taps are next to each other: a row of X is one run of memory for a 1x1 kernel, `kernel[0]` else.
//
// 3 vectors of output channels make a panel: their rows of W, transposed. As many panels as the second level cache holds
// are made, and met by 8 pixels at a time; the 8 x 3 sums stay in registers from the first channel to the last and leave
// through the epilogue. A stride skips pixels; padding is part of the input here. W is read once in a call: a layout kept
// between calls would be read beside W itself, which it must be checked against. 2KDP flops over (C + K)P + KD floats,
// bound by the FMA units from about 16 pixels up.
#pragma once

#include "conv/panels_cpu.h"

namespace fused_ops::conv {

constexpr int64_t kDirectFloats = 96 * 1024;  // of panels made together

struct Direct {
  const float *input, *weight, *scale, *shift, *residual;  // the last three may be null
  float* output;
  int64_t batch, height, width, channels, out_height, out_width, out_channels;  // height, width: padding included
  int64_t kernel[2], stride[2], dilation[2], activation;
  bool streams;  // the output past the caches: aligned, and full vectors

  int64_t pixels() const { return batch * out_height * out_width; }
  int64_t depth() const { return kernel[0] * kernel[1] * channels; }
  int64_t floats(int64_t lanes) const { return depth() * lanes * kLastVectors; }  // of a panel
  const float* pixel(int64_t i) const {  // the first of what the i-th output pixel is made of
    const int64_t x = i % out_width * stride[1], rest = i / out_width;
    const int64_t y = rest % out_height * stride[0], image = rest / out_height;
    return input + ((image * height + y) * width + x) * channels;
  }
  int64_t run() const { return dilation[1] == 1 ? kernel[1] * channels : channels; }
  int64_t offset(int64_t at) const {  // where the run is that begins `at` floats into a row of W
    const int64_t tap = at / channels, y = tap / kernel[1] * dilation[0], x = tap % kernel[1] * dilation[1];
    return (y * width + x) * channels;
  }
};

// A panel's rows of W as columns; 0 past its channels.
template <int N>
FUSED_OPS_INLINE void make_panel(const Direct& p, const Panel& of, float* panel) {
  const int64_t width = of.vectors * N, depth = p.depth();
  for (int64_t begin = 0; begin < width; begin += N) {
    const float* from = p.weight + (of.begin + begin) * depth;
    const int64_t lanes = std::min<int64_t>(N, of.count - begin);
    int64_t c = 0;
    for (; lanes == N && c + N <= depth; c += N) {
      Vector<N> rows[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) load<N>(rows[i], from + i * depth + c);
      transpose<N>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) store<N>(panel + (c + i) * width + begin, rows[i]);
    }
    for (; c < depth; ++c)
      for (int64_t lane = 0; lane < N; ++lane)
        panel[c * width + begin + lane] = lane < lanes ? from[lane * depth + c] : 0.0f;
  }
}

// ROWS pixels of a panel's output channels.
template <int N, int ROWS, int VECTORS>
FUSED_OPS_INLINE void direct_tile(const Direct& p, int64_t pixel, const Panel& panel, const float* made) {
  Vector<N> sum[ROWS][VECTORS] = {};
  const float *first[ROWS], *x[ROWS];
  for (int r = 0; r < ROWS; ++r) first[r] = p.pixel(pixel + r);
  for (int64_t at = 0, run = p.run(); at < p.depth(); at += run) {
    const int64_t offset = p.offset(at);
    for (int r = 0; r < ROWS; ++r) x[r] = first[r] + offset;
    accumulate<N, ROWS, VECTORS>(sum, x, run, made + at * N * VECTORS);
  }
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t k = panel.begin + v * N, lanes = std::min<int64_t>(N, panel.count - v * N);
    Vector<N> scale = Vector<N>{} + 1.0f, shift = {};
    if (p.scale) load_some<N>(scale, p.scale + k, lanes);
    if (p.shift) load_some<N>(shift, p.shift + k, lanes);
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = (pixel + r) * p.out_channels + k;
      Vector<N> y = sum[r][v] * scale + shift;
      if (p.residual) {
        Vector<N> other;
        load_some<N>(other, p.residual + at, lanes);
        y += other;
      }
      activate<N>(y, p.activation);
      if (p.streams) stream<N>(p.output + at, y);
      else store_some<N>(p.output + at, y, lanes);
    }
  }
}

// Pixels [begin, end) of panels [first, last), which are made: blocks of ROWS, then of half as many.
template <int N, int ROWS>
FUSED_OPS_INLINE void direct_pixels(const Direct& p, int64_t begin, int64_t end, int64_t first, int64_t last,
                                  const float* panels) {
  for (; begin + ROWS <= end; begin += ROWS) {
    const float* made = panels;
    for (int64_t i = first; i < last; ++i, made += p.floats(N)) {
      const Panel panel(i, p.out_channels, N);
      if (panel.vectors == 3) direct_tile<N, ROWS, 3>(p, begin, panel, made);
      else if (panel.vectors == 2) direct_tile<N, ROWS, 2>(p, begin, panel, made);
      else direct_tile<N, ROWS, 1>(p, begin, panel, made);
    }
  }
  if constexpr (ROWS > 1) direct_pixels<N, ROWS / 2>(p, begin, end, first, last, panels);
}

// Tasks [begin, end) of the plan.
template <int N, int ROWS>
FUSED_OPS_INLINE void direct_tasks(const Direct& p, const LastPlan& plan, int64_t begin, int64_t end) {
  const int64_t all = count_panels(p.out_channels, N);
  const int64_t fitting = std::min(all, std::max<int64_t>(1, kDirectFloats / std::max<int64_t>(p.floats(N), 1)));
  float* const memory = workspace<Direct>(fitting * p.floats(N));
  for (int64_t task = begin; task < end; ++task) {
    const auto [from, to] = plan.panels(task, all);
    const auto [pixel, stop] = plan.pixels(task, p.pixels());
    for (int64_t first = from; first < to; first += fitting) {
      const int64_t last = std::min(first + fitting, to);
      for (int64_t i = first; i < last; ++i)
        make_panel<N>(p, Panel(i, p.out_channels, N), memory + (i - first) * p.floats(N));
      direct_pixels<N, ROWS>(p, pixel, stop, first, last, memory);
      if (p.streams) fence();
    }
  }
}

}  // namespace fused_ops::conv
