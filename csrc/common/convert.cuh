// Conversions between storage types and the float the kernels compute in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fused_ops {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half(x); }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16(x); }

// N consecutive elements moved as one aligned access.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack { T values[N]; };

}  // namespace fused_ops
