// Bounds, alignment, memory that nobody has written.
#include "mutants/mutant.h"

KERNEL(past_shared) {
  SHARED(float, tile, 64);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + (kFault ? 1 : 0)];  // past_shared
}
MUTANT(past_shared, 1, 64, 0)

KERNEL(past_dynamic) {
  float* tile = dynamic_shared<float>();
  tile[threadIdx.x + (kFault ? 1 : 0)] = in[threadIdx.x];  // past_dynamic
  if (!kFault) out[threadIdx.x] = tile[threadIdx.x];
}
MUTANT(past_dynamic, 1, 64, 64 * sizeof(float))

KERNEL(past_input) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n + (kFault ? 1 : 0)) {
    out[i] = in[i];  // past_input
  }
}
MUTANT(past_input, 5, 32, 0)

KERNEL(past_output) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i <= n - (kFault ? 0 : 1)) out[i] = 1;  // past_output
}
MUTANT(past_output, 5, 32, 0)

KERNEL(before_output) {
  const int i = static_cast<int>(threadIdx.x);
  out[i - (kFault ? 1 : 0)] = in[i];  // before_output
}
MUTANT(before_output, 1, 64, 0)

KERNEL(written_input) {
  float* to = kFault ? const_cast<float*>(in) : out;
  to[threadIdx.x] = 1;  // written_input
}
MUTANT(written_input, 1, 64, 0)

KERNEL(misaligned) {
  const auto* four = reinterpret_cast<const float4*>(in + (kFault ? 1 : 0));
  const float4 value = four[threadIdx.x];  // misaligned
  out[threadIdx.x] = value.x + value.y + value.z + value.w;
}
MUTANT(misaligned, 1, 16, 0)

KERNEL(uninitialised) {
  SHARED(float, tile, 64);
  if (!kFault || threadIdx.x < 63) tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];  // uninitialised
}
MUTANT(uninitialised, 1, 64, 0)

KERNEL(left_by_another_block) {
  SHARED(float, tile, 64);
  if (!kFault || blockIdx.x == 0) tile[threadIdx.x] = in[threadIdx.x];
  const float value = tile[threadIdx.x];  // left_by_another_block
  out[blockIdx.x * 64 + threadIdx.x] = value;
}
MUTANT(left_by_another_block, 2, 64, 0)

KERNEL(large_static) {
  SHARED(uint16_t, first, 100 * 1024);
  SHARED(uint16_t, second, (kFault ? 20 : 10) * 1024);  // large_static
  first[threadIdx.x] = 1, second[threadIdx.x] = 2;
  out[threadIdx.x] = static_cast<float>(first[threadIdx.x] + second[threadIdx.x]);
}
MUTANT(large_static, 1, 64, 0)

KERNEL(large_dynamic) {
  uint16_t* numbers = dynamic_shared<uint16_t>();
  numbers[threadIdx.x] = 1;
  out[threadIdx.x] = static_cast<float>(numbers[threadIdx.x]);
}
MUTANT(large_dynamic, 1, 64, static_cast<size_t>(fault ? 228 : 227) * 1024)

KERNEL(overflow) {
  const int large = kFault ? 1 << 30 : 1 << 20;
  const int product = large * (n / 50);  // overflow
  out[threadIdx.x] = static_cast<float>(product);
}
MUTANT(overflow, 1, 64, 0)
