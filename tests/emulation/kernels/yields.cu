// Nothing but switches from thread to thread: what tests/emulation/speed.py counts.
#include "kernels/harness.h"

using namespace fused_ops;
using namespace fused_ops::test;

__global__ void yields_kernel(int times) {
  for (int i = 0; i < times; ++i) __nanosleep(0);
}
__global__ void barriers_kernel(int times) {
  for (int i = 0; i < times; ++i) __syncthreads();
}
__global__ void shuffles_kernel(float* out, int times) {
  float value = static_cast<float>(threadIdx.x);
  for (int i = 0; i < times; ++i) value += __shfl_xor_sync(0xffffffffu, value, 1);
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

FUSED_OPS_TEST yields(int64_t times, int64_t threads, int64_t blocks) {
  return tell([&] {
    launch(yields_kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), kOne, 0, nullptr,
           static_cast<int>(times));
  });
}
FUSED_OPS_TEST barriers(int64_t times, int64_t threads, int64_t blocks) {
  return tell([&] {
    launch(barriers_kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), kOne, 0, nullptr,
           static_cast<int>(times));
  });
}
FUSED_OPS_TEST shuffles(float* out, int64_t n, int64_t times, int64_t threads, int64_t blocks) {
  return tell([&] {
    const Array<float> to(out, n);
    launch(shuffles_kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), kOne, 0, nullptr, to,
           static_cast<int>(times));
  });
}
