// What the GRU's driver and its instruction sets agree on.
#pragma once

#include <cstdint>

namespace fused_ops::gru {

// `count` rows times one matrix. gates: [panel][slot][gate r, z, n][lane].
struct Job {
  const float* const* rows;
  int64_t count;
  const float* weights;  // packed panels
  const float* bias;
  float* gates;
  int64_t panel_stride;  // in gates; 0 when each panel's gates are used before the next panel's are made

  float* slot(int64_t index, int64_t panel, int lanes) const { return gates + panel * panel_stride + index * 3 * lanes; }
};

// gates = rows·W_ih^T + bias, row i's in slot i; bias [panel][gate][lane]: b_ih + b_hh for r and z, b_ih for n.
struct Projection : Job {
  int64_t inputs;
};

// out = the next state; rows are the states (hidden,), bias [panel][lane] is b_hn.
struct Recurrence : Job {
  int64_t hidden;
  const int32_t* slots;  // where each row's gates are
  float* const* out;
};

struct Isa {
  int lanes;
  void (*pack)(const float* matrix, int64_t hidden, int64_t inputs, float* panels, int64_t begin, int64_t end);
  void (*project)(const Projection& job, int64_t begin, int64_t end);
  void (*step)(const Recurrence& job, int64_t begin, int64_t end);
};

// The best instruction set of this machine, or the one FUSED_OPS_CPU_ISA names (avx512, avx2, portable).
const Isa& choose_isa();

}  // namespace fused_ops::gru
