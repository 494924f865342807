// How a layer's recurrence is spread over a chip: designs, partition, bytes. Plain functions: bound as _host.plan_rnn_layer.
//
// A block keeps `outputs`·units rows of a matrix (the forward: W_hh's rows of all gates of its units; the backward: W_hh's
// columns, transposed) of `parts`·hidden elements in shared memory for the whole sequence, and serves `rows` rows of the
// batch. The blocks of a group hold all units between them and exchange `parts` values per row and unit in every step:
//   cluster  a group is a thread-block cluster; values go into the other blocks' shared memory. Groups never meet, so
//            there may be more of them than the chip holds at once.
//   grid     values go through L2; all blocks of a launch are alive together, one on a multiprocessor. What does not fit
//            into one launch goes into the next.
// A layer that projects its state has W_hr beside it, whose values are exchanged in turn; one with a layer norm exchanges
// each row's sums over a block's units.
//
// Which design serves, and in how many splits a product is summed, depends on the layer and the chip alone: a row's result
// is the same in any batch. How many units and rows a block has may depend on the batch, which changes no sum; with a
// layer norm, whose sums are a block's units', the rows alone may.
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
// Kernels are compiled apart for layers with extras (mask, zoneout, layer norm), and with a projected state beside.
enum class Variant : uint8_t { plain, extra, projected };

struct Chip {
  int64_t multiprocessors, shared_bytes;  // shared memory one block may have
  int64_t capability;                     // 90 for 9.0
};

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// The shape of a pass's products with one matrix.
struct Product {
  int64_t outputs, parts;  // rows of the resident matrix per unit that a block makes; exchanged values per unit it takes
  int64_t width;           // units that it takes
  int64_t element_bytes;

  // Part p of unit u is column p·part_columns + u of the resident matrix and of an exchanged row, whose parts start at
  // multiples of 16 bytes. What is between and after them is zeros.
  constexpr int64_t part_columns() const { return round_up(width, kPieceBytes / element_bytes); }
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

// What decides how a layer runs, beside the batch. features: of h, `hidden` or those that an LSTM projects it to.
struct Shape {
  Kind kind;
  int64_t hidden, features, element_bytes;
  bool projects, has_norm;
};

// One pass of a layer. With W_hh a block makes the gates of its units (forward) or dL/dh of its features (backward); with
// W_hr, where there is one, its features or its units.
struct Work {
  Pass pass;
  bool projects, has_norm;
  int64_t hidden, features;
  Product product, projection;
};

constexpr Work work_of(const Shape& shape, Pass pass) {
  const int64_t gates = gates_of(shape.kind), bytes = shape.element_bytes;
  Work work{pass, shape.projects, shape.has_norm, shape.hidden, shape.features, {}, {}};
  if (pass == Pass::forward) {
    work.product = {gates, 1, shape.features, bytes}, work.projection = {1, 1, shape.hidden, bytes};
  } else {
    work.product = {1, gates, shape.hidden, bytes}, work.projection = {1, 1, shape.features, bytes};
  }
  return work;
}

// A block's share of a group's work. It makes the values of `made` units or features with W_hh and gives the others those
// of `given`, of the other kind; W_hr makes `given` of all that was made.
struct Share {
  int64_t units = 0;     // the last block's may be fewer
  int64_t features = 0;  // of h; where nothing is projected, its units
  int64_t rows = 0;      // of a group: 8, 16 or 32; the last one's may be fewer
  int64_t slices = 0;    // blocks of a group (and cluster)
  int64_t splits = 0;    // warps that share a sum; the others share the rows

