// Layer norm inside the step of an RNN (Ba et al. 2016, supplementary material): what its drivers and the instruction
// sets agree on.
//
//   gates = LN(W_ih·x)·norm_ih + b_ih + LN(W_hh·h)·norm_hh + b_hh, the GRU's n with r on the second half, and for the
//   LSTM h = o·tanh(LN(c)·norm_c + bias_c); LN over all gates·hidden values (c: hidden), variance biased.
#pragma once

#include "rnn/isa.h"

namespace fused_ops::rnn {

constexpr float NORM_EPS = 1e-5f;

// A cell's parameters beside its weights, [gate][unit]. The biases may be null, c's pair is the LSTM's.
struct Norms {
  const float *ih, *hh, *b_ih, *b_hh, *c, *bias_c;
};

// What a step keeps for its derivative: the gates as a plain step does, W_ih·x and W_hh·h normalised ([gate][unit]
// each), and these.
enum Stat : int { RSTD_IH, RSTD_HH, MEAN_C, RSTD_C, STATS };
constexpr int norm_gates_of(int kind) { return kind >= GRU ? 4 : 0; }
constexpr int64_t norm_kept_of(int kind, int64_t hidden) {
  return (norm_gates_of(kind) + 2 * gates_of(kind)) * hidden + STATS;
}

// A step's slopes, [slope][unit]: dL/d(W_hh·h), dL/d(W_ih·x), dL/d(gates before their activation) (GRU: r, z, n's first
// half, n's second), and for the LSTM dL/d(LN(c)·norm_c + bias_c), then the same times LN(c).
constexpr int norm_slopes_of(int kind) { return 2 * gates_of(kind) + (kind == LSTM ? 6 : kind == GRU ? 4 : 1); }

struct NormRow {
  const float *gi, *gh;  // W_ih·x, W_hh·h: [panel][gate][lane]
  const float *h, *c;    // the states before the step; c of an LSTM
  float *h_out, *c_out;
  float* kept;           // null if no derivative will be asked for
};

struct NormStep {
  const NormRow* rows;
  int64_t hidden, gi_stride, gh_stride;  // from panel to panel
  Norms norms;
};

// One row of one step backward. Pointers to gradients are null where there is none.
struct NormBackRow {
  const float *product, *carried, *grad, *grad_all;  // their sum is dL/dh: through W_hh; past it, or dL/dh_n; outside's
  const float *dc, *grad_c;                          // of the LSTM's c: from the step after or dL/dc_n; dL/dc_all
  const float *kept, *h, *h_before, *c, *c_before;
  float *slopes, *later;    // later: dL/d(W_hh·h) once more
  float *passed, *dc_out;   // dL/dh that bypasses the product (GRU), dL/dc before the step
};

struct NormBack {
  const NormBackRow* rows;
  int64_t hidden;
  Norms norms;
};

// sum += the slopes of all tokens, dot += the same times `factors`. Each may be null.
struct NormSums {
  const float* slopes;
  int64_t stride, tokens, count;  // count: of a token's slopes
  const float* const* factors;
  int64_t offset;                 // into each token's factors
  float *sum, *dot;
};

struct NormKernels {
  // Rows [begin, end) of a job; panels [begin, end) of sums.
  void (*step[KINDS])(const NormStep& job, int64_t begin, int64_t end);
  void (*back[KINDS])(const NormBack& job, int64_t begin, int64_t end);
  void (*sums)(const NormSums& job, int64_t begin, int64_t end);
};

}  // namespace fused_ops::rnn
