// Attention of a few queries over a key/value cache on the CPU, any head dims; float32 maths, cache in float32, bfloat16
// or float16.
//
// A task is kSplit keys of one key head and all query rows that use it (group x queries): scores of all rows, a softmax
// within the task, their sums of values. A task's keys and values fit the second level cache, so memory sees them once,
// whatever the number of rows: the floor is the bytes of both caches within the lengths. Tasks leave (max, sum of
// weights, weighted values) behind, which `merge` joins in their order: how many threads there were and what else was in
// the batch changes no bit.
//
// A dot product keeps one accumulator vector for each (row, key) of a tile of N of them; these N vectors are then summed
// across their lanes together, by log2 N rounds of pairwise blends, into one vector of N scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#define FUSED_OPS_INLINE inline __attribute__((always_inline))

namespace fused_ops::decode {

constexpr int64_t kSplit = 128, kPad = 16;  // keys of a task, floats of the widest vector
constexpr int64_t kPitch = kSplit + kPad;   // of a row of scores: a tile may reach past the end
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Task {
  int64_t batch, head, length, begin, end;  // keys [begin, end) of `length`
};

struct Decode {
  const float* query;  // (batch * kv_heads, rows, query_pitch), scaled; row = position * group + head in the group
  const void *key, *value;
  int64_t key_strides[3], value_strides[3];  // in elements: batch, head, position
  int64_t kv_heads, group, queries, dim, query_pitch, value_dim, value_pitch;
  int64_t left;  // how many keys ahead of its own a query sees; -1: all
  float* partial;     // (tasks, rows, value_pitch)
  float* statistics;  // (tasks, rows, 2): max, sum of weights
  int64_t rows() const { return group * queries; }
  // The keys that `row` sees: [first, last).
  int64_t last(const Task& task, int64_t row) const { return task.length - queries + row / group + 1; }
  int64_t first(const Task& task, int64_t row) const { return left < 0 ? 0 : last(task, row) - 1 - left; }
};

struct Bfloat { uint16_t bits; };
struct Half { uint16_t bits; };

template <int N> struct VectorOf {
  typedef float floats __attribute__((vector_size(N * 4)));
  typedef int32_t ints __attribute__((vector_size(N * 4)));
  typedef uint16_t shorts __attribute__((vector_size(N * 2)));
};
template <int N> using Floats = typename VectorOf<N>::floats;
template <int N> using Ints = typename VectorOf<N>::ints;
template <int N> using Shorts = typename VectorOf<N>::shorts;

template <int N> FUSED_OPS_INLINE void load(Floats<N>& to, const float* from) { std::memcpy(&to, from, sizeof(to)); }

template <int N> FUSED_OPS_INLINE void load(Floats<N>& to, const Bfloat* from) {
  Shorts<N> halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Ints<N> bits = __builtin_convertvector(halves, Ints<N>) << 16;
  std::memcpy(&to, &bits, sizeof(to));
}

// Exponent and mantissa move into a float's place; a power of two mends the bias (and denormals), infinity and NaN apart.
template <int N> FUSED_OPS_INLINE void load(Floats<N>& to, const Half* from) {
  Shorts<N> halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Ints<N> wide = __builtin_convertvector(halves, Ints<N>);
  Ints<N> bits = (wide & 0x7fff) << 13;
  std::memcpy(&to, &bits, sizeof(to));
  to *= 0x1p112f;
  std::memcpy(&bits, &to, sizeof(to));
  bits |= ((wide & 0x7c00) == 0x7c00) & 0x7f800000;
  bits |= (wide & 0x8000) << 16;
  std::memcpy(&to, &bits, sizeof(to));
}

// The first `count` < N, zeros after them: what lies behind a row is not read.
template <int N, class T> FUSED_OPS_INLINE void load_part(Floats<N>& to, const T* from, int64_t count) {
  T staged[N] = {};
  for (int64_t i = 0; i < count; ++i) staged[i] = from[i];
  load<N>(to, staged);
}

template <int N, int HALF, int... LANE>
FUSED_OPS_INLINE void fold(Floats<N>& a, const Floats<N>& b, std::integer_sequence<int, LANE...>) {
  const Floats<N> own = __builtin_shufflevector(a, b, (LANE & HALF ? N + LANE : LANE)...);
  const Floats<N> other = __builtin_shufflevector(a, b, (LANE & HALF ? N + LANE - HALF : LANE + HALF)...);
  a = own + other;
}

// Lane i of sum[0] becomes the sum of sum[i]'s lanes, by the same tree of additions for every i.
template <int N, int HALF = N / 2> FUSED_OPS_INLINE void add_lanes(Floats<N> (&sum)[N]) {
#pragma GCC unroll 8
  for (int i = 0; i < HALF; ++i) fold<N, HALF>(sum[i], sum[i + HALF], std::make_integer_sequence<int, N>{});
  if constexpr (HALF > 1) add_lanes<N, HALF / 2>(sum);
}

// e^x for x <= 0 (the polynomial of Cephes' expf), about 1 ulp; 0 below -87.3, keeps NaN.
template <int N> FUSED_OPS_INLINE void exponential(Floats<N>& x) {
  const Floats<N> shifted = x * 1.44269504088896341f + 12582912.0f;  // the power of two in the low bits
  const Floats<N> n = shifted - 12582912.0f;
  const Floats<N> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats<N> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Ints<N> bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000;
  Floats<N> power;
  std::memcpy(&power, &bits, sizeof(power));
  const Floats<N> zero = {};
  x = x < -87.3f ? zero : p * power;
}

// Scores of ROWS rows with `count` keys from `key` on: N / ROWS of them, the last one again where there are fewer.
template <int N, int ROWS, class T>
FUSED_OPS_INLINE void score_tile(const Decode& d, const float* query, const T* key, int64_t count, float* scores) {
  constexpr int KEYS = N / ROWS;
  Floats<N> sum[N] = {};
  const T* keys[KEYS];
  for (int k = 0; k < KEYS; ++k) keys[k] = key + std::min<int64_t>(k, count - 1) * d.key_strides[2];
  int64_t c = 0;
  for (; c + N <= d.dim; c += N) {
    Floats<N> x[KEYS], y;
#pragma GCC unroll 16
    for (int k = 0; k < KEYS; ++k) load<N>(x[k], keys[k] + c);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      load<N>(y, query + r * d.query_pitch + c);
#pragma GCC unroll 16
      for (int k = 0; k < KEYS; ++k) sum[r * KEYS + k] += x[k] * y;
    }
  }
  if (c < d.dim) {
#pragma GCC unroll 16
    for (int k = 0; k < KEYS; ++k) {
      Floats<N> x, y;
      load_part<N>(x, keys[k] + c, d.dim - c);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) load<N>(y, query + r * d.query_pitch + c), sum[r * KEYS + k] += x * y;
    }
  }
  add_lanes<N>(sum);
  for (int r = 0; r < ROWS; ++r) {
    std::memcpy(scores + r * kPitch, reinterpret_cast<const float*>(&sum[0]) + r * KEYS, KEYS * sizeof(float));
  }
}

