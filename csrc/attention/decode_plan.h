// How many blocks share one sequence's keys in the decode kernel.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fused_ops {

struct DecodePlan {
  int64_t splits;
  int64_t keys_per_split;
};

constexpr int64_t kDecodeTile = 64;        // keys a block handles per step
constexpr int64_t kDecodeBlocksPerSM = 2;  // co-resident blocks the grid is filled to
constexpr int64_t kDecodeMaxSplits = 256;

// Keys each of `splits` blocks takes of a sequence of `length` keys, in whole tiles; the last ones may be left with none.
// The kernel asks this for the length it finds on the device, so short sequences in a long cache use every block too.
constexpr int64_t decode_keys_per_split(int64_t length, int64_t splits) {
  const int64_t keys = (length + splits - 1) / splits;
  return (keys + kDecodeTile - 1) / kDecodeTile * kDecodeTile;
}

// Decode is bound by reading the cache once, so every multiprocessor must take part, and none much longer than the
// others: the fewest splits that minimise waves of blocks × (tiles per block + one tile's worth of start and merge).
inline DecodePlan plan_decode(int64_t batch, int64_t kv_heads, int64_t capacity, int64_t multiprocessors) {
  const int64_t rows = std::max<int64_t>(batch * kv_heads, 1);
  const int64_t tiles = std::max<int64_t>((capacity + kDecodeTile - 1) / kDecodeTile, 1);
  const int64_t slots = kDecodeBlocksPerSM * std::max<int64_t>(multiprocessors, 1);
  int64_t best = 1, best_time = INT64_MAX;
  for (int64_t splits = 1; splits <= std::min(tiles, kDecodeMaxSplits); ++splits) {
    const int64_t waves = (rows * splits + slots - 1) / slots;
    const int64_t time = waves * ((tiles + splits - 1) / splits + 1);
    if (time < best_time) best = splits, best_time = time;
  }
  return {best, decode_keys_per_split(tiles * kDecodeTile, best)};
}

}  // namespace fused_ops
