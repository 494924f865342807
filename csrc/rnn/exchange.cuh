// How what a block has computed gets to the others of its group, and who waits for whom: the two policies of a recurrent
// kernel. A step is
//
//     wait(step); ... multiply(resident, received(step), stride()) ...; publish(...) for every element; arrive(step);
//
// beginning with publish and arrive for "step -1", the initial state. Values of two steps are kept in turns: a block that
// publishes in step s has waited for all blocks' arrivals after step s - 1, so nobody reads values of s - 2, which lie
// there, any more. One wait a step is enough.
//
// With extras blocks meet more often in a step, between wait and publish: to hand on what W_hr multiplies,
//
//     hand(...) for every element; hand_on(); ... multiply(..., handed(), handed_stride()) ...
//
// or a layer norm's sums of their units: send(...), meet(), sums(...). Of these there is one place for all steps: who
// writes has waited in this step, and so have all others, after they had read what the step before left there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cluster.cuh"
#include "common/sync.cuh"
#include "rnn/resident.cuh"

namespace fused_ops::layers {

// A block's place in its launch: which slice of which group.
struct Partition {
  Work work;
  int units, features, rows, slices, splits;  // as in Share
  int64_t first_group;                        // of this launch
  int64_t groups_of_direction;

  __device__ SharedLayout layout(Design design) const {
    return shared_layout(work, design, {units, features, rows, slices, splits});
  }
};

struct Place {
  int64_t group, first_row;  // of the batch
  int direction, slice, first_unit, first_feature;

  __device__ static Place of(const Partition& p) {
    Place at;
    at.group = p.first_group + blockIdx.x / static_cast<unsigned>(p.slices);
    at.slice = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.slices));
    at.direction = static_cast<int>(at.group / p.groups_of_direction);
    at.first_row = at.group % p.groups_of_direction * p.rows;
    at.first_unit = at.slice * p.units;
    at.first_feature = at.slice * p.features;
    return at;
  }
};

// What a block gives for the product with W_hh: features of h (forward), or slopes of units.
template <Variant VARIANT>
__device__ inline int first_given(const Partition& p, const Place& at) {
  return VARIANT == Variant::projected && p.work.pass == Pass::forward ? at.first_feature : at.first_unit;
}

// Design C. The group's values are in device memory, in two turns of (rows, row_elements), zeros at first: the padding
// stays so.
//
// The barrier is the group's own counter. A block's stores happen before its thread 0's release (__syncthreads, then an
// add that releases); they are known to a thread 0 that has acquired the full count, and by __syncthreads to its block:
// causality order is transitive. So the plain loads that follow must return the new values, although other
// multiprocessors wrote them: an acquire at device scope leaves nothing stale in the first-level cache (PTX ISA, "Memory
// Consistency Model", "Causality order").
template <typename T, Variant VARIANT>
class GridExchange {
 public:
  static constexpr Design kDesign = Design::grid;
  static constexpr Variant kVariant = VARIANT;
  struct Arguments {
    T* values;           // (groups, values_of), zeros
    uint32_t* counters;  // (groups, kCounterStride), zeros
    Sums* sums;          // (groups, 2, slices, rows)
  };
  static constexpr int kCounterStride = 32;  // each in a line of its own
  // Of a group: those of both turns, then those that are handed on to W_hr.
  __host__ __device__ static constexpr int64_t values_of(const Work& work, int64_t rows) {
    const int64_t handed = VARIANT == Variant::projected ? work.projection.row_elements() : 0;
    return rows * (2 * work.product.row_elements() + handed);
  }

  __device__ GridExchange(const Arguments& arguments, const Partition& p, const Place& at, std::byte*)
      : values_(arguments.values + at.group * values_of(p.work, p.rows)),
        counter_(arguments.counters + at.group * kCounterStride),
        stride_(static_cast<int>(p.work.product.row_elements())),
        part_(static_cast<int>(p.work.product.part_columns())),
        rows_(p.rows),
        first_unit_(first_given<VARIANT>(p, at)),
        blocks_(static_cast<uint32_t>(p.slices)) {
    if constexpr (VARIANT != Variant::plain) {
      slice_ = at.slice;
      sums_ = arguments.sums + at.group * 2 * p.slices * p.rows;
    }
    if constexpr (VARIANT == Variant::projected) {
      first_made_ = p.work.pass == Pass::forward ? at.first_unit : at.first_feature;
      handed_stride_ = static_cast<int>(p.work.projection.row_elements());
    }
  }

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

  __device__ void hand(int row, int unit, T value) {
    place(2)[static_cast<int64_t>(row) * handed_stride_ + first_made_ + unit] = value;
  }
  __device__ void hand_on() { meet(); }
  __device__ const T* handed() const { return place(2); }
  __device__ int64_t handed_stride() const { return handed_stride_; }

  // By one warp, for one of two places. All blocks' are known after they have met.
  __device__ void send(int which, int row, Sums sums) {
    if (threadIdx.x % 32 == 0) sums_[(which * static_cast<int>(blocks_) + slice_) * rows_ + row] = sums;
  }
  __device__ void meet() {
    arrive(0);
    wait(0);
  }
  __device__ Sums sums(int which, int slice, int row) const {
    return sums_[(which * static_cast<int>(blocks_) + slice) * rows_ + row];
  }

