// Depthwise convolution, channels_last: out[n, y, x, c] = act(sum over taps of input * weight * scale + shift + residual).
//
// One thread makes a strip of kStrip neighbouring outputs of V neighbouring channels (16 bytes where C allows it).
// It walks the taps row by row, reads each input vector of the strip's window once, and keeps the strip's sums in
// registers; neighbouring threads hold neighbouring channels, so every access of a warp is one coalesced run. Windows
// of neighbouring strips and rows overlap and meet in the first level cache. No shared memory, no barrier.
//
// Bytes: input + output (+ residual) once from memory, K*K*C weights from cache; flops: 2*K*K per output. At K = 3 in
// half precision that is 4.5 flop per byte: memory is the floor. At K = 7, 24.5 per byte: the float32 FMA units are.
#pragma once

#include <cstdint>

#include "common/convert.cuh"
#include "conv/epilogue.h"

namespace fused_ops::conv {

constexpr int kStrip = 4;
constexpr int kDepthwiseThreads = 128;
constexpr int kDepthwiseBlocks = 4;  // per multiprocessor: at most 128 registers a thread

struct DepthwiseShape {
  int64_t batch, channels, height, width, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

template <typename T> struct DepthwiseTensors {
  const T* input;         // (N, H, W, C)
  const T* weight;        // (kernel_h * kernel_w, C)
  const float *scale, *shift;  // (C,), may be null
  const T* residual;      // (N, OH, OW, C), may be null
  T* output;              // (N, OH, OW, C)
};

// Thread `index` of batch * out_height * strips * (C / V), channels fastest.
struct DepthwisePlace {
  int64_t image, y, x, channel;
};

__device__ __forceinline__ int64_t depthwise_strips(const DepthwiseShape& s) {
  return (s.out_width + kStrip - 1) / kStrip;
}

__device__ __forceinline__ DepthwisePlace depthwise_place(const DepthwiseShape& s, int64_t index, int vector) {
  const int64_t groups = s.channels / vector, strips = depthwise_strips(s);
  DepthwisePlace place;
  place.channel = index % groups * vector;
  index /= groups;
  place.x = index % strips * kStrip;
  index /= strips;
  place.y = index % s.out_height;
  place.image = index / s.out_height;
  return place;
}

template <int ACTIVATION> __device__ __forceinline__ float activate(float y) {
  if constexpr (ACTIVATION == kRelu) return y < 0.0f ? 0.0f : y;
  if constexpr (ACTIVATION == kRelu6) return y < 0.0f ? 0.0f : (y > 6.0f ? 6.0f : y);
  if constexpr (ACTIVATION == kGelu) return 0.5f * y * (1.0f + erff(y * 0.70710678f));
  if constexpr (ACTIVATION == kGeluTanh) return 0.5f * y * (1.0f + tanhf(0.79788456f * (y + 0.044715f * y * y * y)));
  if constexpr (ACTIVATION == kSilu) return y / (1.0f + expf(-y));
  if constexpr (ACTIVATION == kTanh) return tanhf(y);
  if constexpr (ACTIVATION == kSigmoid) return 1.0f / (1.0f + expf(-y));
  if constexpr (ACTIVATION == kHardswish) {
    const float gate = y + 3.0f;
    return y * (gate < 0.0f ? 0.0f : (gate > 6.0f ? 6.0f : gate)) * (1.0f / 6.0f);
  }
  if constexpr (ACTIVATION == kLeakyRelu) return y < 0.0f ? 0.01f * y : y;
  return y;
}

template <int ACTIVATION, int V> __device__ __forceinline__ void activate_all(float (&y)[kStrip][V]) {
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
#pragma unroll
    for (int v = 0; v < V; ++v) y[i][v] = activate<ACTIVATION>(y[i][v]);
  }
}

template <int V> __device__ __forceinline__ void activate_strip(float (&y)[kStrip][V], int activation) {
  switch (activation) {
    case kRelu: return activate_all<kRelu>(y);
    case kRelu6: return activate_all<kRelu6>(y);
    case kGelu: return activate_all<kGelu>(y);
    case kGeluTanh: return activate_all<kGeluTanh>(y);
    case kSilu: return activate_all<kSilu>(y);
    case kTanh: return activate_all<kTanh>(y);
    case kSigmoid: return activate_all<kSigmoid>(y);
    case kHardswish: return activate_all<kHardswish>(y);
    case kLeakyRelu: return activate_all<kLeakyRelu>(y);
    default: return;
  }
}

template <typename T, int V>
__device__ __forceinline__ void load_floats(const T* from, float (&to)[V]) {
  const auto pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = to_float(pack.values[v]);
}

// Adds one row of taps to the strip: `row` is the input row, `first` the column of the strip's first tap.
// K > 0 with step 1 and no dilation: each column of the window is read once and used by every tap that covers it.
template <typename T, int V, int K, int STRIDE>
__device__ __forceinline__ void add_row_window(const DepthwiseShape& s, const T* row, const T* weight, int64_t first,
                                               float (&sum)[kStrip][V]) {
  float taps[K][V];
#pragma unroll
  for (int j = 0; j < K; ++j) load_floats<T, V>(weight + j * s.channels, taps[j]);
#pragma unroll
  for (int column = 0; column < (kStrip - 1) * STRIDE + K; ++column) {
    const int64_t x = first + column;
    if (x < 0 || x >= s.width) continue;
    float value[V];
    load_floats<T, V>(row + x * s.channels, value);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const int j = column - i * STRIDE;
      if (j < 0 || j >= K) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) sum[i][v] += value[v] * taps[j][v];
    }
  }
}

