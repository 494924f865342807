// 3x3 convolution of stride 1, float32, channels_last, by Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2016,
// section 4.1): a 2x2 tile of the output is A^T [(G g G^T) * (B^T d B)] A, 16 products in place of 36.
//
// 3 vectors of output channels make a panel: their filters, transformed, 16 matrices of C x 48. Threads make the panels
// together; each then transforms blocks of tiles, small enough for its own cache, multiplies a block's 16 matrices by a
// panel's, and finishes it at once. 32KCT flops for T tiles over (C + K)P + 9KC floats, bound by the FMA units.
//
// Sums are a ninth as long as a direct convolution's: errors are no larger. Differences of infinities, and sums past the
// largest float, are not what the definition gives: such a tile is computed again by it.
#pragma once

#include <vector>

#include "conv/panels_cpu.h"

namespace fused_ops::conv {

struct Winograd {
  const float *input, *weight, *scale, *shift, *residual;  // the last three may be null
  float* output;
  int64_t batch, height, width, channels, out_height, out_width, out_channels;
  int64_t top, left;  // padding
  bool taps_last;     // weight is (K, C, 3, 3) in memory, else (K, 3, 3, C)
  int64_t activation;

  int64_t rows() const { return (out_height + 1) / 2; }
  int64_t columns() const { return (out_width + 1) / 2; }
  int64_t tiles() const { return batch * rows() * columns(); }
  // Floats from one of a panel's 16 matrices to the next, `width` wide: not a power of 2, which is one place in a cache.
  int64_t filter_pitch(int64_t width) const { return channels * width + 16; }
  int64_t floats(int64_t lanes) const { return 16 * filter_pitch(lanes * kLastVectors); }  // of a panel
  int64_t filter(int64_t k, int64_t c, int64_t tap) const {
    return taps_last ? (k * channels + c) * 9 + tap : (k * 9 + tap) * channels + c;
  }
};

constexpr int64_t kWinogradFilters = 1280 * 1024, kWinogradTiles = 64 * 1024;  // floats of what is made together
constexpr int64_t kAhead = 32;  // floats; filters are read in 9N rows at once, more than a processor fetches ahead itself

// The image and the first row and column of the i-th tile of the output.
struct Tile {
  int64_t image, y, x;
  Tile(const Winograd& p, int64_t i)
      : image(i / (p.rows() * p.columns())), y(i / p.columns() % p.rows() * 2), x(i % p.columns() * 2) {}
};

// G g: (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
template <int N>
FUSED_OPS_INLINE void transform_filter(const Vector<N>* g, int64_t step, Vector<N>* u, int64_t pitch) {
  const Vector<N> sum = (g[0] + g[2 * step]) * 0.5f, middle = g[step] * 0.5f;
  u[0] = g[0], u[pitch] = sum + middle, u[2 * pitch] = sum - middle, u[3 * pitch] = g[2 * step];
}

// B^T d: (d0 - d2, d1 + d2, d2 - d1, d1 - d3)
template <int N>
FUSED_OPS_INLINE void transform_input(Vector<N>* d, int64_t step) {
  const Vector<N> d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
  d[0] = d0 - d2, d[step] = d1 + d2, d[2 * step] = d2 - d1, d[3 * step] = d1 - d3;
}

// Filters [k, k + lanes) of channels [c, c + count): rows of a filter a lane, 0 past `lanes`. Row (channel, tap) is at
// 9 channel + tap, or at N tap + channel, as the weight has them.
template <int N>
FUSED_OPS_INLINE void gather_filters(const Winograd& p, int64_t k, int64_t lanes, int64_t c, int64_t count,
                                     Vector<N> (&block)[9 * N]) {
  if (lanes == N && count == N) {
    for (int64_t part = 0; part < 9; ++part) {
      Vector<N>(&rows)[N] = *reinterpret_cast<Vector<N>(*)[N]>(block + part * N);
      const float* from = p.weight + (p.taps_last ? p.filter(k, c, 0) + part * N : p.filter(k, c, part));
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        load<N>(rows[i], from + i * 9 * p.channels);
        __builtin_prefetch(from + i * 9 * p.channels + kAhead);
      }
      transpose<N>(rows);
    }
    return;
  }
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      Vector<N>& row = block[p.taps_last ? 9 * n + tap : N * tap + n];
      for (int64_t lane = 0; lane < N; ++lane) row[lane] = lane < lanes ? p.weight[p.filter(k + lane, c + n, tap)] : 0.0f;
    }
  }
}

