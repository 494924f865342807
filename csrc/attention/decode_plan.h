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

// Decode is bound by reading the cache once, so every multiprocessor must take part: split until the grid fills the
// chip, but never below one tile of keys per block.
inline DecodePlan plan_decode(int64_t batch, int64_t kv_heads, int64_t capacity, int64_t multiprocessors) {
  const int64_t rows = std::max<int64_t>(batch * kv_heads, 1);
  const int64_t tiles = std::max<int64_t>((capacity + kDecodeTile - 1) / kDecodeTile, 1);
  const int64_t wanted = (kDecodeBlocksPerSM * multiprocessors + rows - 1) / rows;
  const int64_t tiles_per_split = (tiles + std::min(wanted, tiles) - 1) / std::min(wanted, tiles);
  return {(tiles + tiles_per_split - 1) / tiles_per_split, tiles_per_split * kDecodeTile};
}

}  // namespace fused_ops
