// decode_attention_cpu: plans the tasks, runs them compiled for AVX-512, AVX2 or the compiler's default (the processor
// decides at run time), and joins what they found.
#include "attention/decode_cpu.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <memory>

#include "common/check.h"

namespace fused_ops::decode {
namespace {

namespace stable = torch::stable;

constexpr int64_t kSerial = 1 << 17;  // multiplications below which a second thread costs more than it brings

using Run = void (*)(const Decode&, const Task*, int64_t, int64_t);

#if defined(__x86_64__)
template <class T>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"), flatten)) void run_512(const Decode& d, const Task* tasks,
                                                                                   int64_t begin, int64_t end) {
  run_tasks<16, T>(d, tasks, begin, end);
}
template <class T>
__attribute__((target("avx2,fma"), flatten)) void run_256(const Decode& d, const Task* tasks, int64_t begin,
                                                          int64_t end) {
  run_tasks<8, T>(d, tasks, begin, end);
}
#endif
template <class T> void run_128(const Decode& d, const Task* tasks, int64_t begin, int64_t end) {
  run_tasks<4, T>(d, tasks, begin, end);
}

// `lanes` caps the width, so that tests can run every variant this processor has.
template <class T> Run choose(int64_t lanes) {
#if defined(__x86_64__)
  if (lanes >= 16 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return run_512<T>;
  }
  if (lanes >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return run_256<T>;
#endif
  return run_128<T>;
}

int64_t padded(int64_t count) { return (count + kPad - 1) / kPad * kPad; }

std::vector<int64_t> read_lengths(const Tensor& cache_seqlens, int64_t batch, int64_t capacity) {
  const bool wide = cache_seqlens.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || cache_seqlens.scalar_type() == ScalarType::Int, "cache_seqlens must be int32 or int64");
  check_shape(cache_seqlens, {batch}, "cache_seqlens");
  const void* data = cache_seqlens.const_data_ptr();
  const int64_t stride = cache_seqlens.stride(0);
  std::vector<int64_t> lengths(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length =
        wide ? static_cast<const int64_t*>(data)[b * stride] : static_cast<const int32_t*>(data)[b * stride];
    STD_TORCH_CHECK(length >= 0 && length <= capacity, "cache_seqlens must be between 0 and the capacity ", capacity,
                    ", got ", length);
    lengths[b] = length;
  }
  return lengths;
}

// Every key head's tasks, one after another; head u's are [starts[u], starts[u + 1]).
std::vector<Task> plan(const Decode& d, const std::vector<int64_t>& lengths, std::vector<int64_t>& starts) {
  std::vector<Task> tasks;
  for (size_t b = 0; b < lengths.size(); ++b) {
    const int64_t length = lengths[b];
    const int64_t from = d.left < 0 ? 0 : std::max<int64_t>(length - d.queries - d.left, 0);
    for (int64_t head = 0; head < d.kv_heads; ++head) {
      starts.push_back(tasks.size());
      for (int64_t begin = from / kSplit * kSplit; begin < length; begin += kSplit) {
        tasks.push_back({static_cast<int64_t>(b), head, length, std::max(begin, from), std::min(begin + kSplit, length)});
      }
    }
  }
  starts.push_back(tasks.size());
  return tasks;
}

// (batch, heads, queries, dim) of any strides -> d.query's layout, times `scale`.
template <class T> void pack_query(const Decode& d, const Tensor& query, float scale, float* to) {
  const auto* from = static_cast<const T*>(query.const_data_ptr());
  for (int64_t b = 0; b < query.size(0); ++b) {
    for (int64_t head = 0; head < d.kv_heads; ++head) {
      for (int64_t row = 0; row < d.rows(); ++row, to += d.query_pitch) {
        const T* source = from + b * query.stride(0) + (head * d.group + row % d.group) * query.stride(1) +
                          row / d.group * query.stride(2);
        for (int64_t c = 0; c < d.dim; ++c) to[c] = static_cast<float>(source[c * query.stride(3)]) * scale;
        std::fill(to + d.dim, to + d.query_pitch, 0.0f);
      }
    }
  }
}

// out row = sum over its tasks of e^(max - top) values / (the same of their weights, and e^(sink - top)); 0 for no key.
template <class T>
void merge(const Decode& d, const std::vector<int64_t>& starts, const float* sinks, int64_t row, float* sum, T* out) {
  const int64_t unit = row / d.rows(), in_head = row % d.rows(), head = unit % d.kv_heads * d.group + in_head % d.group;
  float top = sinks ? sinks[head] : kNone;
  for (int64_t t = starts[unit]; t < starts[unit + 1]; ++t) {
    const float own = d.statistics[(t * d.rows() + in_head) * 2];
    top = own > top ? own : top;
  }
  const float shift = top == kNone ? 0.0f : top;
  float total = sinks ? std::exp(sinks[head] - shift) : 0.0f;
  std::fill(sum, sum + d.value_dim, 0.0f);
  for (int64_t t = starts[unit]; t < starts[unit + 1]; ++t) {
    const int64_t place = t * d.rows() + in_head;
    const float weight = std::exp(d.statistics[place * 2] - shift);
    total += d.statistics[place * 2 + 1] * weight;
    const float* from = d.partial + place * d.value_pitch;
    for (int64_t c = 0; c < d.value_dim; ++c) sum[c] += from[c] * weight;
  }
  for (int64_t c = 0; c < d.value_dim; ++c) out[c] = static_cast<T>(total == 0.0f ? 0.0f : sum[c] / total);
}

template <class T, class Stored>
void compute(Decode& d, const Tensor& query, const std::vector<int64_t>& lengths, const float* sinks, float scale,
             int64_t lanes, Tensor& out) {
  std::vector<int64_t> starts;
  const std::vector<Task> tasks = plan(d, lengths, starts);
  const int64_t count = tasks.size(), rows = d.rows(), units = starts.size() - 1;
  const std::unique_ptr<float[]> memory(
      new float[units * rows * d.query_pitch + count * rows * (d.value_pitch + 2) + d.value_pitch]);
  d.query = memory.get();
  d.partial = memory.get() + units * rows * d.query_pitch;
  d.statistics = d.partial + count * rows * d.value_pitch;
  pack_query<T>(d, query, scale, memory.get());
  const Run run = choose<Stored>(lanes);
  const int64_t cost = std::max<int64_t>(rows * kSplit * (d.dim + d.value_dim), 1);
  const auto work = [&](int64_t begin, int64_t end) { run(d, tasks.data(), begin, end); };
  if (count * cost < kSerial) work(0, count);
  else stable::parallel_for(0, count, std::max<int64_t>(1, kSerial / 2 / cost), work);

  // Position `row` of a key head is query row / group of head row % group: out is (batch, heads, queries, value_dim).
  T* to = static_cast<T*>(out.mutable_data_ptr());
  float* sum = d.statistics + count * rows * 2;
  for (int64_t row = 0; row < units * rows; ++row) {
    const int64_t in_head = row % rows, query_row = in_head % d.group * d.queries + in_head / d.group;
    merge(d, starts, sinks, row, sum, to + (row - in_head + query_row) * d.value_dim);
  }
}

int64_t same_type(const Tensor& tensor, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.scalar_type() == query.scalar_type(), name,
                  " must be (batch, kv_heads, capacity, dim) of query's dtype");
  STD_TORCH_CHECK(tensor.size(3) <= 1 || tensor.stride(3) == 1, name, " must be contiguous in its last dimension");
  return tensor.size(3);
}

