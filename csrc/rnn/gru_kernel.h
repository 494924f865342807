// The GRU's inner loops, included once per instruction set: FUSED_OPS_ISA names it, FUSED_OPS_LANES is its vector's
// length in floats, FUSED_OPS_TILES how many (row, panel) pairs its registers hold three accumulators for.
//
// A panel is LANES hidden units: its weights are packed k-major, [k][gate r, z, n][lane], so that one load feeds every
// row of a tile. Every output is one chain of additions over k in order, whatever the tile it falls into: a row's result
// does not depend on the rows beside it. No include guard, no standard library calls: code shared with other
// instruction sets must not be emitted here.

namespace fused_ops::gru::FUSED_OPS_ISA {

constexpr int LANES = FUSED_OPS_LANES;
constexpr int TILES = FUSED_OPS_TILES;
constexpr int64_t BLOCK = 64;

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(float))));

#define FUSED_OPS_INLINE static inline __attribute__((always_inline))

FUSED_OPS_INLINE Floats load(const float* from) {
  Floats value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

FUSED_OPS_INLINE void store(float* to, Floats value) { __builtin_memcpy(to, &value, sizeof(value)); }

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

// acc[row][panel][gate] += sum over k of rows[row][k]·weights[panel][k][gate], for k in [begin, end) in order.
template <int R, int P>
FUSED_OPS_INLINE void accumulate(const float* const* rows, const float* weights, int64_t inputs, int64_t begin,
                                 int64_t end, Floats (&acc)[R][P][3]) {
  for (int64_t k = begin; k < end; ++k) {
    Floats w[P][3];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 3
      for (int g = 0; g < 3; ++g) w[p][g] = load(weights + ((p * inputs + k) * 3 + g) * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float x = rows[r][k];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 3
        for (int g = 0; g < 3; ++g) acc[r][p][g] += x * w[p][g];
    }
  }
}

// The same over all k: sums of BLOCK products each, which round less than one long chain.
template <int R, int P>
FUSED_OPS_INLINE void multiply(const float* const* rows, const float* weights, int64_t inputs,
                               Floats (&total)[R][P][3]) {
  for (int64_t k = 0; k < inputs; k += BLOCK) {
    Floats acc[R][P][3] = {};
    accumulate<R, P>(rows, weights, inputs, k, k + BLOCK < inputs ? k + BLOCK : inputs, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 3
        for (int g = 0; g < 3; ++g) total[r][p][g] += acc[r][p][g];
  }
}

struct Project {
  const Projection& job;

  template <int R, int P>
  void tile(int64_t row, int64_t panel) const {
    Floats acc[R][P][3];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 3
        for (int g = 0; g < 3; ++g) acc[r][p][g] = load(job.bias + ((panel + p) * 3 + g) * LANES);
    multiply<R, P>(job.rows + row, job.weights + panel * job.inputs * 3 * LANES, job.inputs, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 3
        for (int g = 0; g < 3; ++g) store(job.slot(row + r, panel + p, LANES) + g * LANES, acc[r][p][g]);
  }
};

struct Step {
  const Recurrence& job;

  template <int R, int P>
  void tile(int64_t row, int64_t panel) const {
    Floats acc[R][P][3];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const float* gi = job.slot(job.slots[row + r], panel + p, LANES);
        acc[r][p][0] = load(gi);
        acc[r][p][1] = load(gi + LANES);
        acc[r][p][2] = load(job.bias + (panel + p) * LANES);
      }
    multiply<R, P>(job.rows + row, job.weights + panel * job.hidden * 3 * LANES, job.hidden, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) finish(acc[r][p], row + r, panel + p);
  }

  // h' = n + z·(h - n) for one panel of one row.
  void finish(const Floats (&acc)[3], int64_t row, int64_t panel) const {
    const int64_t unit = panel * LANES, left = job.hidden - unit;
    const float* from = job.rows[row] + unit;
    float* to = job.out[row] + unit;
    Floats h = {};
    if (left >= LANES) {
      h = load(from);
    } else {
      __builtin_memcpy(&h, from, left * sizeof(float));
    }
    const Floats r = sigmoid(acc[0]), z = sigmoid(acc[1]);
    const Floats n = hyperbolic_tangent(load(job.slot(job.slots[row], panel, LANES) + 2 * LANES) + r * acc[2]);
    h = n + z * (h - n);
    if (left >= LANES) {
      store(to, h);
    } else {
      __builtin_memcpy(to, &h, left * sizeof(float));
    }
  }
};

// Rows [row, row + R) over panels [begin, end), as many panels at once as the registers hold.
template <int R, class Kernel>
static void row_block(const Kernel& kernel, int64_t row, int64_t begin, int64_t end) {
  int64_t panel = begin;
  if constexpr (R * 8 <= TILES)
    for (; panel + 8 <= end; panel += 8) kernel.template tile<R, 8>(row, panel);
  if constexpr (R * 4 <= TILES)
    for (; panel + 4 <= end; panel += 4) kernel.template tile<R, 4>(row, panel);
  if constexpr (R * 2 <= TILES)
    for (; panel + 2 <= end; panel += 2) kernel.template tile<R, 2>(row, panel);
  for (; panel < end; ++panel) kernel.template tile<R, 1>(row, panel);
}

template <class Kernel>
static void row_block(const Kernel& kernel, int64_t rows, int64_t row, int64_t begin, int64_t end) {
  switch (rows) {
    case 1: return row_block<1>(kernel, row, begin, end);
    case 2: return row_block<2>(kernel, row, begin, end);
    case 3: return row_block<3>(kernel, row, begin, end);
    case 4: return row_block<4>(kernel, row, begin, end);
    case 5: return row_block<(TILES > 4 ? 5 : 1)>(kernel, row, begin, end);
    case 6: return row_block<(TILES > 4 ? 6 : 1)>(kernel, row, begin, end);
    case 7: return row_block<(TILES > 4 ? 7 : 1)>(kernel, row, begin, end);
    case 8: return row_block<(TILES > 4 ? 8 : 1)>(kernel, row, begin, end);
  }
}

// All rows of a job over panels [begin, end): a panel's weights stay in cache while the blocks of rows pass.
template <class Kernel>
static void sweep(const Kernel& kernel, int64_t begin, int64_t end) {
  const int64_t count = kernel.job.count, blocks = (count + TILES - 1) / TILES;
  if (blocks == 1) return row_block(kernel, count, 0, begin, end);
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * count / blocks, last = (block + 1) * count / blocks;
      row_block(kernel, last - first, first, panel, panel + 1);
    }
}

static void project(const Projection& job, int64_t begin, int64_t end) {
  sweep(Project{job}, begin, end);
}

static void step(const Recurrence& job, int64_t begin, int64_t end) {
  sweep(Step{job}, begin, end);
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

// (3·hidden, inputs) row-major -> panels [begin, end), zeros in the lanes past `hidden`.
static void pack(const float* matrix, int64_t hidden, int64_t inputs, float* panels, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    float* to = panels + panel * inputs * 3 * LANES;
    const int64_t left = hidden - panel * LANES, lanes = left < LANES ? left : LANES;
    if (lanes < LANES) __builtin_memset(to, 0, inputs * 3 * LANES * sizeof(float));
    for (int g = 0; g < 3; ++g, to += LANES) {
      const float* from = matrix + (g * hidden + panel * LANES) * inputs;
      int64_t k = 0;
      if (lanes == LANES)
        for (; k + LANES <= inputs; k += LANES) transpose(from + k, inputs, to + k * 3 * LANES, 3 * LANES);
      for (; k < inputs; ++k)
        for (int64_t lane = 0; lane < lanes; ++lane) to[k * 3 * LANES + lane] = from[lane * inputs + k];
    }
  }
}

#undef FUSED_OPS_INLINE

constexpr Isa isa = {LANES, pack, project, step};

}  // namespace fused_ops::gru::FUSED_OPS_ISA
