// How a layer's recurrence is spread over a chip: designs, partition, bytes. Plain functions: bound as _host.plan_rnn_layer.
//
// A block keeps `outputs`·units rows of a matrix (the forward: W_hh's rows of all gates of its units; the backward: W_hh's
// columns, transposed) of `parts`·hidden elements in shared memory for the whole sequence, and serves `rows` rows of the
// batch. The blocks of a group hold all units between them and exchange `parts` values per row and unit in every step:
//   cluster  a group is a thread-block cluster; values go into the other blocks' shared memory. Groups never meet, so
//            there may be more of them than the chip holds at once.
//   grid     values go through L2; all blocks of a launch are alive together, one on a multiprocessor. What does not fit
//            into one launch goes into the next.
// Which design serves, and in how many splits a product is summed, depends on kind, hidden, dtype and chip alone: a row's
// result is the same in any batch. How many units and rows a block has may depend on the batch, which changes no sum.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "rnn/layer.h"

namespace fused_ops::layers {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStrip = 8;        // rows of the resident matrix that lie together
constexpr int kChunkBytes = 64;  // of each of them
constexpr int kPieceBytes = 16;  // what a lane holds of a row's chunk
constexpr int kElements = 2;     // (row, unit) pairs a thread has the state of
constexpr int kLargestRows = 32;

enum class Design : uint8_t { none, grid, cluster };
enum class Pass : uint8_t { forward, backward };

struct Chip {
  int64_t multiprocessors, shared_bytes;  // shared memory one block may have
  int64_t capability;                     // 90 for 9.0
};

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// The shape of the products of one pass of one kind.
struct Product {
  int64_t outputs, parts;  // per unit: rows of the resident matrix, exchanged values
  int64_t hidden, element_bytes;

  // Part p of unit u is column p·part_columns + u of the resident matrix and of an exchanged row, whose parts start at
  // multiples of 16 bytes. What is between and after them is zeros.
  constexpr int64_t part_columns() const { return round_up(hidden, kPieceBytes / element_bytes); }
  constexpr int64_t columns() const { return parts * part_columns(); }
  constexpr int64_t chunks() const { return ceil_div(columns() * element_bytes, kChunkBytes); }
  constexpr int64_t row_elements() const { return chunks() * kChunkBytes / element_bytes; }
  // Of a row in shared memory: with an odd number of chunks, two rows lie in different banks.
  constexpr int64_t tile_stride() const { return (chunks() | 1) * kChunkBytes / element_bytes; }
  constexpr int64_t strips(int64_t units) const { return ceil_div(outputs * units, kStrip); }
  constexpr int64_t resident_bytes(int64_t units) const { return outputs * units * chunks() * kChunkBytes; }
  // Floats between two rows of partial sums: an odd multiple of 4, so that a warp's stores meet no bank twice.
  constexpr int64_t partial_stride(int64_t units) const { return strips(units) * kStrip + 4; }
};

constexpr Product product_of(Kind kind, Pass pass, int64_t hidden, int64_t element_bytes) {
  const int64_t gates = gates_of(kind);
  return pass == Pass::forward ? Product{gates, 1, hidden, element_bytes} : Product{1, gates, hidden, element_bytes};
}

// Where a block's shared memory is, in bytes; what is not there (a grid's tiles) has no bytes.
struct SharedLayout {
  int64_t resident, partial, tiles, staging, total;
};
constexpr SharedLayout shared_layout(const Product& product, Design design, int64_t units, int64_t rows,
                                     int64_t splits) {
  const bool tiled = design == Design::cluster;
  const int64_t resident = product.resident_bytes(units);
  const int64_t partial = splits * rows * product.partial_stride(units) * 4;
  const int64_t tiles = tiled ? 2 * rows * product.tile_stride() * product.element_bytes : 0;
  const int64_t staging = tiled ? rows * product.parts * units * product.element_bytes : 0;
  return {0, resident, resident + partial, resident + partial + tiles, resident + partial + tiles + staging};
}

struct LayerPlan {
  Design design = Design::none;
  int64_t units = 0;         // of a block; the last one's may be fewer
  int64_t rows = 0;          // of a group: 8, 16 or 32; the last one's may be fewer
  int64_t slices = 0;        // blocks of a group (and cluster)
  int64_t groups = 0;        // of all directions; those of direction 0 come first
  int64_t at_once = 0;       // of them, in one launch
  int64_t splits = 0;        // warps that share a sum; the others share the rows
  int64_t shared_bytes = 0;  // of a block
  int64_t blocks = 0;        // of the largest launch

