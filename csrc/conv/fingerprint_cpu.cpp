// fingerprint_cpu: 64 bits that tell whether tensors hold what they held, so that what was made of weights can be kept
// between calls. Version counters would miss writes through .data, numpy and fused optimizers.
//
// The idea is XXH3's inner loop (Collet 2019): eight sums of the products of both halves of the words, each word under
// a key of its place. Pieces of 64 KiB are independent, so threads share them and the result does not depend on how.
//
// Floor: the bytes over the memory's bandwidth.
#include <cstring>
#include <vector>

#include "common/check.h"

namespace fused_ops::fingerprint {
namespace {

namespace stable = torch::stable;

constexpr int64_t PIECE = 64 * 1024, STRIPE = 64, SERIAL = 256 * 1024;  // bytes
constexpr int64_t AHEAD = 4096;                                         // a processor's own prefetch ends with its page
constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15;

inline uint64_t mixed(uint64_t x) {  // the finaliser of SplitMix64 (Steele et al. 2014)
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

struct Sums {
  uint64_t sum[8], key[8];
};

__attribute__((always_inline)) inline void take(Sums& s, const unsigned char* from) {
  uint64_t word[8];
  std::memcpy(word, from, STRIPE);
  for (int i = 0; i < 8; ++i) {
    const uint64_t k = word[i] ^ s.key[i];
    s.sum[i] += static_cast<uint64_t>(static_cast<uint32_t>(k)) * static_cast<uint32_t>(k >> 32) + word[i ^ 1];
    s.key[i] += GOLDEN;
  }
}

__attribute__((always_inline)) inline uint64_t piece(const unsigned char* data, int64_t bytes) {
  Sums s;
  for (int i = 0; i < 8; ++i) s.sum[i] = mixed(bytes + i), s.key[i] = mixed(GOLDEN + i);
  int64_t at = 0;
  for (; at + STRIPE <= bytes; at += STRIPE) {
    __builtin_prefetch(data + at + AHEAD);
    take(s, data + at);
  }
  if (at < bytes) {
    unsigned char rest[STRIPE] = {};
    std::memcpy(rest, data + at, bytes - at);
    take(s, rest);
  }
  uint64_t result = 0;
  for (const uint64_t sum : s.sum) result = mixed(result ^ sum) + GOLDEN;
  return result;
}

using Piece = uint64_t (*)(const unsigned char*, int64_t);
#if defined(__x86_64__)
__attribute__((target("avx512f,avx512dq,avx512vl"))) uint64_t piece_512(const unsigned char* data, int64_t bytes) {
  return piece(data, bytes);
}
__attribute__((target("avx2"))) uint64_t piece_256(const unsigned char* data, int64_t bytes) {
  return piece(data, bytes);
}
#endif
uint64_t piece_any(const unsigned char* data, int64_t bytes) { return piece(data, bytes); }

// `lanes` (words of 32 bits) caps the width, so that tests can run every variant this processor has.
Piece choose(int64_t lanes) {
#if defined(__x86_64__)
  if (lanes >= 16 && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return piece_512;
  if (lanes >= 8 && __builtin_cpu_supports("avx2")) return piece_256;
#endif
  return piece_any;
}

// Of the tensors' memory as it lies; none may have gaps in it.
int64_t fingerprint(const std::vector<Tensor>& tensors, int64_t lanes) {
  struct Part {
    const unsigned char* data;
    int64_t bytes;
  };
  std::vector<Part> parts;
  int64_t all = 0;
  for (const Tensor& tensor : tensors) {
    const auto* data = static_cast<const unsigned char*>(tensor.const_data_ptr());
    const int64_t bytes = tensor.numel() * tensor.element_size();
    for (int64_t at = 0; at < bytes; at += PIECE) parts.push_back({data + at, std::min(PIECE, bytes - at)});
    all += bytes;
  }
  const Piece hash = choose(lanes);
  const int64_t count = parts.size();
  std::vector<uint64_t> found(count);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) found[i] = hash(parts[i].data, parts[i].bytes);
  };
  if (all < SERIAL) run(0, count);
  else stable::parallel_for(0, count, 1, run);
  uint64_t result = all;
  for (const uint64_t part : found) result = mixed(result ^ part) + GOLDEN;
  return static_cast<int64_t>(result);
}

}  // namespace
}  // namespace fused_ops::fingerprint

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CPU, m) {
  m.impl("fingerprint_cpu", TORCH_BOX(&fused_ops::fingerprint::fingerprint));
}
