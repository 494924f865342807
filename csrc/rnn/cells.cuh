// The pointwise half of the RNN cells: gates to new state in one pass.
//
// The idea: gi = W_ih·x + b_ih and gh = W_hh·h + b_hh come from cuBLAS; what is left reads each gate once and writes each
// state once. A thread owns N neighbouring units of one row, so every access is one N-wide load (16 bytes where the hidden
// size allows), and the gates of a unit meet in registers: no shared memory, nobody waits for anybody. Maths in float32.
//
// Bytes per unit: GRU 3 + 3 gates, h and h'; LSTM 4 + 4 gates, c, c' and h'. About 25 flops a gate: the memory decides.
// Floor at B = 64, H = 1024 in bf16, GRU: 1.05 MB, 0.25 us at 4.3 TB/s: the launch dominates.
#pragma once

#include <cstdint>

#include "common/convert.cuh"

namespace fused_ops::cells {

template <typename T, int N>
struct Unit {
  float v[N];

  __device__ static Unit load(const T* from) {
    const auto pack = *reinterpret_cast<const Pack<T, N>*>(from);
    Unit unit;
#pragma unroll
    for (int i = 0; i < N; ++i) unit.v[i] = to_float(pack.values[i]);
    return unit;
  }

  __device__ void store(T* to) const {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.values[i] = from_float<T>(v[i]);
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  }
};

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Where this thread's units are: false past the end. units = hidden / N.
struct Place {
  int64_t row, unit;

  __device__ static bool find(int64_t rows, int64_t units, Place& place) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    place = {index / units, index % units};
    return index < rows * units;
  }
};

// h' = f(gi + gh).
template <typename T, int N, bool RELU>
__global__ void rnn_cell_fwd_kernel(const T* gi, const T* gh, T* out, int64_t rows, int64_t hidden) {
  Place at;
  if (!Place::find(rows, hidden / N, at)) return;
  const int64_t state = at.row * hidden + at.unit * N;
  auto h = Unit<T, N>::load(gi + state);
  const auto recurrent = Unit<T, N>::load(gh + state);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float sum = h.v[i] + recurrent.v[i];
    h.v[i] = RELU ? (sum < 0.0f ? 0.0f : sum) : tanhf(sum);
  }
  h.store(out + state);
}

// r, z = sigmoid(gi + gh), n = tanh(gi + r·gh), h' = n + z·(h - n). Cho et al. 2014, reset after the product.
template <typename T, int N>
__global__ void gru_cell_fwd_kernel(const T* gi, const T* gh, const T* h, T* out, int64_t rows, int64_t hidden) {
  Place at;
  if (!Place::find(rows, hidden / N, at)) return;
  const int64_t state = at.row * hidden + at.unit * N, gate = at.row * 3 * hidden + at.unit * N;
  const auto r_i = Unit<T, N>::load(gi + gate), r_h = Unit<T, N>::load(gh + gate);
  const auto z_i = Unit<T, N>::load(gi + gate + hidden), z_h = Unit<T, N>::load(gh + gate + hidden);
  const auto n_i = Unit<T, N>::load(gi + gate + 2 * hidden), n_h = Unit<T, N>::load(gh + gate + 2 * hidden);
  auto now = Unit<T, N>::load(h + state);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float n = tanhf(n_i.v[i] + sigmoid(r_i.v[i] + r_h.v[i]) * n_h.v[i]);
    now.v[i] = n + sigmoid(z_i.v[i] + z_h.v[i]) * (now.v[i] - n);
  }
  now.store(out + state);
}

// i, f, o = sigmoid(gi + gh), g = tanh(gi + gh), c' = f·c + i·g, h' = o·tanh(c'). Gers et al. 2000.
template <typename T, int N>
__global__ void lstm_cell_fwd_kernel(const T* gi, const T* gh, const T* c, T* out_h, T* out_c, int64_t rows,
                                     int64_t hidden) {
  Place at;
  if (!Place::find(rows, hidden / N, at)) return;
  const int64_t state = at.row * hidden + at.unit * N, gate = at.row * 4 * hidden + at.unit * N;
  Unit<T, N> sums[4];
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    sums[g] = Unit<T, N>::load(gi + gate + g * hidden);
    const auto recurrent = Unit<T, N>::load(gh + gate + g * hidden);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[g].v[i] += recurrent.v[i];
  }
  auto cell = Unit<T, N>::load(c + state);
  Unit<T, N> h;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    cell.v[i] = sigmoid(sums[1].v[i]) * cell.v[i] + sigmoid(sums[0].v[i]) * tanhf(sums[2].v[i]);
    h.v[i] = sigmoid(sums[3].v[i]) * tanhf(cell.v[i]);
  }
  cell.store(out_c + state);
  h.store(out_h + state);
}

}  // namespace fused_ops::cells
