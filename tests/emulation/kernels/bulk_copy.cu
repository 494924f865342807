#include "common/bulk_copy.cuh"

#include <algorithm>

#include "common/cluster.cuh"
#include "common/shared.cuh"
#include "kernels/harness.h"

using namespace fused_ops;
using namespace fused_ops::test;

// out = in + 1 by tiles of `tile` floats, two stages deep: copied in, changed in place, copied out.
__global__ void add_one_kernel(const float* in, float* out, int n, int tile) {
  float* stages = dynamic_shared<float>();
  SHARED(Mbarrier, full, 2);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1), mbarrier_init(full + 1, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  const auto load = [&](int turn) {
    const int stage = turn % 2, count = min(tile, n - turn * tile);
    if (threadIdx.x != 0 || count <= 0) return;
    const auto bytes = static_cast<unsigned>(count) * 4;
    mbarrier_arrive_expect_tx(full + stage, bytes);
    bulk_load(stages + stage * tile, in + turn * tile, bytes, full + stage);
  };
  load(0);
  for (int turn = 0; turn * tile < n; ++turn) {
    const int stage = turn % 2, count = min(tile, n - turn * tile);
    if (threadIdx.x == 0) bulk_wait_read<0>();  // the next stage has been read
    load(turn + 1);
    mbarrier_wait(full + stage, static_cast<unsigned>(turn / 2 % 2));
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      stages[stage * tile + i] += 1;
    }
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      bulk_store(out + turn * tile, stages + stage * tile, static_cast<unsigned>(count) * 4);
      bulk_commit();
    }
  }
  if (threadIdx.x == 0) bulk_wait<0>();
}

FUSED_OPS_TEST add_one(const float* in, int64_t n, float* out, int64_t m, int64_t tile) {
  return tell([&] {
    const Array<const float> from(in, n);
    const Array<float> to(out, m);
    launch(add_one_kernel, kOne, dim3(64), kOne, static_cast<size_t>(tile) * 8, nullptr, from, to, static_cast<int>(n),
           static_cast<int>(tile));
  });
}

struct Coordinates {
  int of[5];
};

