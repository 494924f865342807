// Attention of the newest queries of a sequence over its key/value cache ("split-KV" decoding).
//
// Idea: the cache is read exactly once. A block owns one (sequence, key head) and one contiguous piece of its keys, and
// serves all query rows of that key head (heads / kv_heads · Lq of them, 8 to a warp). D/8 lanes share a key, each
// holding 8 of its elements in registers; a warp therefore reads 256/D keys per access, 16 bytes a lane, coalesced. Each
// group of lanes keeps its own running maximum, sum and accumulator; they are merged once at the end, within the warp by
// shuffles, between warps through shared memory, between blocks by decode_combine_kernel, always in the same order.
// On chip: queries in shared memory (float), everything else in registers. No block waits for another.
//
// Bytes: 2 · kv_heads · n · D · sizeof(T) per sequence; scratch is 4·(D + 2) bytes per row and split, under 1 % of that.
// Flops: 4 · heads · Lq · n · D on CUDA cores. The floor is the bytes over the memory bandwidth while heads / kv_heads ·
// Lq stays under about 8; beyond that the flops and the shuffles of the dot products set it.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "attention/decode_plan.h"
#include "common/convert.cuh"
#include "common/shared.cuh"

namespace fused_ops {

struct DecodeParams {
  const void* query;        // (batch, heads, queries, D)
  const void* key;          // (batch, kv_heads, capacity, D), rows of 16-byte aligned elements
  const void* value;        // the same
  const void* lengths;      // (batch,), int64 if wide_lengths, else int32
  void* out;                // (batch, heads, queries, D), contiguous
  float* partial;           // (batch · heads · queries, splits, D), where splits > 1
  float2* statistics;       // (batch · heads · queries, splits): maximum (base 2) and sum
  int64_t query_strides[4];
  int64_t key_strides[3];
  int64_t value_strides[3];
  int64_t lengths_stride;
  bool wide_lengths;
  int kv_heads, group, queries, capacity, splits;
  int rows;                 // group · queries, the query rows of one key head
  int row_tiles;            // warps that share them, ROWS each
  float scale_log2;         // scale · log2(e)
};

constexpr int kDecodeWidth = 8;    // elements of a key held by one lane
constexpr int kDecodeThreads = 256;
template <typename T>
constexpr int kDecodeUnroll = 8 / static_cast<int>(sizeof(T));  // keys in flight per lane

// Which elements of a row lane `part` of the kLanes sharing it holds: its j-th is element(part, j).
template <typename T, int D>
struct DecodeLayout {
  static constexpr int kLanes = D / kDecodeWidth;
  static constexpr int kGroups = 32 / kLanes;  // keys a warp reads at once
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kAccesses = kDecodeWidth / kChunk;
  static_assert(kLanes <= 32 && kLanes * kGroups == 32 && kAccesses >= 1);

  __device__ static int element(int part, int j) { return ((j / kChunk) * kLanes + part) * kChunk + j % kChunk; }
  // Where element(part, j) of a query lies in shared memory: lanes side by side in chunks of 4 floats.
  __device__ static int slot(int part, int j) { return ((j / 4) * kLanes + part) * 4 + j % 4; }
};

// Two online softmaxes merge into one: weights that bring each to the common maximum. An empty one has maximum -inf.
__device__ inline float decode_merge(float top, float other, float& weight, float& other_weight) {
  const float peak = fmaxf(top, other);
  const float reference = peak == -INFINITY ? 0.0f : peak;
  weight = exp2f(top - reference);
  other_weight = exp2f(other - reference);
  return peak;
}

__device__ inline int decode_length(const DecodeParams& p, int64_t batch) {
  const int64_t i = batch * p.lengths_stride;
  const int64_t length =
      p.wide_lengths ? static_cast<const int64_t*>(p.lengths)[i] : static_cast<const int32_t*>(p.lengths)[i];
  return static_cast<int>(length < 0 ? 0 : length > p.capacity ? p.capacity : length);
}

// Floats of dynamic shared memory: first the queries, later the warps' accumulators and statistics.
__host__ __device__ inline int decode_shared_floats(int slices, int padded_rows, int head_dim) {
  return slices * padded_rows * (head_dim + 2);
}

// Every row of this key head to shared memory, times scale·log2(e); rows of the padding are 0.
template <typename T, int D>
__device__ void decode_stage_queries(const DecodeParams& p, int64_t batch, int64_t kv_head, int padded_rows,
                                     float* shared) {
  using Layout = DecodeLayout<T, D>;
  const T* query = static_cast<const T*>(p.query) + batch * p.query_strides[0];
  for (int i = threadIdx.x; i < padded_rows * D; i += blockDim.x) {
    const int row = i / D, slot = i % D;
    const int part = slot / 4 % Layout::kLanes, j = slot / 4 / Layout::kLanes * 4 + slot % 4;
    float value = 0.0f;
    if (row < p.rows) {
      const int64_t head = kv_head * p.group + row / p.queries;
      value = to_float(query[head * p.query_strides[1] + (row % p.queries) * p.query_strides[2] +
                             Layout::element(part, j) * p.query_strides[3]]);
    }
    shared[i] = value * p.scale_log2;
  }
}

// One lane's share of kUnroll keys (or values), zeros where the key is not below `end`.
template <typename T, int D>
struct DecodeTileOf {
  using Layout = DecodeLayout<T, D>;
  static constexpr int kUnroll = kDecodeUnroll<T>;
  Pack<T, Layout::kChunk> raw[kUnroll][Layout::kAccesses];

