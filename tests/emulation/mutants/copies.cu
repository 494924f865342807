// Asynchronous copies that are not waited for, land later than thought, or reach where they must not.
#include "common/async_copy.cuh"
#include "mutants/mutant.h"

KERNEL(missing_wait) {
  SHARED(float, tile, 64);
  cp_async<4>(tile + threadIdx.x, in + threadIdx.x);  // missing_wait
  cp_async_commit();
  if (!kFault) cp_async_wait<0>();
  out[threadIdx.x] = tile[threadIdx.x];  // missing_wait
  cp_async_wait<0>();
}
MUTANT(missing_wait, 1, 64, 0)

KERNEL(wait_for_too_few) {
  SHARED(float, tile, 2 * 64);
  for (uint32_t i = 0; i < 2; ++i) {
    cp_async<4>(tile + i * 64 + threadIdx.x, in + i * 64 + threadIdx.x);  // wait_for_too_few
    cp_async_commit();
  }
  if (kFault) cp_async_wait<1>();
  else cp_async_wait<0>();
  out[threadIdx.x] = tile[64 + threadIdx.x];  // wait_for_too_few
}
MUTANT(wait_for_too_few, 1, 64, 0)

KERNEL(missing_commit) {
  SHARED(float, tile, 64);
  cp_async<4>(tile + threadIdx.x, in + threadIdx.x);  // missing_commit
  if (!kFault) cp_async_commit();
  cp_async_wait<0>();
  out[threadIdx.x] = tile[threadIdx.x];  // missing_commit
}
MUTANT(missing_commit, 1, 64, 0)

// Each thread has waited for its own copies alone.
KERNEL(missing_barrier_after_wait) {
  SHARED(float, tile, 64);
  tile[threadIdx.x] = 0;
  __syncthreads();
  cp_async<4>(tile + threadIdx.x, in + threadIdx.x);  // missing_barrier_after_wait
  cp_async_wait_all();
  if (!kFault) __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];  // missing_barrier_after_wait
}
MUTANT(missing_barrier_after_wait, 1, 64, 0)

KERNEL(never_waited) {
  SHARED(float, tile, 64);
  cp_async<4>(tile + threadIdx.x, in + threadIdx.x);  // never_waited
  cp_async_commit();
  if (!kFault) cp_async_wait_all();
  out[threadIdx.x] = 1;
}
MUTANT(never_waited, 1, 64, 0)

KERNEL(reused_too_early) {
  SHARED(float, tile, 64);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float value = tile[63 - threadIdx.x];  // reused_too_early
  if (!kFault) __syncthreads();
  cp_async<4>(tile + threadIdx.x, in + 64 + threadIdx.x);  // reused_too_early
  cp_async_wait_all();
  out[threadIdx.x] = value + tile[threadIdx.x];
}
MUTANT(reused_too_early, 1, 64, 0)

KERNEL(misaligned_source) {
  SHARED(float4, tile, 16);
  cp_async<16>(tile + threadIdx.x, in + threadIdx.x * 4 + (kFault ? 2 : 0));  // misaligned_source
  cp_async_wait_all();
  out[threadIdx.x] = tile[threadIdx.x].x;
}
MUTANT(misaligned_source, 1, 16, 0)

KERNEL(misaligned_destination) {
  SHARED(float4, tile, 17);
  cp_async<16>(reinterpret_cast<float*>(tile + threadIdx.x) + (kFault ? 1 : 0), in + threadIdx.x * 4);  // misaligned_destination
  cp_async_wait_all();
  out[threadIdx.x] = tile[threadIdx.x].x;
}
MUTANT(misaligned_destination, 1, 16, 0)

KERNEL(past_the_source) {
  SHARED(float4, tile, 64);
  const int left = (n - static_cast<int>(threadIdx.x) * 4) * 4;
  const auto bytes = static_cast<uint32_t>(left < 0 ? 0 : left < 16 ? left : 16);
  cp_async<16>(tile + threadIdx.x, in + threadIdx.x * 4, kFault ? 16 : bytes);  // past_the_source
  cp_async_wait_all();
  out[threadIdx.x] = tile[threadIdx.x].x;
}
MUTANT(past_the_source, 1, 33, 0)

KERNEL(past_the_destination) {
  float* tile = dynamic_shared<float>();
  cp_async<4>(tile + threadIdx.x + (kFault ? 1 : 0), in + threadIdx.x);  // past_the_destination
  cp_async_wait_all();
  if (!kFault) out[threadIdx.x] = tile[threadIdx.x];
}
MUTANT(past_the_destination, 1, 64, 64 * sizeof(float))

KERNEL(to_device_memory) {
  SHARED(float, tile, 64);
  cp_async<4>(kFault ? out + threadIdx.x : tile + threadIdx.x, in + threadIdx.x);  // to_device_memory
  cp_async_wait_all();
  if (!kFault) out[threadIdx.x] = tile[threadIdx.x];
}
MUTANT(to_device_memory, 1, 64, 0)

// A source that changes while it is copied: the copy may see it either way, and here it sees the change.
KERNEL(late_source) {
  SHARED(float, tile, 64);
  out[threadIdx.x] = 1;
  cp_async<4>(tile + threadIdx.x, out + threadIdx.x);
  cp_async_commit();
  if (!kFault) cp_async_wait<0>();
  out[threadIdx.x] = 2;
  cp_async_wait<0>();
  out[threadIdx.x] = tile[threadIdx.x];
}
MUTANT(late_source, 1, 64, 0)