// Any kernel, stride and dilation.
template <typename T, int V>
__device__ __forceinline__ void add_row(const DepthwiseShape& s, const T* row, const T* weight, int64_t first,
                                        float (&sum)[kStrip][V]) {
  for (int j = 0; j < s.kernel_w; ++j) {
    float tap[V];
    load_floats<T, V>(weight + j * s.channels, tap);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const int64_t x = first + i * s.stride_w + j * s.dilation_w;
      if (x < 0 || x >= s.width) continue;
      float value[V];
      load_floats<T, V>(row + x * s.channels, value);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[i][v] += value[v] * tap[v];
    }
  }
}

// One thread's work. K: kernel_w of an undilated kernel with this STRIDE along the width, or 0 for any.
template <typename T, int V, int K, int STRIDE>
__device__ __forceinline__ void depthwise_strip(const DepthwiseShape& s, const DepthwiseTensors<T>& t, int activation,
                                                int64_t index) {
  const DepthwisePlace place = depthwise_place(s, index, V);
  const T* image = t.input + place.image * s.height * s.width * s.channels + place.channel;
  const int64_t first = place.x * s.stride_w - s.padding_w;
  float sum[kStrip][V] = {};
  for (int i = 0; i < s.kernel_h; ++i) {
    const int64_t y = place.y * s.stride_h - s.padding_h + static_cast<int64_t>(i) * s.dilation_h;
    if (y < 0 || y >= s.height) continue;
    const T* row = image + y * s.width * s.channels;
    const T* weight = t.weight + static_cast<int64_t>(i) * s.kernel_w * s.channels + place.channel;
    if constexpr (K > 0) {
      add_row_window<T, V, K, STRIDE>(s, row, weight, first, sum);
    } else {
      add_row<T, V>(s, row, weight, first, sum);
    }
  }
  const int64_t row = (place.image * s.out_height + place.y) * s.out_width;
  const int64_t start = (row + place.x) * s.channels + place.channel;
  float scale[V], shift[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    scale[v] = t.scale == nullptr ? 1.0f : t.scale[place.channel + v];
    shift[v] = t.shift == nullptr ? 0.0f : t.shift[place.channel + v];
  }
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    float other[V] = {};
    if (t.residual != nullptr && place.x + i < s.out_width) load_floats<T, V>(t.residual + start + i * s.channels, other);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[i][v] = sum[i][v] * scale[v] + shift[v] + other[v];
  }
  activate_strip<V>(sum, activation);
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    if (place.x + i >= s.out_width) break;
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) result.values[v] = from_float<T>(sum[i][v]);
    *reinterpret_cast<Pack<T, V>*>(t.output + start + i * s.channels) = result;
  }
}

template <typename T, int V, int K, int STRIDE>
__global__ __launch_bounds__(kDepthwiseThreads, kDepthwiseBlocks) void depthwise_fwd_kernel(
    DepthwiseShape shape, DepthwiseTensors<T> tensors, int activation, int64_t threads) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kDepthwiseThreads + threadIdx.x;
  if (index < threads) depthwise_strip<T, V, K, STRIDE>(shape, tensors, activation, index);
}

}  // namespace fused_ops::conv