  __device__ void load(const T* base, int64_t stride, int first, int step, int end, int part) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int key = first + u * step;
#pragma unroll
      for (int a = 0; a < Layout::kAccesses; ++a) {
        if (key < end) {
          raw[u][a] = *reinterpret_cast<const Pack<T, Layout::kChunk>*>(
              base + key * stride + (a * Layout::kLanes + part) * Layout::kChunk);
        } else {
#pragma unroll
          for (int i = 0; i < Layout::kChunk; ++i) raw[u][a].values[i] = from_float<T>(0.0f);
        }
      }
    }
  }
  __device__ float at(int u, int j) const { return to_float(raw[u][j / Layout::kChunk].values[j % Layout::kChunk]); }
};

// One group of lanes' running softmax over the keys it has seen, for ROWS rows.
template <int ROWS>
struct DecodeState {
  float top[ROWS], sum[ROWS], acc[ROWS][kDecodeWidth];

  __device__ DecodeState() {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      top[r] = -INFINITY, sum[r] = 0.0f;
#pragma unroll
      for (int j = 0; j < kDecodeWidth; ++j) acc[r][j] = 0.0f;
    }
  }

  // Takes in row r's scores (base 2) and leaves their weights in their place.
  template <int N>
  __device__ void weigh(int r, float (&scores)[N]) {
    float peak = scores[0];
#pragma unroll
    for (int u = 1; u < N; ++u) peak = fmaxf(peak, scores[u]);
    float decay, unused;
    peak = decode_merge(top[r], peak, decay, unused);
    const float reference = peak == -INFINITY ? 0.0f : peak;
    sum[r] *= decay;
#pragma unroll
    for (int u = 0; u < N; ++u) {
      scores[u] = exp2f(scores[u] - reference);
      sum[r] += scores[u];
    }
#pragma unroll
    for (int j = 0; j < kDecodeWidth; ++j) acc[r][j] *= decay;
    top[r] = peak;
  }

  // Merges the states of a warp's groups of lanes; the lowest group's result is the one to use.
  template <int LANES>
  __device__ void merge_warp() {
#pragma unroll
    for (int offset = LANES; offset < 32; offset *= 2) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float other_top = __shfl_xor_sync(0xffffffffu, top[r], offset);
        const float other_sum = __shfl_xor_sync(0xffffffffu, sum[r], offset);
        float weight, other_weight;
        top[r] = decode_merge(top[r], other_top, weight, other_weight);
        sum[r] = sum[r] * weight + other_sum * other_weight;
#pragma unroll
        for (int j = 0; j < kDecodeWidth; ++j) {
          const float other = __shfl_xor_sync(0xffffffffu, acc[r][j], offset);
          acc[r][j] = acc[r][j] * weight + other * other_weight;
        }
      }
    }
  }
};

// The block's result for every row: the merged slices, written as the output (one split) or as a partial result.
template <typename T, int D>
__device__ void decode_write(const DecodeParams& p, int64_t unit, int split, int slices, int padded_rows,
                             const float* shared) {
  const float* statistics = shared + slices * padded_rows * D;
  for (int i = threadIdx.x; i < p.rows * D; i += blockDim.x) {
    const int row = i / D, element = i % D;
    float peak = -INFINITY, sum = 0.0f, value = 0.0f;
    for (int slice = 0; slice < slices; ++slice) peak = fmaxf(peak, statistics[2 * (slice * padded_rows + row)]);
    const float reference = peak == -INFINITY ? 0.0f : peak;
    for (int slice = 0; slice < slices; ++slice) {
      const int at = slice * padded_rows + row;
      const float weight = exp2f(statistics[2 * at] - reference);
      sum += statistics[2 * at + 1] * weight;
      value += shared[at * D + element] * weight;
    }
    const int64_t global_row = unit * p.rows + row;
    if (p.splits == 1) {
      static_cast<T*>(p.out)[global_row * D + element] = from_float<T>(sum == 0.0f ? 0.0f : value / sum);
    } else {
      p.partial[(global_row * p.splits + split) * D + element] = value;
      if (element == 0) p.statistics[global_row * p.splits + split] = make_float2(peak, sum);
    }
  }
}