  constexpr int64_t made(Pass pass) const { return pass == Pass::forward ? units : features; }
  constexpr int64_t given(Pass pass) const { return pass == Pass::forward ? features : units; }
};

// Two sums of a row.
struct alignas(8) Sums {
  float first, second;
};

// Where a block's shared memory is, in bytes; what is not there (a grid's tiles) has no bytes.
struct SharedLayout {
  int64_t resident, partial, tiles, staging;
  int64_t projection, projected_tile, projected_staging;  // W_hr's
  int64_t moments, found;                                 // a layer norm's sums: (2, slices, rows), (rows,)
  int64_t total;
  int64_t partial_stride;  // floats
};
constexpr SharedLayout shared_layout(const Work& work, Design design, const Share& share) {
  const bool tiled = design == Design::cluster;
  const Product &product = work.product, &projection = work.projection;
  const int64_t made = share.made(work.pass), given = share.given(work.pass), rows = share.rows;
  SharedLayout at{};
  at.partial_stride = product.partial_stride(made);
  int64_t slots = share.splits;
  if (work.projects) at.partial_stride = std::max(at.partial_stride, projection.partial_stride(given));
  if (work.has_norm) slots = std::max<int64_t>(slots, 2);
  at.partial = product.resident_bytes(made);
  at.tiles = at.partial + slots * rows * at.partial_stride * 4;
  at.staging = at.tiles + (tiled ? 2 * rows * product.tile_stride() * product.element_bytes : 0);
  at.projection = at.staging + (tiled ? rows * product.parts * given * product.element_bytes : 0);
  at.projected_tile = at.projection + (work.projects ? projection.resident_bytes(given) : 0);
  at.projected_staging = at.projected_tile;
  at.moments = at.projected_tile;
  if (work.projects && tiled) {
    at.projected_staging += rows * projection.tile_stride() * projection.element_bytes;
    at.moments = at.projected_staging + rows * made * projection.element_bytes;
  }
  at.found = at.moments + (work.has_norm && tiled ? 2 * share.slices * rows * sizeof(Sums) : 0);
  at.total = at.found + (work.has_norm ? rows * sizeof(Sums) : 0);
  return at;
}

struct LayerPlan : Share {
  Design design = Design::none;
  int64_t groups = 0;        // of all directions; those of direction 0 come first
  int64_t at_once = 0;       // of them, in one launch
  int64_t shared_bytes = 0;  // of a block
  int64_t blocks = 0;        // of the largest launch