// Turns scores [first, last) into weights e^(score - max), zero outside, and returns (max, sum of weights).
template <int N> FUSED_OPS_INLINE void soften(float* scores, int64_t first, int64_t last, float* statistics) {
  const int64_t end = (last + N - 1) / N * N;
  for (int64_t j = 0; j < first; ++j) scores[j] = kNone;
  for (int64_t j = last; j < end; ++j) scores[j] = kNone;
  Floats<N> top = Floats<N>{} + kNone, total = {}, s;
  for (int64_t j = 0; j < end; j += N) load<N>(s, scores + j), top = s > top ? s : top;
  float most = kNone, sum = 0.0f;
  for (int lane = 0; lane < N; ++lane) most = top[lane] > most ? top[lane] : most;
  const float shift = most == kNone ? 0.0f : most;  // then every weight is 0, or NaN
  for (int64_t j = 0; j < end; j += N) {
    load<N>(s, scores + j);
    s -= shift;
    exponential<N>(s);
    total += s;
    std::memcpy(scores + j, &s, sizeof(s));
  }
  for (int lane = 0; lane < N; ++lane) sum += total[lane];
  statistics[0] = most, statistics[1] = sum;
}

// sum += weights[begin, end) times `VECTORS` vectors of each value, or its last `part` numbers.
template <int N, int ROWS, int VECTORS, class T>
FUSED_OPS_INLINE void add_values(const T* value, int64_t stride, const float* weights, int64_t begin, int64_t end,
                                 int64_t part, Floats<N> (*sum)[VECTORS]) {
  for (int64_t j = begin; j < end; ++j) {
    Floats<N> x[VECTORS];
    if (part) load_part<N>(x[0], value + j * stride, part);
    else
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) load<N>(x[v], value + j * stride + v * N);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += x[v] * weights[r * kPitch + j];
    }
  }
}

