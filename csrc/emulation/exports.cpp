// What tests set, by ctypes.
#include "emulation/runtime.h"

#define FUSED_OPS_EXPORT extern "C" __attribute__((visibility("default")))

FUSED_OPS_EXPORT void fused_ops_emulate_seed(uint64_t seed) { fused_ops::emulation::set_seed(seed); }
FUSED_OPS_EXPORT void fused_ops_emulate_checked(bool checked) { fused_ops::emulation::set_checked(checked); }
FUSED_OPS_EXPORT void fused_ops_emulate_multiprocessors(int count) {
  fused_ops::emulation::chip.multiprocessors = count;
}
FUSED_OPS_EXPORT void fused_ops_emulate_capability(int capability) {
  fused_ops::emulation::chip.capability = capability;
}