// The filters of a panel's vector as columns of its 16 matrices, which have a row a channel.
template <int N>
FUSED_OPS_INLINE void make_filters(const Winograd& p, const Panel& panel, int64_t vector, float* made) {
  const int64_t tap = p.taps_last ? 1 : N, channel = p.taps_last ? 9 : 1;
  const int64_t begin = vector * N, lanes = std::min<int64_t>(N, panel.count - begin);
  const int64_t width = panel.vectors * N, pitch = p.filter_pitch(width);
  for (int64_t c = 0; c < p.channels; c += N) {
    const int64_t channels = std::min<int64_t>(N, p.channels - c);
    Vector<N> block[9 * N];
    gather_filters<N>(p, panel.begin + begin, lanes, c, channels, block);
    for (int64_t n = 0; n < channels; ++n) {
      Vector<N> half[12], whole[16];
      for (int i = 0; i < 3; ++i) transform_filter<N>(block + n * channel + i * 3 * tap, tap, half + i * 4, 1);
      for (int i = 0; i < 4; ++i) transform_filter<N>(half + i, 4, whole + i, 4);
      for (int i = 0; i < 16; ++i) store<N>(made + i * pitch + (c + n) * width + begin, whole[i]);
    }
  }
}

// Tiles [begin, end) of the input as 16 matrices, `pitch` floats apart: a row a tile, a column a channel.
template <int N>
FUSED_OPS_INLINE void make_tiles(const Winograd& p, int64_t begin, int64_t end, const float* zeros, int64_t pitch,
                                 float* made) {
  for (int64_t i = begin; i < end; ++i, made += p.channels) {
    const Tile tile(p, i);
    const float* from[16];
    for (int j = 0; j < 16; ++j) {
      const int64_t y = tile.y - p.top + j / 4, x = tile.x - p.left + j % 4;
      const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
      from[j] = inside ? p.input + ((tile.image * p.height + y) * p.width + x) * p.channels : zeros;
    }
    for (int64_t c = 0; c < p.channels; c += N) {
      const int64_t lanes = std::min<int64_t>(N, p.channels - c);
      Vector<N> d[16];
      for (int j = 0; j < 16; ++j) load_some<N>(d[j], from[j] + c, lanes);
      for (int j = 0; j < 4; ++j) transform_input<N>(d + j * 4, 1);
      for (int j = 0; j < 4; ++j) transform_input<N>(d + j, 4);
      for (int j = 0; j < 16; ++j) store_some<N>(made + j * pitch + c, d[j], lanes);
    }
  }
}

// sums = a matrix of tiles * a matrix of filters; blocks of ROWS tiles, then of half as many.
template <int N, int ROWS, int VECTORS>
FUSED_OPS_INLINE void multiply(int64_t count, int64_t channels, const float* tiles, const float* panel, float* sums) {
  for (; count >= ROWS; count -= ROWS, tiles += ROWS * channels, sums += ROWS * N * VECTORS) {
    Vector<N> sum[ROWS][VECTORS] = {};
    const float* x[ROWS];
    for (int r = 0; r < ROWS; ++r) x[r] = tiles + r * channels;
    accumulate<N, ROWS, VECTORS>(sum, x, channels, panel);
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) store<N>(sums + (r * VECTORS + v) * N, sum[r][v]);
  }
  if constexpr (ROWS > 1) multiply<N, ROWS / 2, VECTORS>(count, channels, tiles, panel, sums);
}

// One output by the definition.
inline float defined(const Winograd& p, const Tile& tile, int64_t y, int64_t x, int64_t k) {
  float sum = 0.0f;
  for (int64_t tap = 0; tap < 9; ++tap) {
    const int64_t row = tile.y + y - p.top + tap / 3, column = tile.x + x - p.left + tap % 3;
    if (row < 0 || row >= p.height || column < 0 || column >= p.width) continue;
    const float* pixel = p.input + ((tile.image * p.height + row) * p.width + column) * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) sum += pixel[c] * p.weight[p.filter(k, c, tap)];
  }
  return sum;
}

template <int N>
FUSED_OPS_INLINE bool finite(const Vector<N>& y) {
  const Vector<N> zero = y * 0.0f;
  bool all = true;
  for (int i = 0; i < N; ++i) all &= zero[i] == 0.0f;
  return all;
}

