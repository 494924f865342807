// What the RNNs' CPU drivers and their instruction sets agree on.
#pragma once

#include <cstdint>

namespace fused_ops::rnn {

enum Kind : int { TANH, RELU, GRU, LSTM };
constexpr int KINDS = 4;

// Rows of W_ih and W_hh for each unit.
constexpr int gates_of(int kind) { return kind == LSTM ? 4 : kind == GRU ? 3 : 1; }

// What a step keeps for its derivative, [value][unit]: GRU W_hn·h + b_hn, r, z, n; LSTM i, f, g, o; else h does, or
// where zoneout changes it, h before that.
constexpr int kept_of(int kind, bool zoned) { return kind >= GRU ? 4 : zoned; }

// A step's slopes, [slope][unit]: the derivatives of the loss by its gates before their activation; for the GRU by
// W_hn·h + b_hn, r, z, n. The products with W_hh have the first `gates_of`, those with W_ih the last.
constexpr int slopes_of(int kind) { return kind >= GRU ? 4 : 1; }

// gates = rows·W_ih^T + bias: [panel][slot][gate][lane], row i's in slot i. bias: [panel][gate][lane], b_ih + b_hh but
// for the GRU's n, which has b_in alone.
struct Projection {
  const float* const* rows;
  int64_t count, inputs;
  const float* weights;  // packed panels, [panel][k][gate][lane]
  const float* bias;
  float* gates;
  int64_t panel_stride;  // in gates; 0 when each panel's gates are used before the next panel's are made
};

struct StepRow {
  const float* fed;       // h as the product takes it: masked, if there is a mask
  const float *h, *c;     // the states before the step; c of an LSTM
  float *h_out, *c_out;
  float* kept;            // null if no derivative will be asked for
  int64_t slot;
};

// One step of some rows.
struct Step {
  const StepRow* rows;
  int64_t count, hidden, states;  // states: h's size, an LSTM's hidden or what that is projected to
  const float* weights;
  const float* bias;  // [panel][lane], the GRU's b_hn
  const float* gates;
  int64_t panel_stride;
};

// One row of one step backward. Pointers to gradients are null where there is none.
struct BackRow {
  const float* later;                      // the slopes of the step after
  bool cut;                                // no gradient comes from there: a reset came first, or the row's end
  const float *carried, *grad, *grad_all;  // added to it: what bypassed the product or dL/dh_n; dL/doutput; dL/dh_all
  const float *dc, *grad_c;                // of the LSTM's c: from the step after or dL/dc_n; dL/dc_all
  const float *kept, *h, *h_before, *c, *c_before;
  float* slopes;                           // null before the first step: dL/dh is then all there is to find
  float *passed, *dc_out;                  // dL/dh that bypasses the product (or is dL/dh_0), dL/dc before the step
};

struct BackStep {
  const BackRow* rows;
  int64_t count, hidden;
  const float* weights;  // packed columns of W_hh, [panel][k][lane]
  int64_t inputs;        // k: gates·hidden, or 0 when all rows are cut
};

// Zoneout (Krueger et al. 2016, eq. 3-4): a state keeps its old value where `keep`, or without it a share of it.
struct Zone {
  const bool* keep = nullptr;
  float share = 0.0f;
};

// The derivative by a state, product·mask + carried + grad + grad_all: what zoneout hands to the state before goes to
// `kept` (if not null), the rest to `rest`. Null pointers are zeros, a null mask ones.
struct Split {
  const float *product, *mask, *carried, *grad, *grad_all;
  Zone zone;
  float *rest, *kept;
};

// out[row] (+)= rows[row]·W.
struct Product {
  const float* const* rows;
  int64_t count, inputs, columns;
  const float* weights;  // packed columns
  float* const* out;
  bool add;
};

// out (+)= left^T·right, a weight's gradient: the sum over tokens of slopes times inputs.
struct Outer {
  const float* left;   // packed, [slope][block][token][row]
  const float* right;  // packed, [panel][token][lane]
  int64_t tokens, hidden, columns;
  int gates, rotate;   // slope i is of the weight's gate (i + rotate) % gates
  float* out;          // (gates·hidden, columns)
  bool add = true;
};

struct NormKernels;  // norm.h

struct Isa {
  int lanes, block;  // a panel's and a left block's width
  // (gates·hidden, inputs) row-major -> panels [begin, end) of `hidden`, zeros in the lanes past it.
  void (*pack)(const float* matrix, int gates, int64_t hidden, int64_t inputs, float* panels, int64_t begin,
               int64_t end);
  // (rows, columns) row-major, row `first` first (the others follow, then those before) -> panels of columns.
  void (*pack_columns)(const float* matrix, int64_t rows, int64_t columns, int64_t first, float* panels, int64_t begin,
                       int64_t end);
  // Rows of tokens -> panels [begin, end) of columns, or left blocks [begin, end) of slopes, each of `hidden` units.
  void (*pack_right)(const float* const* rows, int64_t tokens, int64_t columns, float* panels, int64_t begin,
                     int64_t end);
  void (*pack_left)(const float* rows, int64_t stride, int64_t tokens, int64_t hidden, float* blocks, int64_t begin,
                    int64_t end);
  // Panels [begin, end) of a job; `outer` and `sums` (out: (gates·hidden,) += the sum of left) take left blocks.
  void (*project[KINDS])(const Projection& job, int64_t begin, int64_t end);
  void (*step[KINDS])(const Step& job, int64_t begin, int64_t end);
  void (*back[KINDS])(const BackStep& job, int64_t begin, int64_t end);
  void (*product)(const Product& job, int64_t begin, int64_t end);
  // Pointwise, over `count` units of one row: state, which is h~, becomes h'; to = a·b; an LSTM's c~ and o·tanh(c~).
  void (*zone)(const Zone& zone, const float* before, float* state, int64_t count);
  void (*times)(float* to, const float* a, const float* b, int64_t count);
  void (*split)(const Split& job, int64_t count);
  void (*recall)(const float* kept, const float* c_before, float* c, float* h, int64_t count);
  void (*outer)(const Outer& job, int64_t begin, int64_t end);
  void (*sums)(const Outer& job, int64_t begin, int64_t end);
  const NormKernels* norm;
};

// The best instruction set of this machine, or the one FUSED_OPS_CPU_ISA names (avx512, avx2, portable).
const Isa& choose_isa();

}  // namespace fused_ops::rnn