  constexpr int64_t launches() const { return groups == 0 ? 0 : ceil_div(groups, at_once); }
};

namespace detail {

// Of a block's step, in cycles: reading the matrix and passing partial sums on (128 bytes a cycle), reading what the
// others sent (`from_others` bytes a cycle), the state. Leads; no measurement stands behind them yet.
inline int64_t step_cycles(const Product& product, int64_t units, int64_t rows, int64_t splits, int64_t from_others) {
  const int64_t row_bytes = product.chunks() * kChunkBytes;
  const int64_t resident = product.resident_bytes(units) / 128;
  const int64_t partial = 2 * splits * rows * product.partial_stride(units) * 4 / 128;
  const int64_t received = kWarps / splits * rows * row_bytes / from_others;
  return resident + partial + received + 60 * ceil_div(units * rows, kThreads);
}

inline int64_t at_most_power_of_two(int64_t n) {
  int64_t power = 1;
  while (2 * power <= n) power *= 2;
  return power;
}

// At most `largest` blocks hold all units, in whole 16 bytes of an exchanged row each.
inline LayerPlan plan_cluster(const Product& product, int64_t batch, int64_t directions, const Chip& chip,
                              int64_t largest) {
  LayerPlan plan;
  plan.units = round_up(ceil_div(product.hidden, largest), kPieceBytes / product.element_bytes);
  plan.slices = ceil_div(product.hidden, plan.units);
  const auto bytes = [&](int64_t rows, int64_t splits) {
    return shared_layout(product, Design::cluster, plan.units, rows, splits).total;
  };
  int64_t least = INT64_MAX;
  for (int64_t splits = 1; splits <= std::min<int64_t>(kWarps, product.chunks()); splits *= 2) {
    if (bytes(8, splits) > chip.shared_bytes) break;
    const int64_t tiles = ceil_div(product.strips(plan.units), 2), shares = kWarps / splits;
    const int64_t cycles = step_cycles(product, plan.units, 8, splits, 128) +
                           16 * ceil_div(tiles, shares) * ceil_div(product.chunks(), splits);
    if (cycles < least) least = cycles, plan.splits = splits;
  }
  if (plan.splits == 0) return {};
  // The fewest rows that fill no more than the chip; a row's time hardly depends on how many share it.
  for (plan.rows = 8; 2 * plan.rows <= kLargestRows; plan.rows *= 2) {
    const bool roomy = directions * ceil_div(batch, plan.rows) * plan.slices <= chip.multiprocessors;
    const int64_t more = 2 * plan.rows;
    if (roomy || bytes(more, plan.splits) > chip.shared_bytes || more * plan.units > kElements * kThreads) break;
  }
  if (plan.rows * plan.units > kElements * kThreads) return {};
  plan.design = Design::cluster;
  plan.groups = plan.at_once = directions * ceil_div(batch, plan.rows);
  plan.shared_bytes = bytes(plan.rows, plan.splits);
  plan.blocks = plan.groups * plan.slices;
  return plan;
}

// The quickest of all partitions that the chip holds at once. Sums are split over all warps, but for a matrix so large
// that 16 rows' partial sums would not fit beside it.
inline LayerPlan plan_grid(const Product& product, int64_t batch, int64_t directions, const Chip& chip) {
  LayerPlan best;
  int64_t least = INT64_MAX;
  const int64_t fewest = ceil_div(product.hidden, chip.multiprocessors);
  int64_t splits = std::min<int64_t>(kWarps, at_most_power_of_two(product.chunks()));
  while (splits > 1 && shared_layout(product, Design::grid, fewest, 16, splits).total > chip.shared_bytes) splits /= 2;
  for (int64_t rows = 8; rows <= kLargestRows; rows *= 2) {
    if (rows > 8 && rows >= 2 * batch) break;
    const int64_t most = std::min(product.hidden, kElements * kThreads / rows);
    for (int64_t units = most; units > 0; --units) {
      const int64_t slices = ceil_div(product.hidden, units);
      const int64_t at_once = chip.multiprocessors / slices;
      if (at_once == 0) break;
      const int64_t bytes = shared_layout(product, Design::grid, units, rows, splits).total;
      if (bytes > chip.shared_bytes) continue;
      const int64_t groups = directions * ceil_div(batch, rows);
      const int64_t step = 2000 + slices + step_cycles(product, units, rows, splits, 32);
      const int64_t cycles = step * ceil_div(std::max<int64_t>(groups, 1), at_once);
      if (cycles >= least) continue;
      least = cycles;
      best = {Design::grid, units, rows, slices, groups, std::min(groups, at_once), splits, bytes};
      best.blocks = best.at_once * slices;
    }
  }
  return best;
}

}  // namespace detail

inline LayerPlan plan_rnn_layer(Kind kind, Pass pass, int64_t hidden, int64_t batch, int64_t directions,
                                int64_t element_bytes, const Chip& chip) {
  const Product product = product_of(kind, pass, hidden, element_bytes);
  if (hidden <= 0 || batch < 0 || chip.capability < 80) return {};
  if (chip.capability >= 90) {
    for (const int64_t largest : {8, 16}) {
      const LayerPlan plan = detail::plan_cluster(product, batch, directions, chip, largest);
      if (plan.design != Design::none) return plan;
    }
  }
  return detail::plan_grid(product, batch, directions, chip);
}

}  // namespace fused_ops::layers