  constexpr int64_t launches() const { return groups == 0 ? 0 : ceil_div(groups, at_once); }
};

namespace detail {

constexpr int64_t at_most_power_of_two(int64_t n) {
  int64_t power = 1;
  while (2 * power <= n) power *= 2;
  return power;
}

inline bool fits(const Work& work, Design design, const Share& share, const Chip& chip) {
  return shared_layout(work, design, share).total <= chip.shared_bytes &&
         std::max(share.units, share.features) * share.rows <= kElements * kThreads;
}

// Of a block's step with one matrix, in cycles: reading the matrix and passing partial sums on (128 bytes a cycle),
// reading what the others sent (`from_others` bytes a cycle), the state. Leads; no measurement stands behind them yet.
inline int64_t product_cycles(const Product& product, int64_t units, const Share& share, int64_t from_others) {
  const int64_t row_bytes = product.chunks() * kChunkBytes;
  const int64_t resident = product.resident_bytes(units) / 128;
  const int64_t partial = 2 * share.splits * share.rows * product.partial_stride(units) * 4 / 128;
  const int64_t received = kWarps / share.splits * share.rows * row_bytes / from_others;
  return resident + partial + received + 60 * ceil_div(units * share.rows, kThreads);
}

inline int64_t step_cycles(const Work& work, const Share& share, int64_t from_others) {
  const int64_t own = product_cycles(work.product, share.made(work.pass), share, from_others);
  return own + (work.projects ? product_cycles(work.projection, share.given(work.pass), share, from_others) : 0);
}

// Features of a block, of which there are `units` units.
inline int64_t features_of(const Work& work, const Share& share) {
  return work.projects ? ceil_div(work.features, share.slices) : share.units;
}

// At most `largest` blocks hold all units, in whole 16 bytes of an exchanged row each.
inline LayerPlan plan_cluster(const Work& work, int64_t batch, int64_t directions, const Chip& chip,
                              int64_t largest) {
  LayerPlan plan;
  const int64_t piece = kPieceBytes / work.product.element_bytes;
  plan.units = round_up(ceil_div(work.hidden, largest), piece);
  plan.slices = ceil_div(work.hidden, plan.units);
  plan.features = round_up(features_of(work, plan), piece);
  plan.rows = 8;
  Share tried = plan;
  int64_t least = INT64_MAX;
  for (tried.splits = 1; tried.splits <= std::min<int64_t>(kWarps, work.product.chunks()); tried.splits *= 2) {
    if (!fits(work, Design::cluster, tried, chip)) break;
    const int64_t made = tried.made(work.pass), shares = kWarps / tried.splits;
    const int64_t tiles = ceil_div(work.product.strips(made), 2);
    const int64_t cycles = step_cycles(work, tried, 128) +
                           16 * ceil_div(tiles, shares) * ceil_div(work.product.chunks(), tried.splits);
    if (cycles < least) least = cycles, plan.splits = tried.splits;
  }
  if (plan.splits == 0) return {};
  // The fewest rows that fill no more than the chip; a row's time hardly depends on how many share it.
  for (; 2 * plan.rows <= kLargestRows; plan.rows *= 2) {
    const bool roomy = directions * ceil_div(batch, plan.rows) * plan.slices <= chip.multiprocessors;
    Share more = plan;
    more.rows *= 2;
    if (roomy || !fits(work, Design::cluster, more, chip)) break;
  }
  plan.design = Design::cluster;
  plan.groups = plan.at_once = directions * ceil_div(batch, plan.rows);
  plan.shared_bytes = shared_layout(work, Design::cluster, plan).total;
  plan.blocks = plan.groups * plan.slices;
  return plan;
}

// The quickest of all partitions that the chip holds at once, or of those with `wanted` units a block. Sums are split
// over all warps, but for a matrix so large that 16 rows' partial sums would not fit beside it.
inline LayerPlan plan_grid(const Work& work, int64_t batch, int64_t directions, const Chip& chip, int64_t wanted = 0) {
  LayerPlan best;
  int64_t least = INT64_MAX;
  Share share{ceil_div(work.hidden, chip.multiprocessors), 0, 16, chip.multiprocessors};
  share.features = features_of(work, share);
  share.splits = std::min<int64_t>(kWarps, at_most_power_of_two(work.product.chunks()));
  while (share.splits > 1 && shared_layout(work, Design::grid, share).total > chip.shared_bytes) share.splits /= 2;
  for (share.rows = 8; share.rows <= kLargestRows; share.rows *= 2) {
    if (share.rows > 8 && share.rows >= 2 * batch) break;
    const int64_t most = std::min(work.hidden, kElements * kThreads / share.rows);
    for (share.units = most; share.units > 0; --share.units) {
      if (wanted > 0 && share.units != wanted) continue;
      share.slices = ceil_div(work.hidden, share.units);
      share.features = features_of(work, share);
      const int64_t at_once = chip.multiprocessors / share.slices;
      if (at_once == 0) break;
      if (!fits(work, Design::grid, share, chip)) continue;
      const int64_t groups = directions * ceil_div(batch, share.rows);
      const int64_t waits = 1 + work.projects + work.has_norm;
      const int64_t step = waits * (2000 + share.slices) + step_cycles(work, share, 32);
      const int64_t cycles = step * ceil_div(std::max<int64_t>(groups, 1), at_once);
      if (cycles >= least) continue;
      least = cycles;
      const int64_t bytes = shared_layout(work, Design::grid, share).total;
      best = {share, Design::grid, groups, std::min(groups, at_once), bytes, std::min(groups, at_once) * share.slices};
    }
  }
  return best;
}

}  // namespace detail

inline LayerPlan plan_rnn_layer(const Shape& shape, Pass pass, int64_t batch, int64_t directions, const Chip& chip) {
  if (shape.hidden <= 0 || shape.features <= 0 || batch < 0 || chip.capability < 80) return {};
  const Work work = work_of(shape, pass);
  if (chip.capability >= 90) {
    for (const int64_t largest : {8, 16}) {
      const LayerPlan plan = detail::plan_cluster(work, batch, directions, chip, largest);
      if (plan.design != Design::none) return plan;
    }
  }
  const int64_t units = shape.has_norm ? detail::plan_grid(work, 1, 1, chip).units : 0;
  if (shape.has_norm && units == 0) return {};
  return detail::plan_grid(work, batch, directions, chip, units);
}

}  // namespace fused_ops::layers
