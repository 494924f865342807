#include "common/shared.cuh"
#include "kernels/harness.h"

using namespace fused_ops;
using namespace fused_ops::test;

__global__ void reverse_kernel(const float* in, float* out, int n, bool waits) {
  SHARED(float, tile, 256);
  tile[threadIdx.x] = in[threadIdx.x];
  if (waits) __syncthreads();
  out[threadIdx.x] = tile[n - 1 - threadIdx.x];
}

FUSED_OPS_TEST reverse(const float* in, int64_t n, float* out, int64_t, int64_t waits) {
  return tell([&] {
    const Array<const float> from(in, n);
    const Array<float> to(out, n);
    launch(reverse_kernel, kOne, dim3(static_cast<unsigned>(n)), kOne, 0, nullptr, from, to, static_cast<int>(n), waits != 0);
  });
}

// Neighbouring bytes are nobody's business but their own thread's.
__global__ void bytes_kernel(const uint8_t* in, uint8_t* out) {
  SHARED(uint8_t, tile, 256);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

FUSED_OPS_TEST bytes(const uint8_t* in, int64_t n, uint8_t* out, int64_t) {
  return tell([&] {
    const Array<const uint8_t> from(in, n);
    const Array<uint8_t> to(out, n);
    launch(bytes_kernel, kOne, dim3(static_cast<unsigned>(n)), kOne, 0, nullptr, from, to);
  });
}
