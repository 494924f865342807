// The RNNs' inner loops for one instruction set: FUSED_OPS_ISA names it, FUSED_OPS_LANES is its vector's length in
// floats, FUSED_OPS_ACCUMULATORS how many of its registers may hold sums, FUSED_OPS_ROWS how many rows a tile may have.
#include "rnn/vector_kernel.h"
#include "rnn/gates_kernel.h"
#include "rnn/norm_kernel.h"
#include "rnn/tile_kernel.h"

#undef FUSED_OPS_ISA
#undef FUSED_OPS_LANES
#undef FUSED_OPS_ACCUMULATORS
#undef FUSED_OPS_ROWS
