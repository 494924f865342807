// Depthwise convolution (one filter per channel), float32, contiguous (batch, channels, height, width).
//
// One plane at a time: it is copied into a zero-bordered scratch, its columns sorted by their remainder modulo the
// stride, so that N neighbouring outputs read N neighbouring floats at every tap, whatever the stride; no border tests.
// Four output rows advance together: four independent sums per tap. A plane and its scratch fit the second level cache,
// so memory sees the input once and the output once: the floor is 4(HW + OH*OW) bytes per plane.
#pragma once

#include <algorithm>
#include <vector>

#include "conv/vector_cpu.h"

namespace fused_ops::conv {

struct Depthwise {
  const float *input, *weight, *scale, *shift, *residual;  // the last three may be null
  float* output;
  int64_t channels, height, width, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2], activation;
};

// The scratch: `rows` rows of `pitch` floats, each row holding stride[1] runs of `run` floats.
template <int N> struct Scratch {
  int64_t rows, run, pitch;
  explicit Scratch(const Depthwise& d)
      : rows((d.out_height - 1) * d.stride[0] + (d.kernel[0] - 1) * d.dilation[0] + 1),
        run((d.out_width + N - 1) / N * N + (d.kernel[1] - 1) * d.dilation[1] / d.stride[1]),
        pitch(run * d.stride[1]) {}
  // Offset, from an output's first tap, of the tap at kernel position (i, j).
  int64_t tap(const Depthwise& d, int64_t i, int64_t j) const {
    const int64_t column = j * d.dilation[1];
    return i * d.dilation[0] * pitch + column % d.stride[1] * run + column / d.stride[1];
  }
};

template <int N>
FUSED_OPS_INLINE void fill_scratch(const Depthwise& d, const Scratch<N>& s, const float* plane, float* scratch) {
  const int64_t first = d.padding[0], last = std::min(s.rows, d.padding[0] + d.height);
  const int64_t step = d.stride[1];
  for (int64_t row = first; row < last; ++row) {
    const float* from = plane + (row - first) * d.width;
    float* to = scratch + row * s.pitch;
    // Input column j is padded column c = j + padding: phase c % step, place c / step.
    const int64_t columns = std::min(d.width, s.pitch - d.padding[1]);
    if (step == 1) {
      copy_short(to + d.padding[1], from, columns);
    } else if (step == 2) {
      float *phase0 = to + d.padding[1] / 2, *phase1 = to + s.run + d.padding[1] / 2;
      if (d.padding[1] % 2) split_pairs(phase1, phase0 + 1, from, columns);
      else split_pairs(phase0, phase1, from, columns);
    } else {
      for (int64_t j = 0, c = d.padding[1]; j < columns; ++j, ++c) to[c % step * s.run + c / step] = from[j];
    }
  }
}

template <int N, int ROWS>
FUSED_OPS_INLINE void depthwise_rows(const Depthwise& d, const Scratch<N>& s, int64_t plane, int64_t y,
                                     const float* scratch, const float* weight, const int64_t* taps) {
  const int64_t channel = plane % d.channels, count = d.kernel[0] * d.kernel[1], stride = d.stride[0] * s.pitch;
  const float scale = d.scale ? d.scale[channel] : 1.0f, shift = d.shift ? d.shift[channel] : 0.0f;
  for (int64_t x = 0; x < d.out_width; x += N) {
    Vector<N> sum[ROWS] = {};
    const float* corner = scratch + y * stride + x;
    for (int64_t t = 0; t < count; ++t) {
      const float* from = corner + taps[t];
      for (int r = 0; r < ROWS; ++r) {
        Vector<N> value;
        load<N>(value, from + r * stride);
        sum[r] += value * weight[t];
      }
    }
    const int64_t lanes = std::min<int64_t>(N, d.out_width - x);
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = (plane * d.out_height + y + r) * d.out_width + x;
      Vector<N> result = sum[r] * scale + shift;
      if (d.residual) {
        Vector<N> other = {};
        if (lanes == N) load<N>(other, d.residual + at);
        else copy_short(reinterpret_cast<float*>(&other), d.residual + at, lanes);
        result += other;
      }
      activate<N>(result, d.activation);
      if (lanes == N) store<N>(d.output + at, result);
      else copy_short(d.output + at, reinterpret_cast<const float*>(&result), lanes);
    }
  }
}

template <int N> FUSED_OPS_INLINE void depthwise_planes(const Depthwise& d, int64_t begin, int64_t end) {
  const Scratch<N> s(d);
  const int64_t count = d.kernel[0] * d.kernel[1];
  std::vector<float> scratch(s.rows * s.pitch, 0.0f);
  std::vector<int64_t> taps(count);
  for (int64_t t = 0; t < count; ++t) taps[t] = s.tap(d, t / d.kernel[1], t % d.kernel[1]);
  for (int64_t plane = begin; plane < end; ++plane) {
    fill_scratch<N>(d, s, d.input + plane * d.height * d.width, scratch.data());
    const float* weight = d.weight + plane % d.channels * count;
    int64_t y = 0;
    for (; y + 4 <= d.out_height; y += 4) {
      depthwise_rows<N, 4>(d, s, plane, y, scratch.data(), weight, taps.data());
    }
    switch (d.out_height - y) {
      case 3: depthwise_rows<N, 3>(d, s, plane, y, scratch.data(), weight, taps.data()); break;
      case 2: depthwise_rows<N, 2>(d, s, plane, y, scratch.data(), weight, taps.data()); break;
      case 1: depthwise_rows<N, 1>(d, s, plane, y, scratch.data(), weight, taps.data()); break;
      default: break;
    }
  }
}

}  // namespace fused_ops::conv
