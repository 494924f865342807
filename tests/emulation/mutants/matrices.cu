// Fragments that are indexed wrongly, rows at wrong addresses.
#include "common/mma.cuh"
#include "mutants/mutant.h"

// out = A B for A (16, 8) and B (8, 8), the first 128 and the next 64 elements of `in`.
KERNEL(wrong_fragment) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const auto left = [&](int row, int column) { return to_tf32(in[row * 8 + column]); };
  const auto right = [&](int row, int column) { return to_tf32(in[128 + row * 8 + column]); };
  const uint32_t a[4] = {left(g, t), left(kFault ? g : g + 8, kFault ? t + 4 : t), left(kFault ? g + 8 : g, kFault ? t : t + 4),
                         left(g + 8, t + 4)};
  const uint32_t b[2] = {right(t, g), right(t + 4, g)};
  float d[4] = {};
  mma_m16n8k8(d, a, b);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
MUTANT(wrong_fragment, 1, 32, 0)

KERNEL(misaligned_row) {
  SHARED(uint4, rows, 40);
  for (uint32_t i = threadIdx.x; i < 40; i += 32) rows[i] = make_uint4(i, i, i, i);
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, reinterpret_cast<const uint32_t*>(rows + threadIdx.x) + (kFault && threadIdx.x == 9 ? 2 : 0));  // misaligned_row
  out[threadIdx.x] = static_cast<float>(r[0]);
}
MUTANT(misaligned_row, 1, 32, 0)

KERNEL(row_past_the_end) {
  SHARED(uint4, rows, 32);
  rows[threadIdx.x] = make_uint4(1, 2, 3, 4);
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, rows + threadIdx.x + (kFault ? 1 : 0));  // row_past_the_end
  out[threadIdx.x] = static_cast<float>(r[0]);
}
MUTANT(row_past_the_end, 1, 32, 0)

KERNEL(row_in_device_memory) {
  SHARED(uint4, rows, 32);
  rows[threadIdx.x] = make_uint4(1, 2, 3, 4);
  __syncwarp();
  const void* row = rows + threadIdx.x;
  if (kFault && threadIdx.x == 3) row = in;
  uint32_t r[4];
  ldmatrix_x4(r, row);  // row_in_device_memory
  out[threadIdx.x] = static_cast<float>(r[0]);
}
MUTANT(row_in_device_memory, 1, 32, 0)

KERNEL(rows_not_written) {
  SHARED(uint4, rows, 32);
  if (!kFault || threadIdx.x != 17) rows[threadIdx.x] = make_uint4(1, 2, 3, 4);
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, rows + threadIdx.x);  // rows_not_written
  out[threadIdx.x] = static_cast<float>(r[0]);
}
MUTANT(rows_not_written, 1, 32, 0)

KERNEL(missing_barrier_before_rows) {
  SHARED(uint4, rows, 32);
  rows[threadIdx.x] = make_uint4(0, 0, 0, 0);
  __syncwarp();
  rows[threadIdx.x] = make_uint4(1, 2, 3, 4);  // missing_barrier_before_rows
  if (!kFault) __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, rows + (threadIdx.x + 1) % 32);  // missing_barrier_before_rows
  out[threadIdx.x] = static_cast<float>(r[0]);
}
MUTANT(missing_barrier_before_rows, 1, 32, 0)

KERNEL(missing_barrier_after_rows) {
  SHARED(uint4, rows, 32);
  const uint32_t r[4] = {threadIdx.x, threadIdx.x + 32, threadIdx.x + 64, threadIdx.x + 96};
  stmatrix_x4(rows + (threadIdx.x + 1) % 32, r);  // missing_barrier_after_rows
  if (!kFault) __syncwarp();
  out[threadIdx.x] = static_cast<float>(rows[threadIdx.x].x);  // missing_barrier_after_rows
}
MUTANT(missing_barrier_after_rows, 1, 32, 0)

KERNEL(part_of_a_warp) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (!kFault || threadIdx.x < 24) mma_m16n8k16<__half>(d, a, b);  // part_of_a_warp
  out[threadIdx.x] = d[0];
}
MUTANT(part_of_a_warp, 1, 32, 0)
