// A layer norm's sums over rows whose units are spread over the blocks of a group. A block's warps take its rows in turn,
// sum over the block's own units, send the sums to all blocks, and after these have met every block adds all of them up.
// All orders are those of lanes and blocks, and depend on the partition of the units alone.
//
// The values lie in the block's partial sums (resident.cuh), a unit's own G of a row at [row][g·units + unit].
#pragma once

#include <cstdint>

#include "rnn/exchange.cuh"

namespace fused_ops::layers {

constexpr float kNormEps = 1e-5f;

// Every lane gets the sum of all.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

class RowNorm {
 public:
  // rows: those of the group that are in the batch.
  __device__ RowNorm(const Partition& p, const Place& at, int hidden, int64_t batch, Sums* found)
      : found_(found), hidden_(hidden), units_(p.units), slices_(p.slices), slice_(at.slice) {
    const int64_t left = batch - at.first_row;
    rows_ = left < p.rows ? static_cast<int>(left) : p.rows;
  }

  // Afterwards of(row) = (mean, 1/√(variance + ε)) of a row's per·hidden values: `value(row, place)` of them each, which
  // then stays in `values`, rows of which are `stride` apart. __syncthreads must have come before.
  template <typename Exchange, typename Value>
  __device__ void moments(Exchange& exchange, int which, int per, float* values, int stride, Value value) const {
    const auto lane = static_cast<int>(threadIdx.x % 32);
    const int own = units_of(slice_), count = per * own;
    for_rows([&](int row) {
      float sum = 0.0f, squares = 0.0f;
#pragma unroll 1
      for (int i = lane; i < count; i += 32) {
        const int place = i / own * units_ + i % own;
        const float x = value(row, place);
        values[row * stride + place] = x;
        sum += x;
      }
      const float mean = warp_sum(sum) / static_cast<float>(count);
#pragma unroll 1
      for (int i = lane; i < count; i += 32) {
        const float x = values[row * stride + i / own * units_ + i % own] - mean;
        squares += x * x;
      }
      exchange.send(which, row, {mean, warp_sum(squares)});
    });
    exchange.meet();
    const float all = static_cast<float>(per) * static_cast<float>(hidden_);
    for_rows([&](int row) {
      float sum = 0.0f, squares = 0.0f;
#pragma unroll 1
      for (int slice = lane; slice < slices_; slice += 32) {
        sum += exchange.sums(which, slice, row).first * static_cast<float>(per * units_of(slice));
      }
      const float mean = warp_sum(sum) / all;
#pragma unroll 1
      for (int slice = lane; slice < slices_; slice += 32) {
        const Sums part = exchange.sums(which, slice, row);
        const float apart = part.first - mean;
        squares += part.second + apart * apart * static_cast<float>(per * units_of(slice));
      }
      const float variance = warp_sum(squares) / all;
      if (lane == 0) found_[row] = {mean, 1.0f / sqrtf(variance + kNormEps)};
    });
    __syncthreads();
  }

  // Afterwards of(row) = the means over a row's per·hidden values of two of them, of which first[row·stride + unit] and
  // second[row·stride + unit] hold each unit's sums. The block's __syncthreads must have come before.
  template <typename Exchange>
  __device__ void means(Exchange& exchange, int which, int per, const float* first, const float* second,
                        int stride) const {
    const auto lane = static_cast<int>(threadIdx.x % 32);
    for_rows([&](int row) {
      Sums sums{};
#pragma unroll 1
      for (int unit = lane; unit < units_of(slice_); unit += 32) {
        sums.first += first[row * stride + unit], sums.second += second[row * stride + unit];
      }
      exchange.send(which, row, {warp_sum(sums.first), warp_sum(sums.second)});
    });
    exchange.meet();
    const float all = static_cast<float>(per) * static_cast<float>(hidden_);
    for_rows([&](int row) {
      Sums sums{};
#pragma unroll 1
      for (int slice = lane; slice < slices_; slice += 32) {
        const Sums part = exchange.sums(which, slice, row);
        sums.first += part.first, sums.second += part.second;
      }
      sums = {warp_sum(sums.first) / all, warp_sum(sums.second) / all};
      if (lane == 0) found_[row] = sums;
    });
    __syncthreads();
  }

  __device__ Sums of(int row) const { return found_[row]; }

 private:
  __device__ int units_of(int slice) const { return min(units_, hidden_ - slice * units_); }

  template <typename Visit>
  __device__ void for_rows(Visit visit) const {
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x) / 32; row < rows_; row += kWarps) visit(row);
  }

  Sums* found_;
  int hidden_, units_, slices_, slice_, rows_;
};

}  // namespace fused_ops::layers
