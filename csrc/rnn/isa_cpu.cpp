// The RNNs' inner loops for each instruction set, and the choice between them at run time.
#include <cstdlib>
#include <cstring>

#include "common/check.h"
#include "rnn/isa.h"
#include "rnn/norm.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

#define FUSED_OPS_ISA portable
#define FUSED_OPS_LANES 4
#define FUSED_OPS_ACCUMULATORS 12
#define FUSED_OPS_ROWS 6
#include "rnn/cpu_kernel.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define FUSED_OPS_ISA avx2
#define FUSED_OPS_LANES 8
#define FUSED_OPS_ACCUMULATORS 12
#define FUSED_OPS_ROWS 6
#include "rnn/cpu_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
#endif
#define FUSED_OPS_ISA avx512
#define FUSED_OPS_LANES 16
#define FUSED_OPS_ACCUMULATORS 24
#define FUSED_OPS_ROWS 8
#include "rnn/cpu_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

namespace fused_ops::rnn {

const Isa& choose_isa() {
  const char* wanted = std::getenv("FUSED_OPS_CPU_ISA");
  const auto allowed = [wanted](const char* name) {
    return wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, name) == 0;
  };
#if defined(__x86_64__)
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return avx512::isa;
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::isa;
#endif
  STD_TORCH_CHECK(allowed("portable"),
                  "FUSED_OPS_CPU_ISA must be portable, or avx512 or avx2 where this processor has it, got ", wanted);
  return portable::isa;
}

}  // namespace fused_ops::rnn
