"""Kernels that are wrong in one way each: what the gate must catch."""

import triton
import triton.language as tl

# Without input_precision, tl.dot is TF32 on a GPU, and the interpreter hides it.
LOOSE_DOT = """
import triton.language as tl
from triton.language import dot
def loose(b_q, b_k):
    b_s = tl.dot(b_q, b_k)
    b_s += triton.language.dot(b_q, b_k, b_s)
    b_s += dot(b_q, b_k)
    return b_s + tl.dot(b_q, b_k, input_precision="ieee")
"""

AUTOTUNED = """
import triton
@triton.autotune(configs=[triton.Config({}, num_warps=w) for w in (4, 8)], key=["n"])
@triton.jit
def tuned_kernel(p_x, n): pass
tuned_kernel[lambda meta: (1,)](x, 3)
"""

# What the emulator of CUDA kernels cannot follow, one a line, and what it can.
UNFOLLOWED_CUDA = """
#include "common/launch.h"
__global__ void wrong(const float* in, float* out) {
  __shared__ float tile[32];  // a comment may say __shared__, asm and memcpy
  asm volatile("bar.sync 0;");
#ifdef __CUDACC__
  memcpy(tile, in, sizeof tile);
  #if 1
  while (*static_cast<volatile const float*>(in) == 0.0f) {}
}
void launch_wrong(const Tensor& in, const Tensor& out) {
  wrong<<<1, 32>>>(in.const_data_ptr<float>(), static_cast<float*>(out.data_ptr()));
  cudaMemcpyAsync(nullptr, nullptr, 0, cudaMemcpyDefault, nullptr); /* <<<
  asm */
}
STABLE_TORCH_LIBRARY_IMPL(fused_ops, CUDA, m) {}
"""

# 160 live values per thread where two blocks of 1024 leave 32 registers.
SPILLING_CUDA = """
__global__ void __launch_bounds__(1024, 2) spilling(float* x) {
  float v[160];
#pragma unroll
  for (int i = 0; i < 160; ++i) v[i] = x[i * 2048 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 160; ++i) x[i * 2048 + threadIdx.x] = v[159 - i] * v[i];
}
"""

OVERSIZED_CUDA = """
__global__ void oversized(float* x) {
  __shared__ float tile[64 * 1024];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = tile[threadIdx.x ^ 1];
}
"""

MODEST_CUDA = """
__global__ void modest(float* x) {
  __shared__ float tile[256];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = tile[threadIdx.x ^ 1];
}
"""


@triton.jit
def matmul_kernel(p_a, p_b, p_c, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c = a · b of one tile: right, and too much for a chip when its blocks are."""
    o_m, o_n, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    p_a += o_m[:, None] * k + o_k[None, :]
    p_b += o_k[:, None] * BLOCK_N + o_n[None, :]
    b_c = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for _ in tl.range(0, k, BLOCK_K):
        b_c = tl.dot(tl.load(p_a), tl.load(p_b), b_c, input_precision="ieee")
        p_a += BLOCK_K
        p_b += BLOCK_K * BLOCK_N
    tl.store(p_c + o_m[:, None] * BLOCK_N + o_n[None, :], b_c)


def matmul_case(m: int, n: int, k: int, warps: int, stages: int) -> tuple:
    """As an entry of `gate_cases`, in float16."""
    signature = {"p_a": "*fp16", "p_b": "*fp16", "p_c": "*fp32", "k": "i32"}
    constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return f"matmul {m}x{n}x{k}", matmul_kernel, signature, constants, warps, stages
