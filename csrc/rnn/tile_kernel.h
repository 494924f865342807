// The RNNs' products: rows times packed weights. Included once per instruction set (isa_cpu.cpp), after gates_kernel.h.
//
// A panel is LANES columns of an output: its weights are packed k-major, [k][gate][lane], so that one load feeds every
// row of a tile. A tile is R rows of P panels, as many as the registers hold sums for. Every output is one chain of
// additions over k in order, whatever the tile it falls into: a row's result does not depend on the rows beside it.

namespace fused_ops::rnn::FUSED_OPS_ISA {

constexpr int64_t BLOCK = 64;          // products in a chain
constexpr int64_t TOKEN_BLOCK = 256;   // the same in a weight's gradient

#define FUSED_OPS_UNROLL _Pragma("GCC unroll 8")

// total[row][panel][gate] += rows[row]·weights[panel][gate], as sums of BLOCK products: they round less than one chain.
template <int R, int P, int G>
FUSED_OPS_INLINE void multiply(const float* const (&rows)[R], const float* weights, int64_t inputs,
                               Floats (&total)[R][P][G]) {
  for (int64_t begin = 0; begin < inputs; begin += BLOCK) {
    const int64_t end = begin + BLOCK < inputs ? begin + BLOCK : inputs;
    Floats acc[R][P][G] = {};
    for (int64_t k = begin; k < end; ++k) {
      Floats w[P][G];
      FUSED_OPS_UNROLL for (int p = 0; p < P; ++p)
        FUSED_OPS_UNROLL for (int g = 0; g < G; ++g) w[p][g] = load(weights + ((p * inputs + k) * G + g) * LANES);
      FUSED_OPS_UNROLL for (int r = 0; r < R; ++r) {
        const float x = rows[r][k];
        FUSED_OPS_UNROLL for (int p = 0; p < P; ++p)
          FUSED_OPS_UNROLL for (int g = 0; g < G; ++g) acc[r][p][g] += x * w[p][g];
      }
    }
    FUSED_OPS_UNROLL for (int r = 0; r < R; ++r)
      FUSED_OPS_UNROLL for (int p = 0; p < P; ++p)
        FUSED_OPS_UNROLL for (int g = 0; g < G; ++g) total[r][p][g] += acc[r][p][g];
  }
}

template <int KIND>
struct ProjectTile {
  static constexpr int GATES = gates_of(KIND);
  const Projection& job;

  template <int R, int P>
  void tile(int64_t row, int64_t panel) const {
    Floats acc[R][P][GATES];
    const float* rows[R];
    FUSED_OPS_UNROLL for (int r = 0; r < R; ++r) {
      rows[r] = job.rows[row + r];
      FUSED_OPS_UNROLL for (int p = 0; p < P; ++p)
        FUSED_OPS_UNROLL for (int g = 0; g < GATES; ++g)
          acc[r][p][g] = load(job.bias + ((panel + p) * GATES + g) * LANES);
    }
    multiply<R, P, GATES>(rows, job.weights + panel * job.inputs * GATES * LANES, job.inputs, acc);
    FUSED_OPS_UNROLL for (int r = 0; r < R; ++r)
      FUSED_OPS_UNROLL for (int p = 0; p < P; ++p)
        FUSED_OPS_UNROLL for (int g = 0; g < GATES; ++g)
          store(job.gates + (panel + p) * job.panel_stride + ((row + r) * GATES + g) * LANES, acc[r][p][g]);
  }
};

template <int KIND>
struct StepTile {
  static constexpr int GATES = gates_of(KIND);
  const Step& job;

  const float* gates(int64_t row, int64_t panel) const {
    return job.gates + panel * job.panel_stride + job.rows[row].slot * GATES * LANES;
  }

  template <int R, int P>
  void tile(int64_t row, int64_t panel) const {
    Floats acc[R][P][GATES];
    const float* rows[R];
    FUSED_OPS_UNROLL for (int r = 0; r < R; ++r) {
      rows[r] = job.rows[row + r].fed;
      FUSED_OPS_UNROLL for (int p = 0; p < P; ++p) {
        const float* gi = gates(row + r, panel + p);
        FUSED_OPS_UNROLL for (int g = 0; g < GATES; ++g)
          acc[r][p][g] = load(KIND == GRU && g == 2 ? job.bias + (panel + p) * LANES : gi + g * LANES);
      }
    }
    multiply<R, P, GATES>(rows, job.weights + panel * job.states * GATES * LANES, job.states, acc);
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p)
        finish_step<KIND>(acc[r][p], gates(row + r, panel + p), job.rows[row + r], (panel + p) * LANES, job.hidden);
  }
};

