// The split-KV decode kernel's own source on the CPU, for tests: one C function that takes addresses.
#include "emulate.h"

#include <cmath>
#include <limits>

#include "attention/decode.cuh"

namespace fused_ops {
float4 decode_shared[1 << 14];
}

namespace {

using namespace fused_ops;

template <typename T, int D, int ROWS>
void run(DecodeParams p, unsigned units) {
  p.row_tiles = (p.rows + ROWS - 1) / ROWS;
  const int slices = std::max(1, 4 / p.row_tiles);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::fill_n(decode_shared, 1 << 14, float4{nan, nan, nan, nan});
  emulation::launch(units * p.splits, 32 * p.row_tiles * slices, [&] { decode_split_kernel<T, D, ROWS>(p); });
  if (p.splits > 1) emulation::launch(units * p.rows, D, [&] { decode_combine_kernel<T, D>(p); });
}

template <typename T, int D>
void run_rows(const DecodeParams& p, unsigned units) {
  if (p.rows == 1) return run<T, D, 1>(p, units);
  if (p.rows == 2) return run<T, D, 2>(p, units);
  if (p.rows <= 4) return run<T, D, 4>(p, units);
  return run<T, D, 8>(p, units);
}

template <typename T>
void run_dim(const DecodeParams& p, unsigned units, int dim) {
  if (dim == 64) return run_rows<T, 64>(p, units);
  if (dim == 128) return run_rows<T, 128>(p, units);
  return run_rows<T, 256>(p, units);
}

}  // namespace

// sizes: batch, heads, queries, dim, kv_heads, capacity, splits, wide_lengths; strides: query 4, key 3, value 3, lengths.
extern "C" void decode(int dtype, const int64_t* sizes, const int64_t* strides, const void* query, const void* key,
                       const void* value, const void* lengths, void* out, double scale) {
  DecodeParams p{};
  p.query = query, p.key = key, p.value = value, p.lengths = lengths, p.out = out;
  std::copy_n(strides, 4, p.query_strides), std::copy_n(strides + 4, 3, p.key_strides);
  std::copy_n(strides + 7, 3, p.value_strides);
  p.lengths_stride = strides[10];
  const int64_t batch = sizes[0], dim = sizes[3];
  p.kv_heads = static_cast<int>(sizes[4]), p.group = static_cast<int>(sizes[1] / sizes[4]);
  p.queries = static_cast<int>(sizes[2]), p.capacity = static_cast<int>(sizes[5]);
  p.splits = static_cast<int>(sizes[6]), p.wide_lengths = sizes[7] != 0;
  p.rows = p.group * p.queries, p.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  const int64_t pieces = batch * p.kv_heads * p.rows * p.splits;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> partial(pieces * dim, nan);
  std::vector<float2> statistics(pieces, float2{nan, nan});
  p.partial = partial.data(), p.statistics = statistics.data();
  const unsigned units = static_cast<unsigned>(batch * p.kv_heads);
#ifdef FLOAT32_ALONE  // quicker to compile: one type, one head dim, one number of rows per warp
  return run<float, 64, 8>(p, units);
#else
  if (dtype == 0) return run_dim<float>(p, units, static_cast<int>(dim));
  if (dtype == 1) return run_dim<__half>(p, units, static_cast<int>(dim));
  return run_dim<__nv_bfloat16>(p, units, static_cast<int>(dim));
#endif
}