 private:
  __device__ T* place(int number) const { return values_ + static_cast<int64_t>(number) * rows_ * stride_; }
  __device__ T* turn(int step) const { return place(step & 1); }

  T* values_;
  uint32_t* counter_;
  int stride_, part_, rows_, first_unit_;
  uint32_t blocks_, awaited_ = 0;
  Sums* sums_;
  int handed_stride_, first_made_, slice_;
};

// Design B. Every block has the group's values in its own shared memory, in two turns of (rows, tile_stride): each block
// collects its own in `staging`, then writes them to all of them by 16 bytes. The barrier is the cluster's, whose arrival
// releases and whose wait acquires what each thread wrote. No block exits early: the last values are not published, so
// after its last wait nobody writes to another block.
template <typename T, Variant VARIANT>
class ClusterExchange {
 public:
  static constexpr Design kDesign = Design::cluster;
  static constexpr Variant kVariant = VARIANT;
  struct Arguments {};

  __device__ ClusterExchange(const Arguments&, const Partition& p, const Place& at, std::byte* shared)
      : stride_(static_cast<int>(p.work.product.tile_stride())),
        part_(static_cast<int>(p.work.product.part_columns())),
        parts_(static_cast<int>(p.work.product.parts)),
        rows_(p.rows),
        units_(VARIANT == Variant::projected && p.work.pass == Pass::forward ? p.features : p.units),
        first_unit_(first_given<VARIANT>(p, at)) {
    const SharedLayout layout = p.layout(kDesign);
    tiles_ = reinterpret_cast<T*>(shared + layout.tiles);
    staging_ = reinterpret_cast<T*>(shared + layout.staging);
    clear(tiles_, 2 * rows_ * stride_);
    clear(staging_, rows_ * parts_ * units_);
    if constexpr (VARIANT != Variant::plain) {
      slice_ = at.slice, slices_ = p.slices;
      sums_ = reinterpret_cast<Sums*>(shared + layout.moments);
    }
    if constexpr (VARIANT == Variant::projected) {
      const bool forward = p.work.pass == Pass::forward;
      handed_ = reinterpret_cast<T*>(shared + layout.projected_tile);
      handed_staging_ = reinterpret_cast<T*>(shared + layout.projected_staging);
      handed_stride_ = static_cast<int>(p.work.projection.tile_stride());
      handed_part_ = static_cast<int>(p.work.projection.part_columns());
      made_ = forward ? p.units : p.features, first_made_ = forward ? at.first_unit : at.first_feature;
      clear(handed_, rows_ * handed_stride_);
      clear(handed_staging_, rows_ * made_);
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
    copy(turn(step + 1), stride_, staging_, rows_, parts_, part_, units_, first_unit_);
    cluster_arrive();
  }
  __device__ void wait(int) { cluster_wait(); }

  __device__ void hand(int row, int unit, T value) { handed_staging_[row * made_ + unit] = value; }
  __device__ void hand_on() {
    __syncthreads();
    copy(handed_, handed_stride_, handed_staging_, rows_, 1, handed_part_, made_, first_made_);
    cluster_sync();
  }
  __device__ const T* handed() const { return handed_; }
  __device__ int64_t handed_stride() const { return handed_stride_; }

  __device__ void send(int which, int row, Sums sums) {
    for (int block = static_cast<int>(threadIdx.x % 32); block < slices_; block += 32) {
      *remote(sums_ + (which * slices_ + slice_) * rows_ + row, static_cast<uint32_t>(block)) = sums;
    }
  }
  __device__ void meet() { cluster_sync(); }
  __device__ Sums sums(int which, int slice, int row) const { return sums_[(which * slices_ + slice) * rows_ + row]; }

 private:
  __device__ T* turn(int step) const { return tiles_ + (step & 1) * rows_ * stride_; }

  __device__ static void clear(T* values, int count) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) values[i] = from_float<T>(0.0f);
  }

  // This block's values, (rows, parts, units), to every block's tile of rows `stride` apart.
  __device__ static void copy(T* tile, int stride, const T* staging, int rows, int parts, int part_columns, int units,
                              int first) {
    using Piece = Pack<T, kPiece<T>>;
    const int wide = min(units, part_columns - first) / kPiece<T>, all = rows * parts * wide;
    const auto blocks = static_cast<int>(cluster_size());
    for (int i = static_cast<int>(threadIdx.x); i < all * blocks; i += kThreads) {
      const int piece = i % wide, line = i / wide % (rows * parts), row = line / parts, part = line % parts;
      T* to = tile + row * stride + part * part_columns + first + piece * kPiece<T>;
      const auto from = reinterpret_cast<const Piece*>(staging + line * units + piece * kPiece<T>);
      *reinterpret_cast<Piece*>(remote(to, static_cast<uint32_t>(i / all))) = *from;
    }
  }

  T *tiles_, *staging_;
  int stride_, part_, parts_, rows_, units_, first_unit_;
  T *handed_, *handed_staging_;
  Sums* sums_;
  int handed_stride_, handed_part_, made_, first_made_, slice_, slices_;
};

}  // namespace fused_ops::layers
