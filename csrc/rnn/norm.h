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

// What a step keeps for its derivative: what a plain step does, W_ih·x and W_hh·h normalised ([gate][unit] each), and
// these.
enum Stat : int { RSTD_IH, RSTD_HH, MEAN_C, RSTD_C, STATS };
constexpr int64_t norm_kept_of(int kind, bool zoned, int64_t hidden) {
  return (kept_of(kind, zoned) + 2 * gates_of(kind)) * hidden + STATS;
}

// A step's slopes, [slope][unit]: dL/d(W_hh·h), dL/d(W_ih·x), dL/d(gates before their activation) (GRU: r, z, n's first
// half, n's second), and for the LSTM dL/d(LN(c)·norm_c + bias_c), then the same times LN(c).
constexpr int norm_slopes_of(int kind) { return 2 * gates_of(kind) + (kind == LSTM ? 6 : kind == GRU ? 4 : 1); }

// A step whose products are made: W_ih·x in the step's gates, W_hh·h of row i in slot i of these.
struct NormStep {
  Step step;
  const float* products;
  int64_t stride;  // from panel to panel
  Norms norms;
  bool zoned;      // h
};

// A step backward. All that comes to h is in each row's `carried`.
struct NormBack {
  const BackRow* rows;
  int64_t hidden;
  Norms norms;
  bool zoned;
  int64_t inner;   // where after its slopes a row's o·tanh(..) goes; 0 where it is not wanted
};

// sum (+)= the slopes of all tokens, dot (+)= the same times `factors`. Each may be null.
struct NormSums {
  const float* slopes;
  int64_t stride, tokens, count;  // count: of a token's slopes
  const float* const* factors;
  int64_t offset;                 // into each token's factors
  float *sum, *dot;
  bool add;
};

struct NormKernels {
  // Rows [begin, end) of a job; panels [begin, end) of sums.
  void (*step[KINDS])(const NormStep& job, int64_t begin, int64_t end);
  void (*back[KINDS])(const NormBack& job, int64_t begin, int64_t end);
  void (*sums)(const NormSums& job, int64_t begin, int64_t end);
};

}  // namespace fused_ops::rnn