template <int KIND>
struct BackTile {
  static constexpr int GATES = 1;
  const BackStep& job;

  template <int R, int P>
  void tile(int64_t row, int64_t panel) const {
    Floats acc[R][P][1] = {};
    const float* rows[R];
    FUSED_OPS_UNROLL for (int r = 0; r < R; ++r) rows[r] = job.rows[row + r].later;
    multiply<R, P, 1>(rows, job.weights + panel * job.inputs * LANES, job.inputs, acc);
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) finish_back<KIND>(acc[r][p], job.rows[row + r], (panel + p) * LANES, job.hidden);
  }
};

struct ProductTile {
  static constexpr int GATES = 1;
  const Product& job;

  template <int R, int P>
  void tile(int64_t row, int64_t panel) const {
    Floats acc[R][P][1] = {};
    const float* rows[R];
    FUSED_OPS_UNROLL for (int r = 0; r < R; ++r) rows[r] = job.rows[row + r];
    multiply<R, P, 1>(rows, job.weights + panel * job.inputs * LANES, job.inputs, acc);
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) {
        const int64_t column = (panel + p) * LANES, left = job.columns - column;
        float* to = job.out[row + r] + column;
        store(to, job.add ? load(to, left) + acc[r][p][0] : acc[r][p][0], left);
      }
  }
};

// Rows [row, row + R) over panels [begin, end), as many panels at once as the registers hold.
template <int R, class Kernel>
static void row_block(const Kernel& kernel, int64_t row, int64_t begin, int64_t end) {
  constexpr int FIT = ACCUMULATORS / Kernel::GATES / R;
  int64_t panel = begin;
  if constexpr (FIT >= 8)
    for (; panel + 8 <= end; panel += 8) kernel.template tile<R, 8>(row, panel);
  if constexpr (FIT >= 4)
    for (; panel + 4 <= end; panel += 4) kernel.template tile<R, 4>(row, panel);
  if constexpr (FIT == 3)
    for (; panel + 3 <= end; panel += 3) kernel.template tile<R, 3>(row, panel);
  if constexpr (FIT >= 2)
    for (; panel + 2 <= end; panel += 2) kernel.template tile<R, 2>(row, panel);
  for (; panel < end; ++panel) kernel.template tile<R, 1>(row, panel);
}

// Rows in one tile.
template <class Kernel>
constexpr int tallest() {
  constexpr int fit = ACCUMULATORS / Kernel::GATES;
  return fit < ROWS ? fit : ROWS;
}

template <class Kernel>
static void row_block(const Kernel& kernel, int64_t rows, int64_t row, int64_t begin, int64_t end) {
  constexpr int MOST = tallest<Kernel>();
  switch (rows) {
    case 1: return row_block<1>(kernel, row, begin, end);
    case 2: return row_block<2>(kernel, row, begin, end);
    case 3: return row_block<3>(kernel, row, begin, end);
    case 4: return row_block<(MOST >= 4 ? 4 : 1)>(kernel, row, begin, end);
    case 5: return row_block<(MOST >= 5 ? 5 : 1)>(kernel, row, begin, end);
    case 6: return row_block<(MOST >= 6 ? 6 : 1)>(kernel, row, begin, end);
    case 7: return row_block<(MOST >= 7 ? 7 : 1)>(kernel, row, begin, end);
    case 8: return row_block<(MOST >= 8 ? 8 : 1)>(kernel, row, begin, end);
  }
}

// All rows of a job over panels [begin, end): a few panels' weights stay in cache while the blocks of rows pass.
template <class Kernel>
static void sweep(const Kernel& kernel, int64_t begin, int64_t end) {
  constexpr int64_t MOST = tallest<Kernel>(), AT_ONCE = ACCUMULATORS / Kernel::GATES / MOST;
  const int64_t count = kernel.job.count, blocks = (count + MOST - 1) / MOST;
  if (blocks <= 1) return row_block(kernel, count, 0, begin, end);
  for (int64_t panel = begin; panel < end; panel += AT_ONCE)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * count / blocks, last = (block + 1) * count / blocks;
      row_block(kernel, last - first, first, panel, panel + AT_ONCE < end ? panel + AT_ONCE : end);
    }
}

template <int KIND>
static void project(const Projection& job, int64_t begin, int64_t end) {
  sweep(ProjectTile<KIND>{job}, begin, end);
}