// query (B, H, Lq, D), k_cache (B, Hk, capacity, D), v_cache (B, Hk, capacity, Dv), cache_seqlens (B,), sinks (H,) float32.
Tensor decode_attention_cpu(Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
                            std::optional<Tensor> sinks, double scale, int64_t left, int64_t lanes) {
  STD_TORCH_CHECK(query.dim() == 4, "query must be (batch, heads, queries, dim)");
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), dim = query.size(3);
  const int64_t key_dim = same_type(k_cache, query, "k_cache"), value_dim = same_type(v_cache, query, "v_cache");
  const int64_t kv_heads = k_cache.size(1), capacity = k_cache.size(2);
  check_shape(k_cache, {batch, kv_heads, capacity, dim}, "k_cache");
  check_shape(v_cache, {batch, kv_heads, capacity, value_dim}, "v_cache");
  const std::vector<int64_t> lengths = read_lengths(cache_seqlens, batch, capacity);
  if (sinks) {
    check_contiguous(*sinks, "sinks");
    check_shape(*sinks, {heads}, "sinks");
    STD_TORCH_CHECK(sinks->scalar_type() == ScalarType::Float, "sinks must be float32");
  }
  Tensor out = stable::new_empty(query, {batch, heads, queries, value_dim});
  if (out.numel() == 0) return out;
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "kv_heads must divide heads");

  Decode d{};
  d.key = k_cache.const_data_ptr(), d.value = v_cache.const_data_ptr();
  for (int i = 0; i < 3; ++i) d.key_strides[i] = k_cache.stride(i), d.value_strides[i] = v_cache.stride(i);
  d.kv_heads = kv_heads, d.group = heads / kv_heads, d.queries = queries, d.left = left;
  d.dim = key_dim, d.query_pitch = padded(dim), d.value_dim = value_dim, d.value_pitch = padded(value_dim);
  const float* sink = sinks ? static_cast<const float*>(sinks->const_data_ptr()) : nullptr;
  const auto factor = static_cast<float>(scale);
  switch (query.scalar_type()) {
    case ScalarType::Float: compute<float, float>(d, query, lengths, sink, factor, lanes, out); break;
    case ScalarType::BFloat16: compute<c10::BFloat16, Bfloat>(d, query, lengths, sink, factor, lanes, out); break;
    case ScalarType::Half: compute<c10::Half, Half>(d, query, lengths, sink, factor, lanes, out); break;
    default: STD_TORCH_CHECK(false, "query must be float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace
}  // namespace fused_ops::decode

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("decode_attention_cpu", TORCH_BOX(&fused_ops::decode::decode_attention_cpu));
}
