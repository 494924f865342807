// How what a block has computed gets to the others of its group, and who waits for whom: the two policies of a recurrent
// kernel. A step is
//
//     wait(step); ... multiply(resident, received(step), stride()) ...; publish(...) for every element; arrive(step);
//
// beginning with publish and arrive for "step -1", the initial state. Values of two steps are kept in turns: a block that
// publishes in step s has waited for all blocks' arrivals after step s - 1, so nobody reads values of s - 2, which lie
// there, any more. One wait a step is enough.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cluster.cuh"
#include "common/sync.cuh"
#include "rnn/resident.cuh"

namespace fused_ops::layers {

// A block's place in its launch: which slice of which group.
struct Partition {
  Product product;
  int units, rows, slices, splits;  // as in LayerPlan
  int64_t first_group;              // of this launch
  int64_t groups_of_direction;
};

struct Place {
  int64_t group, first_row;  // of the batch
  int direction, slice, first_unit;

  __device__ static Place of(const Partition& p) {
    Place at;
    at.group = p.first_group + blockIdx.x / static_cast<unsigned>(p.slices);
    at.slice = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.slices));
    at.direction = static_cast<int>(at.group / p.groups_of_direction);
    at.first_row = at.group % p.groups_of_direction * p.rows;
    at.first_unit = at.slice * p.units;
    return at;
  }
};

// Design C. The group's values are in device memory, in two turns of (rows, row_elements), zeros at first: the padding
// stays so.
//
// The barrier is the group's own counter. A block's stores happen before its thread 0's release (__syncthreads, then an
// add that releases); they are known to a thread 0 that has acquired the full count, and by __syncthreads to its block:
// causality order is transitive. So the plain loads that follow must return the new values, although other
// multiprocessors wrote them: an acquire at device scope leaves nothing stale in the first-level cache (PTX ISA, "Memory
// Consistency Model", "Causality order").
template <typename T>
class GridExchange {
 public:
  static constexpr Design kDesign = Design::grid;
  struct Arguments {
    T* values;           // (groups, 2, rows, row_elements), zeros
    uint32_t* counters;  // (groups, kCounterStride), zeros
  };
  static constexpr int kCounterStride = 32;  // each in a line of its own

  __device__ GridExchange(const Arguments& arguments, const Partition& p, const Place& at, std::byte*)
      : values_(arguments.values + at.group * 2 * p.rows * p.product.row_elements()),
        counter_(arguments.counters + at.group * kCounterStride),
        stride_(static_cast<int>(p.product.row_elements())),
        part_(static_cast<int>(p.product.part_columns())),
        rows_(p.rows),
        first_unit_(at.first_unit),
        blocks_(static_cast<uint32_t>(p.slices)) {}

  __device__ const T* received(int step) const { return turn(step); }
  __device__ int64_t stride() const { return stride_; }

  // The block's unit `unit` (from 0, below hidden) of row `row` has this value, as `operand` wants it, in step + 1.
  __device__ void publish(int step, int row, int unit, int part, T value) {
    turn(step + 1)[static_cast<int64_t>(row) * stride_ + part * part_ + first_unit_ + unit] = value;
  }
  __device__ void arrive(int) {
    __syncthreads();
    if (threadIdx.x == 0) atomic_add<Scope::device>(counter_, 1u);
    awaited_ += blocks_;
  }
  __device__ void wait(int) {
    if (threadIdx.x == 0) {
      wait_until([&] { return static_cast<int32_t>(load_acquire<Scope::device>(counter_) - awaited_) >= 0; });
    }
    __syncthreads();
  }

 private:
  __device__ T* turn(int step) const { return values_ + static_cast<int64_t>(step & 1) * rows_ * stride_; }

  T* values_;
  uint32_t* counter_;
  int stride_, part_, rows_, first_unit_;
  uint32_t blocks_, awaited_ = 0;
};

// Design B. Every block has the group's values in its own shared memory, in two turns of (rows, tile_stride): each block
// collects its own in `staging`, then writes them to all of them by 16 bytes. The barrier is the cluster's, whose arrival
// releases and whose wait acquires what each thread wrote. No block exits early: the last values are not published, so
// after its last wait nobody writes to another block.
template <typename T>
class ClusterExchange {
 public:
  static constexpr Design kDesign = Design::cluster;
  struct Arguments {};

  __device__ ClusterExchange(const Arguments&, const Partition& p, const Place& at, std::byte* shared)
      : stride_(static_cast<int>(p.product.tile_stride())),
        part_(static_cast<int>(p.product.part_columns())),
        parts_(static_cast<int>(p.product.parts)),
        rows_(p.rows),
        units_(p.units),
        first_unit_(at.first_unit) {
    const SharedLayout layout = shared_layout(p.product, kDesign, p.units, p.rows, p.splits);
    tiles_ = reinterpret_cast<T*>(shared + layout.tiles);
    staging_ = reinterpret_cast<T*>(shared + layout.staging);
    for (int i = static_cast<int>(threadIdx.x); i < 2 * rows_ * stride_; i += kThreads) tiles_[i] = from_float<T>(0.0f);
    for (int i = static_cast<int>(threadIdx.x); i < rows_ * parts_ * units_; i += kThreads) {
      staging_[i] = from_float<T>(0.0f);
    }
    cluster_sync();  // all blocks run, and their tiles are zeros
  }

  __device__ const T* received(int step) const { return turn(step); }
  __device__ int64_t stride() const { return stride_; }

  __device__ void publish(int, int row, int unit, int part, T value) {
    staging_[(row * parts_ + part) * units_ + unit] = value;
  }
  __device__ void arrive(int step) {
    __syncthreads();
    using Piece = Pack<T, kPiece<T>>;
    const int wide = min(units_, part_ - first_unit_) / kPiece<T>, all = rows_ * parts_ * wide;
    const auto blocks = static_cast<int>(cluster_size());
    for (int i = static_cast<int>(threadIdx.x); i < all * blocks; i += kThreads) {
      const int piece = i % wide, line = i / wide % (rows_ * parts_), row = line / parts_, part = line % parts_;
      T* to = turn(step + 1) + row * stride_ + part * part_ + first_unit_ + piece * kPiece<T>;
      const auto from = reinterpret_cast<const Piece*>(staging_ + line * units_ + piece * kPiece<T>);
      *reinterpret_cast<Piece*>(remote(to, static_cast<uint32_t>(i / all))) = *from;
    }
    cluster_arrive();
  }
  __device__ void wait(int) { cluster_wait(); }

 private:
  __device__ T* turn(int step) const { return tiles_ + (step & 1) * rows_ * stride_; }

  T *tiles_, *staging_;
  int stride_, part_, parts_, rows_, units_, first_unit_;
};

}  // namespace fused_ops::layers
