// Vectors of FUSED_OPS_LANES floats, their functions, and packing. Included once per instruction set (isa_cpu.cpp): no
// include guard, no standard library calls, for code shared with other instruction sets must not be emitted here.

namespace fused_ops::rnn::FUSED_OPS_ISA {

constexpr int LANES = FUSED_OPS_LANES;
constexpr int ACCUMULATORS = FUSED_OPS_ACCUMULATORS;
constexpr int ROWS = FUSED_OPS_ROWS;

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(float))));

#define FUSED_OPS_INLINE static inline __attribute__((always_inline))

FUSED_OPS_INLINE Floats load(const float* from) {
  Floats value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

FUSED_OPS_INLINE void store(float* to, Floats value) { __builtin_memcpy(to, &value, sizeof(value)); }

// The first `count` lanes, or all; zeros in the others.
FUSED_OPS_INLINE Floats load(const float* from, int64_t count) {
  if (count >= LANES) return load(from);
  Floats value = {};
  __builtin_memcpy(&value, from, count * sizeof(float));
  return value;
}

FUSED_OPS_INLINE void store(float* to, Floats value, int64_t count) {
  if (count >= LANES) return store(to, value);
  __builtin_memcpy(to, &value, count * sizeof(float));
}

FUSED_OPS_INLINE Floats all(float value) { return value + Floats{}; }

// Lane i is lane at[i] of (a, b).
FUSED_OPS_INLINE Floats shuffle(Floats a, Floats b, Ints at) {
#if defined(__clang__)
  Floats found;
  for (int lane = 0; lane < LANES; ++lane) found[lane] = at[lane] < LANES ? a[at[lane]] : b[at[lane] - LANES];
  return found;
#else
  return __builtin_shuffle(a, b, at);
#endif
}

// e^x as 2^n·e^r with |r| <= ln(2)/2 (the polynomial of Cephes' expf), about 1 ulp; saturates, keeps NaN.
FUSED_OPS_INLINE Floats exponential(Floats x) {
  x = x < -87.33f ? all(-87.33f) : x;
  x = x > 88.37f ? all(88.37f) : x;
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;  // n in the low bits: 1.5·2^23 rounds to integers
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Ints bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000;
  Floats scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

FUSED_OPS_INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// Cephes' tanhf: an odd polynomial near 0, 1 - 2/(e^2|x| + 1) beyond.
FUSED_OPS_INLINE Floats hyperbolic_tangent(Floats x) {
  const Floats size = x < 0.0f ? -x : x;
  const Floats far = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
  const Floats z = x * x;
  Floats p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const Floats near = p * z * x + x;
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

// LANES columns of LANES rows, transposed: halves, quarters, ... change places between rows.
static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
  Floats rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) rows[i] = load(from + i * stride);
#pragma GCC unroll 4
  for (int half = LANES / 2; half > 0; half /= 2) {
    Ints first, second;  // of both rows' lanes, the second row's counted from LANES
    for (int lane = 0; lane < LANES; ++lane) {
      first[lane] = lane & half ? LANES + lane - half : lane;
      second[lane] = lane & half ? LANES + lane : lane + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & half) continue;
      const Floats a = rows[i], b = rows[i + half];
      rows[i] = shuffle(a, b, first);
      rows[i + half] = shuffle(a, b, second);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) store(to + i * to_stride, rows[i]);
}

static void pack(const float* matrix, int gates, int64_t hidden, int64_t inputs, float* panels, int64_t begin,
                 int64_t end) {
  const int64_t width = gates * LANES;
  for (int64_t panel = begin; panel < end; ++panel) {
    float* to = panels + panel * inputs * width;
    const int64_t left = hidden - panel * LANES, lanes = left < LANES ? left : LANES;
    if (lanes < LANES) __builtin_memset(to, 0, inputs * width * sizeof(float));
    for (int g = 0; g < gates; ++g, to += LANES) {
      const float* from = matrix + (g * hidden + panel * LANES) * inputs;
      int64_t k = 0;
      if (lanes == LANES)
        for (; k + LANES <= inputs; k += LANES) transpose(from + k, inputs, to + k * width, width);
      for (; k < inputs; ++k)
        for (int64_t lane = 0; lane < lanes; ++lane) to[k * width + lane] = from[lane * inputs + k];
    }
  }
}

static void pack_columns(const float* matrix, int64_t rows, int64_t columns, int64_t first, float* panels,
                         int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t k = 0; k < rows; ++k) {
      const int64_t row = k + first < rows ? k + first : k + first - rows;
      store(panels + (panel * rows + k) * LANES,
            load(matrix + row * columns + panel * LANES, columns - panel * LANES));
    }
}

static void pack_right(const float* const* rows, int64_t tokens, int64_t columns, float* panels, int64_t begin,
                       int64_t end) {
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t panel = begin; panel < end; ++panel)
      store(panels + (panel * tokens + token) * LANES, load(rows[token] + panel * LANES, columns - panel * LANES));
}

static void pack_left(const float* rows, int64_t stride, int64_t tokens, int64_t hidden, float* blocks, int64_t begin,
                      int64_t end) {
  const int64_t per_slope = (hidden + ROWS - 1) / ROWS;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t unit = block % per_slope * ROWS, left = hidden - unit;
    const float* from = rows + block / per_slope * hidden + unit;
    float* to = blocks + block * tokens * ROWS;
    for (int64_t token = 0; token < tokens; ++token, from += stride, to += ROWS) {
      if (left >= ROWS) {
        __builtin_memcpy(to, from, ROWS * sizeof(float));
      } else {
        __builtin_memset(to, 0, ROWS * sizeof(float));
        __builtin_memcpy(to, from, left * sizeof(float));
      }
    }
  }
}

}  // namespace fused_ops::rnn::FUSED_OPS_ISA
