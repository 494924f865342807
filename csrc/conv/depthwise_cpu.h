// Depthwise convolution (one filter per channel), float32, contiguous (batch, channels, height, width).
//
// One plane at a time: it is copied into a zero-bordered scratch, its columns sorted by their remainder modulo the
// stride, so that N neighbouring outputs read N neighbouring floats at every tap, whatever the stride; no border tests.
// Seven output rows (images are often multiples of 7 high) advance together: seven independent sums. A plane and its scratch fit the second level cache,
// so memory sees the input once and the output once: the floor is 4(HW + OH*OW) bytes per plane.
#pragma once

#include <algorithm>
#include <vector>

#include "conv/vector_cpu.h"

namespace fused_ops::conv {

struct Depthwise {
  const float *input, *weight, *scale, *shift, *residual;  // the last three may be null
  float* output;
  int64_t elements, channels, height, width, out_height, out_width;  // elements: of the output
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
      copy_row<N>(to + d.padding[1], from, columns);
    } else if (step == 2) {
      float *phase0 = to + d.padding[1] / 2, *phase1 = to + s.run + d.padding[1] / 2;
      if (d.padding[1] % 2) split_pairs(phase1, phase0 + 1, from, columns);
      else split_pairs(phase0, phase1, from, columns);
    } else {
      for (int64_t j = 0, c = d.padding[1]; j < columns; ++j, ++c) to[c % step * s.run + c / step] = from[j];
    }
  }
}

// The sums of ROWS output rows, N columns each, whose first tap is at `corner`. KERNEL and STRIDE are those along the
// height of an undilated kernel: each scratch row is then loaded once per column of taps and used by every output row it
// reaches. KERNEL 0 is any height, stride and dilation, one load per product.
template <int N, int ROWS, int KERNEL, int STRIDE>
FUSED_OPS_INLINE void depthwise_sums(const Depthwise& d, const Scratch<N>& s, const float* corner, const float* weight,
                                     const int64_t* taps, Vector<N> (&sum)[ROWS]) {
  if constexpr (KERNEL == 0) {
    const int64_t count = d.kernel[0] * d.kernel[1], step = d.stride[0] * s.pitch;
    for (int64_t t = 0; t < count; ++t) {
      for (int r = 0; r < ROWS; ++r) {
        Vector<N> value;
        load<N>(value, corner + taps[t] + r * step);
        sum[r] += value * weight[t];
      }
    }
  } else {
    for (int64_t j = 0; j < d.kernel[1]; ++j) {
      const float* from = corner + taps[j];
      Vector<N> factor[KERNEL];
      for (int i = 0; i < KERNEL; ++i) factor[i] = Vector<N>{} + weight[i * d.kernel[1] + j];
#pragma GCC unroll 32
      for (int row = 0; row < (ROWS - 1) * STRIDE + KERNEL; ++row, from += s.pitch) {
        Vector<N> value;
        load<N>(value, from);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const int i = row - r * STRIDE;
          if (i >= 0 && i < KERNEL) sum[r] += value * factor[i];
        }
      }
    }
  }
}

template <int N, int ROWS, int KERNEL, int STRIDE>
FUSED_OPS_INLINE void depthwise_rows(const Depthwise& d, const Scratch<N>& s, int64_t plane, int64_t y,
                                     const float* scratch, const float* weight, const int64_t* taps) {
  const int64_t channel = plane % d.channels;
  const float scale = d.scale ? d.scale[channel] : 1.0f, shift = d.shift ? d.shift[channel] : 0.0f;
  for (int64_t x = 0; x < d.out_width; x += N) {
    Vector<N> sum[ROWS] = {};
    depthwise_sums<N, ROWS, KERNEL, STRIDE>(d, s, scratch + y * d.stride[0] * s.pitch + x, weight, taps, sum);
    const int64_t lanes = std::min<int64_t>(N, d.out_width - x);
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = (plane * d.out_height + y + r) * d.out_width + x;
      Vector<N> result = sum[r] * scale + shift;
      if (d.residual) {
        Vector<N> other = {};
        if (at + N <= d.elements) load<N>(other, d.residual + at);  // past the row's end: lanes that are not stored
        else copy_short(reinterpret_cast<float*>(&other), d.residual + at, lanes);
        result += other;
      }
      activate<N>(result, d.activation);
      if (lanes == N) store<N>(d.output + at, result);
      else copy_short(d.output + at, reinterpret_cast<const float*>(&result), lanes);
    }
  }
}

template <int N, int KERNEL, int STRIDE>
FUSED_OPS_INLINE void depthwise_planes(const Depthwise& d, int64_t begin, int64_t end) {
  const Scratch<N> s(d);
  const int64_t count = d.kernel[0] * d.kernel[1];
  std::vector<float> scratch(s.rows * s.pitch, 0.0f);
  std::vector<int64_t> taps(count);
  for (int64_t t = 0; t < count; ++t) taps[t] = s.tap(d, t / d.kernel[1], t % d.kernel[1]);
  for (int64_t plane = begin; plane < end; ++plane) {
    fill_scratch<N>(d, s, d.input + plane * d.height * d.width, scratch.data());
    const float* weight = d.weight + plane % d.channels * count;
    int64_t y = 0;
    for (; y + 7 <= d.out_height; y += 7) {
      depthwise_rows<N, 7, KERNEL, STRIDE>(d, s, plane, y, scratch.data(), weight, taps.data());
    }
    for (; y + 3 <= d.out_height; y += 3) {
      depthwise_rows<N, 3, KERNEL, STRIDE>(d, s, plane, y, scratch.data(), weight, taps.data());
    }
    for (; y < d.out_height; ++y) {
      depthwise_rows<N, 1, KERNEL, STRIDE>(d, s, plane, y, scratch.data(), weight, taps.data());
    }
  }
}

template <int N> FUSED_OPS_INLINE void depthwise_any(const Depthwise& d, int64_t begin, int64_t end) {
  const int64_t kernel = d.dilation[0] == 1 && d.stride[0] <= 2 ? d.kernel[0] * 2 + d.stride[0] : 0;
  switch (kernel) {
    case 7: return depthwise_planes<N, 3, 1>(d, begin, end);
    case 8: return depthwise_planes<N, 3, 2>(d, begin, end);
    case 11: return depthwise_planes<N, 5, 1>(d, begin, end);
    case 12: return depthwise_planes<N, 5, 2>(d, begin, end);
    case 15: return depthwise_planes<N, 7, 1>(d, begin, end);
    default: return depthwise_planes<N, 0, 1>(d, begin, end);
  }
}

}  // namespace fused_ops::conv