template <int KIND>
static void step(const Step& job, int64_t begin, int64_t end) {
  sweep(StepTile<KIND>{job}, begin, end);
}

template <int KIND>
static void back(const BackStep& job, int64_t begin, int64_t end) {
  sweep(BackTile<KIND>{job}, begin, end);
}

static void product(const Product& job, int64_t begin, int64_t end) { sweep(ProductTile{job}, begin, end); }

// ROWS rows of P panels of a weight's gradient.
template <int P>
static void outer_tile(const Outer& job, int64_t block, int64_t panel) {
  const int64_t per_gate = (job.hidden + ROWS - 1) / ROWS, unit = block % per_gate * ROWS;
  const int64_t gate = (block / per_gate + job.rotate) % job.gates;
  const int64_t height = job.hidden - unit < ROWS ? job.hidden - unit : ROWS;
  const float* left = job.left + block * job.tokens * ROWS;
  const float* right = job.right + panel * job.tokens * LANES;
  float* const out = job.out + (gate * job.hidden + unit) * job.columns + panel * LANES;
  for (int64_t r = 0; r < height; ++r)
    FUSED_OPS_UNROLL for (int p = 0; p < P; ++p) __builtin_prefetch(out + r * job.columns + p * LANES, 1);
  for (int64_t begin = 0; begin < job.tokens; begin += TOKEN_BLOCK) {
    const int64_t end = begin + TOKEN_BLOCK < job.tokens ? begin + TOKEN_BLOCK : job.tokens;
    Floats acc[ROWS][P] = {};
    for (int64_t k = begin; k < end; ++k) {
      Floats x[P];
      FUSED_OPS_UNROLL for (int p = 0; p < P; ++p) x[p] = load(right + (p * job.tokens + k) * LANES);
      FUSED_OPS_UNROLL for (int r = 0; r < ROWS; ++r)
        FUSED_OPS_UNROLL for (int p = 0; p < P; ++p) acc[r][p] += left[k * ROWS + r] * x[p];
    }
    for (int64_t r = 0; r < height; ++r)
      FUSED_OPS_UNROLL for (int p = 0; p < P; ++p) {
        float* to = out + r * job.columns + p * LANES;
        const int64_t count = job.columns - (panel + p) * LANES;
        store(to, job.add || begin > 0 ? load(to, count) + acc[r][p] : acc[r][p], count);
      }
  }
}

static void outer(const Outer& job, int64_t begin, int64_t end) {
  constexpr int FIT = ACCUMULATORS / ROWS;
  const int64_t panels = (job.columns + LANES - 1) / LANES;
  int64_t panel = 0;
  for (; panel + FIT <= panels; panel += FIT)
    for (int64_t block = begin; block < end; ++block) outer_tile<FIT>(job, block, panel);
  if (FIT > 2 && panel + 2 <= panels) {
    for (int64_t block = begin; block < end; ++block) outer_tile<2>(job, block, panel);
    panel += 2;
  }
  for (; panel < panels; ++panel)
    for (int64_t block = begin; block < end; ++block) outer_tile<1>(job, block, panel);
}

static void sums(const Outer& job, int64_t begin, int64_t end) {
  constexpr int CHAINS = 8;  // of additions that do not wait for each other
  const int64_t per_gate = (job.hidden + ROWS - 1) / ROWS;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t gate = (block / per_gate + job.rotate) % job.gates, unit = block % per_gate * ROWS;
    const float* left = job.left + block * job.tokens * ROWS;
    float sum[CHAINS][ROWS] = {};
    for (int64_t k = 0; k < job.tokens; ++k)
      for (int r = 0; r < ROWS; ++r) sum[k % CHAINS][r] += left[k * ROWS + r];
    for (int r = 0; r < ROWS && unit + r < job.hidden; ++r) {
      float total = 0.0f;
      for (int chain = 0; chain < CHAINS; ++chain) total += sum[chain][r];
      float& out = job.out[gate * job.hidden + unit + r];
      out = job.add ? out + total : total;
    }
  }
}

#undef FUSED_OPS_UNROLL
#undef FUSED_OPS_INLINE

constexpr Isa isa = {
    LANES, ROWS, pack, pack_columns, pack_right, pack_left,
    {project<TANH>, project<TANH>, project<GRU>, project<LSTM>},
    {step<TANH>, step<RELU>, step<GRU>, step<LSTM>},
    {back<TANH>, back<RELU>, back<GRU>, back<LSTM>},
    product, zone, times, split, recall, outer, sums, &norm_kernels,
};

}  // namespace fused_ops::rnn::FUSED_OPS_ISA