template <typename T, int kRank>
__device__ void copy_box(const TensorMap& map, const T* in, T* out, int count, Coordinates at, bool load) {
  T* tile = dynamic_shared<T>();
  SHARED(Mbarrier, full, 1);
  int start[kRank];
  for (int i = 0; i < kRank; ++i) start[i] = at.of[i];
  if (load) {
    if (threadIdx.x == 0) {
      mbarrier_init(full, 1);
      fence_mbarrier_init();
      mbarrier_arrive_expect_tx(full, static_cast<unsigned>(count) * sizeof(T));
      prefetch_tensor_map(map);
      tensor_load(tile, map, full, start);
    }
    __syncthreads();
    mbarrier_wait(full, 0);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += 32) out[i] = tile[i];
  } else {
    const int words = count * static_cast<int>(sizeof(T)) / 4;
    for (int i = static_cast<int>(threadIdx.x); i < words; i += 32) {
      reinterpret_cast<uint32_t*>(tile)[i] = reinterpret_cast<const uint32_t*>(in)[i];
    }
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    tensor_store(map, tile, start);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

// Load: out = the box of the tensor `map` at `at`, as shared memory holds it. Store: that box = in.
template <typename T, int kRank>
__global__ void box_kernel(const __grid_constant__ TensorMap map, const T* in, T* out, int count, Coordinates at,
                           bool load) {
  copy_box<T, kRank>(map, in, out, count, at, load);
}

template <typename T, size_t kRank>
void launch_box(const T* tensor, const T* in, T* out, int64_t count, const int64_t* spec, bool load) {
  std::array<uint64_t, kRank> sizes;
  std::array<uint64_t, kRank - 1> strides;
  std::array<uint32_t, kRank> box, steps;
  Coordinates at{};
  for (size_t i = 0; i < kRank; ++i) {
    sizes[i] = static_cast<uint64_t>(spec[i]), box[i] = static_cast<uint32_t>(spec[10 + i]);
    steps[i] = static_cast<uint32_t>(spec[15 + i]), at.of[i] = static_cast<int>(spec[20 + i]);
    if (i > 0) strides[i - 1] = static_cast<uint64_t>(spec[5 + i]) * sizeof(T);
  }
  const auto map = make_tensor_map<T, kRank>(tensor, sizes, strides, box, static_cast<Swizzle>(spec[25]),
                                             static_cast<Fill>(spec[26]), steps);
  launch(box_kernel<T, kRank>, kOne, dim3(32), kOne, static_cast<size_t>(count) * sizeof(T), nullptr, map, in, out,
         static_cast<int>(count), at, load);
}

template <typename T>
void launch_box(const T* tensor, const T* in, T* out, int64_t count, int64_t rank, const int64_t* spec, bool load) {
  if (rank == 1) launch_box<T, 1>(tensor, in, out, count, spec, load);
  if (rank == 2) launch_box<T, 2>(tensor, in, out, count, spec, load);
  if (rank == 3) launch_box<T, 3>(tensor, in, out, count, spec, load);
  if (rank == 4) launch_box<T, 4>(tensor, in, out, count, spec, load);
  if (rank == 5) launch_box<T, 5>(tensor, in, out, count, spec, load);
}

#define BOX(name, T)                                                                                                 \
  FUSED_OPS_TEST load_##name(const T* tensor, int64_t n, T* out, int64_t m, const int64_t* spec, int64_t,            \
                             int64_t rank) {                                                                        \
    return tell([&] {                                                                                                \
      const Array<const T> from(tensor, n);                                                                          \
      const Array<T> to(out, m);                                                                                     \
      launch_box<T>(from, nullptr, to, m, rank, spec, true);                                                         \
    });                                                                                                              \
  }                                                                                                                  \
  FUSED_OPS_TEST store_##name(const T* in, int64_t n, T* tensor, int64_t m, const int64_t* spec, int64_t,            \
                              int64_t rank) {                                                                       \
    return tell([&] {                                                                                                \
      const Array<const T> from(in, n);                                                                              \
      const Array<T> to(tensor, m);                                                                                  \
      launch_box<T>(to, from, nullptr, n, rank, spec, false);                                                        \
    });                                                                                                              \
  }
BOX(float, float)
BOX(half, __half)
BOX(bfloat, __nv_bfloat16)
BOX(byte, uint8_t)
BOX(int, int32_t)

// Each block of a cluster loads its share of a row and sends it to all: out[block] = the whole row.
__global__ void multicast_kernel(const __grid_constant__ TensorMap map, const float* in, float* out, int share,
                                 bool tensor) {
  float* row = dynamic_shared<float>();
  SHARED(Mbarrier, full, 1);
  const auto rank = static_cast<int>(cluster_rank()), size = static_cast<int>(cluster_size());
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full, static_cast<unsigned>(share * size) * 4);
  }
  cluster_arrive_relaxed();
  cluster_wait();
  if (threadIdx.x == 0) {
    const auto all = static_cast<uint16_t>((1 << size) - 1);
    if (tensor) tensor_load_multicast(row + rank * share, map, full, {rank * share}, all);
    else bulk_load_multicast(row + rank * share, in + rank * share, static_cast<unsigned>(share) * 4, full, all);
  }
  mbarrier_wait(full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < share * size; i += 32) out[rank * share * size + i] = row[i];
}

FUSED_OPS_TEST multicast(const float* in, int64_t n, float* out, int64_t m, int64_t cluster, int64_t tensor) {
  return tell([&] {
    const Array<const float> from(in, n);
    const Array<float> to(out, m);
    const auto share = static_cast<uint32_t>(n / cluster);
    const auto map = make_tensor_map<float, 1>(from, {static_cast<uint64_t>(n)}, {}, {share});
    const dim3 blocks(static_cast<unsigned>(cluster));
    launch(multicast_kernel, blocks, dim3(32), blocks, static_cast<size_t>(n) * 4, nullptr, map, from, to,
           static_cast<int>(share), tensor != 0);
  });
}