// Output channels [k, k + lanes) of a tile from their 16 products, `pitch` floats apart. `spoilt` becomes NaN in the lanes
// of those that are not finite; `anew`: they are computed by the definition.
template <int N>
FUSED_OPS_INLINE void finish(const Winograd& p, const Tile& tile, int64_t k, int64_t lanes, const float* sums,
                             int64_t pitch, bool anew, Vector<N>& spoilt) {
  Vector<N> m[16], half[8], y[4], scale = Vector<N>{} + 1.0f, shift = {};
  for (int i = 0; i < 16; ++i) load<N>(m[i], sums + i * pitch);
  for (int i = 0; i < 4; ++i) half[i] = m[i] + m[4 + i] + m[8 + i], half[4 + i] = m[4 + i] - m[8 + i] - m[12 + i];
  for (int i = 0; i < 2; ++i) {
    const Vector<N>* row = half + i * 4;
    y[2 * i] = row[0] + row[1] + row[2], y[2 * i + 1] = row[1] - row[2] - row[3];
  }
  if (p.scale) load_some<N>(scale, p.scale + k, lanes);
  if (p.shift) load_some<N>(shift, p.shift + k, lanes);
  for (int i = 0; i < 4; ++i) {
    const int64_t row = tile.y + i / 2, column = tile.x + i % 2;
    if (row >= p.out_height || column >= p.out_width) continue;
    spoilt += y[i] * 0.0f;
    if (anew && !finite<N>(y[i]))
      for (int64_t lane = 0; lane < lanes; ++lane) y[i][lane] = defined(p, tile, i / 2, i % 2, k + lane);
    const int64_t at = ((tile.image * p.out_height + row) * p.out_width + column) * p.out_channels + k;
    y[i] = y[i] * scale + shift;
    if (p.residual) {
      Vector<N> other;
      load_some<N>(other, p.residual + at, lanes);
      y[i] += other;
    }
    activate<N>(y[i], p.activation);
    store_some<N>(p.output + at, y[i], lanes);
  }
}

// Tiles [begin, end), transformed, with a panel's filters, transformed.
template <int N, int ROWS, int VECTORS>
FUSED_OPS_INLINE void winograd_block(const Winograd& p, int64_t begin, int64_t end, const Panel& panel,
                                     const float* tiles, int64_t tiles_pitch, const float* filters, float* sums) {
  constexpr int64_t kWidth = N * VECTORS;
  const int64_t pitch = (end - begin) * kWidth + N;
  for (int i = 0; i < 16; ++i)
    multiply<N, ROWS, VECTORS>(end - begin, p.channels, tiles + i * tiles_pitch, filters + i * p.filter_pitch(kWidth),
                               sums + i * pitch);
  for (const bool anew : {false, true}) {
    Vector<N> spoilt = {};
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile(p, i);
      for (int v = 0; v < VECTORS; ++v)
        finish<N>(p, tile, panel.begin + v * N, std::min<int64_t>(N, panel.count - v * N),
                  sums + (i - begin) * kWidth + v * N, pitch, anew, spoilt);
    }
    if (finite<N>(spoilt)) return;
  }
}

// Vectors [begin, end) of output channels, in panels [first, last).
template <int N>
FUSED_OPS_INLINE void winograd_filters(const Winograd& p, int64_t first, int64_t last, int64_t begin, int64_t end,
                                       float* filters) {
  for (int64_t i = first; i < last; ++i) {
    const Panel panel(i, p.out_channels, N);
    const int64_t before = panel.begin / N, stop = std::min(end - before, panel.vectors);
    for (int64_t v = std::max<int64_t>(begin - before, 0); v < stop; ++v)
      make_filters<N>(p, panel, v, filters + (i - first) * p.floats(N));
  }
}

// Tasks [begin, end) of a plan for panels [first, last), which are in `filters`, and all tiles.
template <int N, int ROWS>
FUSED_OPS_INLINE void winograd_tasks(const Winograd& p, const LastPlan& plan, int64_t first, int64_t last,
                                     const float* filters, int64_t begin, int64_t end) {
  const int64_t together = std::max<int64_t>(2 * ROWS, kWinogradTiles / (16 * p.channels + 1) / ROWS * ROWS);
  const int64_t pitch = together * p.channels + N;
  float* const tiles = workspace<struct Tiles>(16 * (pitch + together * N * kLastVectors + N));
  float* const sums = tiles + 16 * pitch;
  const std::vector<float> zeros(p.channels);
  for (int64_t task = begin; task < end; ++task) {
    const auto [from, to] = plan.panels(task, last - first);
    const auto [tile, stop] = plan.pixels(task, p.tiles());
    for (int64_t at = tile; at < stop; at += together) {
      const int64_t past = std::min(at + together, stop);
      make_tiles<N>(p, at, past, zeros.data(), pitch, tiles);
      for (int64_t i = from; i < to; ++i) {
        const Panel panel(first + i, p.out_channels, N);
        const float* made = filters + i * p.floats(N);
        if (panel.vectors == 3) winograd_block<N, ROWS, 3>(p, at, past, panel, tiles, pitch, made, sums);
        else if (panel.vectors == 2) winograd_block<N, ROWS, 2>(p, at, past, panel, tiles, pitch, made, sums);
        else winograd_block<N, ROWS, 1>(p, at, past, panel, tiles, pitch, made, sums);
      }
    }
  }
}

}  // namespace fused_ops::conv
