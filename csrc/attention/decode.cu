// fused_ops::decode_attention_cuda: launches the split-KV decode kernel and, where keys were split, the combine kernel.
#include "attention/decode.cuh"

#include <algorithm>

#include "attention/decode_plan.h"
#include "common/launch.h"
#include "common/tensor.h"

namespace fused_ops {
namespace {

constexpr int kMaxRowsPerTile = 8;
constexpr int kMaxRowTiles = kDecodeThreads / 32;

template <typename T, int D, int ROWS>
void launch_decode(DecodeParams p, int64_t units, cudaStream_t stream) {
  p.row_tiles = (p.rows + ROWS - 1) / ROWS;
  const int slices = std::max(1, 4 / p.row_tiles);  // at least four warps, and whole ones for every row tile
  const size_t shared = decode_shared_floats(slices, p.row_tiles * ROWS, D) * sizeof(float);
  const dim3 blocks(static_cast<unsigned>(units * p.splits)), rows(static_cast<unsigned>(units * p.rows)), alone(1);
  launch(decode_split_kernel<T, D, ROWS>, blocks, dim3(32 * p.row_tiles * slices), alone, shared, stream, p);
  if (p.splits > 1) launch(decode_combine_kernel<T, D>, rows, dim3(D), alone, 0, stream, p);
}

template <typename T, int D>
void launch_rows(const DecodeParams& p, int64_t units, cudaStream_t stream) {
  if (p.rows == 1) return launch_decode<T, D, 1>(p, units, stream);
  if (p.rows == 2) return launch_decode<T, D, 2>(p, units, stream);
  if (p.rows <= 4) return launch_decode<T, D, 4>(p, units, stream);
  return launch_decode<T, D, kMaxRowsPerTile>(p, units, stream);
}

// Rows of whole, aligned 16-byte pieces: the cache itself wherever it can be read so, else a copy.
Tensor aligned_rows(const Tensor& cache) {
  const int64_t size = static_cast<int64_t>(cache.element_size());
  bool regular = cache.stride(3) == 1 && aligned({cache});
  for (int i = 0; i < 3; ++i) regular = regular && cache.stride(i) * size % 16 == 0;
  if (regular) return cache;
  Tensor copy = torch::stable::contiguous(cache);
  return aligned({copy}) ? copy : torch::stable::clone(copy);
}

void check_arguments(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths) {
  STD_TORCH_CHECK(query.dim() == 4 && k_cache.dim() == 4, "query and k_cache must be (batch, heads, length, dim)");
  const int64_t batch = query.size(0), dim = query.size(3);
  check_shape(k_cache, {batch, k_cache.size(1), k_cache.size(2), dim}, "k_cache");
  check_shape(v_cache, {batch, k_cache.size(1), k_cache.size(2), dim}, "v_cache");
  check_shape(lengths, {batch}, "cache_seqlens");
  STD_TORCH_CHECK(k_cache.scalar_type() == query.scalar_type() && v_cache.scalar_type() == query.scalar_type(),
                  "k_cache and v_cache must have query's dtype");
  STD_TORCH_CHECK(lengths.scalar_type() == ScalarType::Int || lengths.scalar_type() == ScalarType::Long,
                  "cache_seqlens must be int32 or int64");
  for (const Tensor* t : {&k_cache, &v_cache, &lengths}) {
    STD_TORCH_CHECK(on_device_of(*t, query), "all on query's device");
  }
  STD_TORCH_CHECK(dim == 64 || dim == 128 || dim == 256, "head dim must be 64, 128 or 256, got ", dim);
  STD_TORCH_CHECK(k_cache.size(2) <= INT32_MAX - 4096, "capacity must fit 32 bits, one step past the end included");
}

Tensor decode_attention_cuda(Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, double scale) {
  check_arguments(query, k_cache, v_cache, cache_seqlens);
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), dim = query.size(3);
  const int64_t kv_heads = k_cache.size(1), capacity = k_cache.size(2);
  Tensor out = torch::stable::new_empty(query, {batch, heads, queries, dim});
  if (out.numel() == 0) return out;
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "kv_heads must divide heads");
  const int64_t rows = heads / kv_heads * queries, units = batch * kv_heads;
  STD_TORCH_CHECK(rows <= kMaxRowTiles * kMaxRowsPerTile, "takes at most ", kMaxRowTiles * kMaxRowsPerTile,
                  " queries per key head, got ", rows);

  const DeviceScope scope(query);
  const int64_t splits = plan_decode(batch, kv_heads, capacity, multiprocessors()).splits;
  STD_TORCH_CHECK(units * std::max(splits, rows) <= INT32_MAX, "batch · heads is too large for one launch");
  const Tensor key = aligned_rows(k_cache), value = aligned_rows(v_cache);
  const int64_t scratch = splits > 1 ? units * rows * splits : 0;
  Tensor partial = torch::stable::new_empty(query, {scratch * dim}, ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(query, {scratch * 2}, ScalarType::Float);

  DecodeParams p{};
  p.partial = data<float>(partial), p.statistics = reinterpret_cast<float2*>(data<float>(statistics));
  for (int i = 0; i < 4; ++i) p.query_strides[i] = query.stride(i);
  for (int i = 0; i < 3; ++i) p.key_strides[i] = key.stride(i), p.value_strides[i] = value.stride(i);
  p.lengths_stride = cache_seqlens.stride(0);
  p.wide_lengths = cache_seqlens.scalar_type() == ScalarType::Long;
  if (p.wide_lengths) p.lengths = data<const int64_t>(cache_seqlens);
  else p.lengths = data<const int32_t>(cache_seqlens);
  p.kv_heads = static_cast<int>(kv_heads), p.group = static_cast<int>(heads / kv_heads);
  p.queries = static_cast<int>(queries), p.capacity = static_cast<int>(capacity);
  p.splits = static_cast<int>(splits), p.rows = static_cast<int>(rows);
  p.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  dispatch_float(query.scalar_type(), "decode_attention", [&](auto zero) {
    using T = decltype(zero);
    p.query = data<const T>(query), p.key = data<const T>(key), p.value = data<const T>(value), p.out = data<T>(out);
    if (dim == 64) return launch_rows<T, 64>(p, units, scope.stream());
    if (dim == 128) return launch_rows<T, 128>(p, units, scope.stream());
    return launch_rows<T, 256>(p, units, scope.stream());
  });
  return out;
}

}  // namespace
}  // namespace fused_ops

FUSED_OPS_CUDA_LIBRARY(m) {
  m.impl("decode_attention_cuda", TORCH_BOX(&fused_ops::decode_attention_cuda));
}