// out (or its part over one split of the keys) = softmax(scale·q·kᵀ)·v. Grid: batch · kv_heads · splits.
template <typename T, int D, int ROWS>
__global__ void __launch_bounds__(kDecodeThreads, ROWS <= 2 ? 2 : 1) decode_split_kernel(const DecodeParams p) {
  using Layout = DecodeLayout<T, D>;
  constexpr int kUnroll = kDecodeUnroll<T>;
  float* shared = dynamic_shared<float>();
  const int split = static_cast<int>(blockIdx.x % p.splits);
  const int64_t unit = blockIdx.x / p.splits, batch = unit / p.kv_heads, kv_head = unit % p.kv_heads;
  const int length = decode_length(p, batch);
  const int64_t keys = decode_keys_per_split(length, p.splits), start = split * keys;
  if (p.splits > 1 && start >= length) {  // nothing left for this block: its sum of 0 tells the combine kernel
    for (int row = threadIdx.x; row < p.rows; row += blockDim.x) {
      p.statistics[(unit * p.rows + row) * p.splits + split] = make_float2(-INFINITY, 0.0f);
    }
    return;
  }
  const int begin = static_cast<int>(start < length ? start : length);
  const int end = static_cast<int>(start + keys < length ? start + keys : length);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_tile = warp % p.row_tiles, slice = warp / p.row_tiles, slices = blockDim.x / 32 / p.row_tiles;
  const int part = lane % Layout::kLanes, group = lane / Layout::kLanes;
  const int padded_rows = p.row_tiles * ROWS;

  decode_stage_queries<T, D>(p, batch, kv_head, padded_rows, shared);
  __syncthreads();

  int limit[ROWS];  // row r sees the keys before limit[r]
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int row = row_tile * ROWS + r, seen = length - p.queries + row % p.queries + 1;
    limit[r] = row < p.rows ? (seen < end ? seen : end) : 0;
  }
  const T* key = static_cast<const T*>(p.key) + batch * p.key_strides[0] + kv_head * p.key_strides[1];
  const T* value = static_cast<const T*>(p.value) + batch * p.value_strides[0] + kv_head * p.value_strides[1];
  const float* query = shared + row_tile * ROWS * D + part * 4;
  const int step = slices * Layout::kGroups;
  DecodeState<ROWS> state;
  for (int base = begin; base < end; base += step * kUnroll) {
    const int first = base + slice * Layout::kGroups + group;
    DecodeTileOf<T, D> k, v;
    k.load(key, p.key_strides[2], first, step, end, part);
    v.load(value, p.value_strides[2], first, step, end, part);
    float scores[ROWS][kUnroll];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float q[kDecodeWidth];
#pragma unroll
      for (int h = 0; h < kDecodeWidth / 4; ++h) {
        const float4 four = *reinterpret_cast<const float4*>(query + r * D + h * Layout::kLanes * 4);
        q[4 * h] = four.x, q[4 * h + 1] = four.y, q[4 * h + 2] = four.z, q[4 * h + 3] = four.w;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < kDecodeWidth; ++j) dot += q[j] * k.at(u, j);
#pragma unroll
        for (int offset = Layout::kLanes / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
        scores[r][u] = first + u * step < limit[r] ? dot : -INFINITY;
      }
      state.weigh(r, scores[r]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int j = 0; j < kDecodeWidth; ++j) {
        const float element = v.at(u, j);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) state.acc[r][j] += scores[r][u] * element;
      }
    }
  }
  state.template merge_warp<Layout::kLanes>();
  __syncthreads();  // the queries are no longer needed: their memory takes the accumulators
  if (group == 0) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int at = slice * padded_rows + row_tile * ROWS + r;
#pragma unroll
      for (int j = 0; j < kDecodeWidth; ++j) shared[at * D + Layout::element(part, j)] = state.acc[r][j];
      if (part == 0) {
        float* statistics = shared + slices * padded_rows * D + 2 * at;
        statistics[0] = state.top[r], statistics[1] = state.sum[r];
      }
    }
  }
  __syncthreads();
  decode_write<T, D>(p, unit, split, slices, padded_rows, shared);
}

// out = Σ_s 2^(top_s − top)·partial_s / Σ_s 2^(top_s − top)·sum_s, splits in order. Grid: rows; one thread an element.
template <typename T, int D>
__global__ void __launch_bounds__(D) decode_combine_kernel(const DecodeParams p) {
  const int64_t row = blockIdx.x;
  const float2* statistics = p.statistics + row * p.splits;
  float peak = -INFINITY;
  for (int s = 0; s < p.splits; ++s) peak = fmaxf(peak, statistics[s].x);
  const float reference = peak == -INFINITY ? 0.0f : peak;
  float sum = 0.0f, value = 0.0f;
  for (int s = 0; s < p.splits; ++s) {
    if (statistics[s].y == 0.0f) continue;  // this split's partial result was never written, or is 0
    const float weight = exp2f(statistics[s].x - reference);
    sum += statistics[s].y * weight;
    value += p.partial[(row * p.splits + s) * D + threadIdx.x] * weight;
  }
  static_cast<T*>(p.out)[row * D + threadIdx.x] = from_float<T>(sum == 0.0f ? 0.0f : value / sum);
}

}  // namespace fused_ops