// ROWS rows that see keys [first[r], last[r]): together where all do, one by one before and after.
template <int N, int ROWS, int VECTORS, class T>
FUSED_OPS_INLINE void value_tile(const Decode& d, const T* value, const float* weights, const int64_t* first,
                                 const int64_t* last, int64_t part, float* out) {
  const int64_t stride = d.value_strides[2];
  int64_t begin = first[0], end = last[0];
  for (int r = 1; r < ROWS; ++r) begin = std::max(begin, first[r]), end = std::min(end, last[r]);
  end = std::max(begin, end);
  Floats<N> sum[ROWS][VECTORS] = {};
  for (int r = 0; ROWS > 1 && r < ROWS; ++r) {
    add_values<N, 1, VECTORS>(value, stride, weights + r * kPitch, first[r], std::min(begin, last[r]), part, sum + r);
  }
  add_values<N, ROWS, VECTORS>(value, stride, weights, begin, end, part, sum);
  for (int r = 0; ROWS > 1 && r < ROWS; ++r) {
    add_values<N, 1, VECTORS>(value, stride, weights + r * kPitch, end, last[r], part, sum + r);
  }
  for (int r = 0; r < ROWS; ++r) std::memcpy(out + r * d.value_pitch, sum[r], sizeof(sum[r]));
}

// ROWS rows from `row` on against the keys of a task.
template <int N, int ROWS, class T>
FUSED_OPS_INLINE void task_rows(const Decode& d, const Task& task, int64_t index, int64_t row) {
  constexpr int KEYS = N / ROWS;
  const int64_t count = task.end - task.begin, place = index * d.rows() + row;
  const auto* key = static_cast<const T*>(d.key) + task.batch * d.key_strides[0] + task.head * d.key_strides[1] +
                    task.begin * d.key_strides[2];
  const auto* value = static_cast<const T*>(d.value) + task.batch * d.value_strides[0] +
                      task.head * d.value_strides[1] + task.begin * d.value_strides[2];
  const float* query = d.query + ((task.batch * d.kv_heads + task.head) * d.rows() + row) * d.query_pitch;
  float* out = d.partial + place * d.value_pitch;
  alignas(64) float scores[ROWS * kPitch];
  int64_t first[ROWS], last[ROWS];
  for (int64_t j = 0; j < count; j += KEYS) {
    score_tile<N, ROWS>(d, query, key + j * d.key_strides[2], count - j, scores + j);
  }
  for (int r = 0; r < ROWS; ++r) {
    last[r] = std::clamp<int64_t>(d.last(task, row + r) - task.begin, 0, count);
    first[r] = std::clamp<int64_t>(d.first(task, row + r) - task.begin, 0, last[r]);
    soften<N>(scores + r * kPitch, first[r], last[r], d.statistics + (place + r) * 2);
  }
  int64_t c = 0;
  for (; c + 4 * N <= d.value_dim; c += 4 * N) value_tile<N, ROWS, 4>(d, value + c, scores, first, last, 0, out + c);
  for (; c < d.value_dim; c += N) {
    const int64_t part = d.value_dim - c < N ? d.value_dim - c : 0;
    value_tile<N, ROWS, 1>(d, value + c, scores, first, last, part, out + c);
  }
}

template <int N, class T> FUSED_OPS_INLINE void run_tasks(const Decode& d, const Task* tasks, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    int64_t row = 0;
    for (; row + 4 <= d.rows(); row += 4) task_rows<N, 4, T>(d, tasks[index], index, row);
    for (; row + 2 <= d.rows(); row += 2) task_rows<N, 2, T>(d, tasks[index], index, row);
    for (; row < d.rows(); ++row) task_rows<N, 1, T>(d, tasks[index], index, row);
  }
}

}  // namespace fused_ops::decode
