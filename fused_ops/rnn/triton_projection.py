"""x·Wᵀ + bias in float32, each row of it bitwise the same whatever the other rows."""

import triton
import triton.language as tl


@triton.jit
def rnn_project_fwd_kernel(
    p_x, p_w, p_bias, p_out, rows, inputs, outputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = x·Wᵀ + bias; x (rows, inputs), W (outputs, inputs), bias (outputs,) and out in float32. No split of k."""
    across = tl.cdiv(outputs, BLOCK_N)
    o_m = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (tl.program_id(0) % across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < rows, o_n < outputs
    p_x += o_m[:, None] * inputs + o_k[None, :]
    p_w += o_n[None, :] * inputs + o_k[:, None]
    b_out = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_k in tl.range(0, inputs, BLOCK_K):
        m_k = i_k + o_k < inputs
        b_x = tl.load(p_x + i_k, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_w + i_k, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_out = tl.dot(b_x, b_w, b_out, input_precision=PRECISION)
    if p_bias is not None:
        b_out += tl.load(p_bias + o_n, mask=m_n, other=0.0)[None, :]
    tl.store(p_out + o_m[:, None] * outputs + o_n[None, :], b_out, mask=m_m[:, None] & m_n[None, :])
