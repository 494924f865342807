"""Flash attention forward in Triton: dense, causal (either alignment), grouped heads, head dim up to 256."""

import torch
import triton
import triton.language as tl

from fused_ops.core.device import capability
from fused_ops.core.precision import matmul_dot_precision

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    b_acc, b_max, b_sum, b_q, p_k, p_v, o_row, o_col, o_dim,
    stride_kn, stride_vn, keys, diagonal, scale_log2, start, stop,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys start … stop into the running (accumulator, maximum, sum); IS_MASKED: some of them may be out of sight."""
    p_k += start * tl.cast(stride_kn, tl.int64)
    p_v += start * tl.cast(stride_vn, tl.int64)
    o_k = o_dim[:, None] + o_col[None, :] * stride_kn
    o_v = o_col[:, None] * stride_vn + o_dim[None, :]
    m_dim = o_dim < HEAD_DIM
    for i_n in tl.range(start, stop, BLOCK_N):
        m_col = i_n + o_col < keys
        if IS_MASKED:
            b_k = tl.load(p_k + o_k, mask=m_dim[:, None] & m_col[None, :], other=0.0)
        elif HEAD_DIM < BLOCK_D:
            b_k = tl.load(p_k + o_k, mask=m_dim[:, None], other=0.0)
        else:
            b_k = tl.load(p_k + o_k)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
        if IS_MASKED:
            m_seen = m_col[None, :]
            if IS_CAUSAL:
                m_seen = m_seen & (i_n + o_col[None, :] <= o_row[:, None] + diagonal)
            b_s = tl.where(m_seen, b_s * scale_log2, -float("inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_top = tl.where(b_new == -float("inf"), 0.0, b_new)  # a row that has seen no key yet
            b_p = tl.exp2(b_s - b_top[:, None])
        else:
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
            b_top = b_new
            b_p = tl.exp2(b_s * scale_log2 - b_top[:, None])
        b_decay = tl.exp2(b_max - b_top)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = b_acc * b_decay[:, None]
        b_max = b_new
        if IS_MASKED:
            b_v = tl.load(p_v + o_v, mask=m_col[:, None] & m_dim[None, :], other=0.0)
        elif HEAD_DIM < BLOCK_D:
            b_v = tl.load(p_v + o_v, mask=m_dim[None, :], other=0.0)
        else:
            b_v = tl.load(p_v + o_v)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
        p_k += BLOCK_N * tl.cast(stride_kn, tl.int64)
        p_v += BLOCK_N * tl.cast(stride_vn, tl.int64)
    return b_acc, b_max, b_sum


@triton.jit
def attention_fwd_kernel(
    p_q, p_k, p_v, p_out, p_lse,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, group, rows, keys, diagonal, scale,
    HEAD_DIM: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale·q·kᵀ)·v and its log-sum-exp, keys in blocks with a running maximum and sum.

    Row i sees keys j ≤ i + diagonal if IS_CAUSAL. Dao 2023 (FlashAttention-2), section 3.1; exponentials to base 2.
    Strides count UNITs of elements: 16 bytes where every row starts on a multiple of that, else one element.
    """
    stride_qm *= UNIT
    stride_kn *= UNIT
    stride_vn *= UNIT
    blocks = tl.cdiv(rows, BLOCK_M)
    i_bh = tl.program_id(0) // blocks
    i_m = blocks - 1 - tl.program_id(0) % blocks  # the longest rows of a causal mask first
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    i_kv = i_h // group
    o_row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_col = tl.arange(0, BLOCK_N)
    o_dim = tl.arange(0, BLOCK_D)
    m_q = (o_row < rows)[:, None] & (o_dim < HEAD_DIM)[None, :]
    o_q = tl.arange(0, BLOCK_M)[:, None] * stride_qm + o_dim[None, :]
    p_q += (i_b * stride_qb + i_h * stride_qh) * UNIT + (i_m * BLOCK_M) * tl.cast(stride_qm, tl.int64)
    p_k += (i_b * stride_kb + i_kv * stride_kh) * UNIT
    p_v += (i_b * stride_vb + i_kv * stride_vh) * UNIT
    p_out += (i_bh.to(tl.int64) * rows + i_m * BLOCK_M) * HEAD_DIM
    if UNIT > 1:
        p_q = tl.multiple_of(p_q, 16)
        p_k = tl.multiple_of(p_k, 16)
        p_v = tl.multiple_of(p_v, 16)
        p_out = tl.multiple_of(p_out, 16)
    b_q = tl.load(p_q + o_q, mask=m_q, other=0.0)
    b_q = tl.where(scale < 0, -b_q, b_q)  # so that the largest score stays the largest once scaled
    scale_log2 = tl.abs(scale) * LOG2_E
    # Every row of the block sees the keys before `clear`; no row sees one from `stop` on.
    stop = keys
    clear = keys
    if IS_CAUSAL:
        stop = tl.maximum(tl.minimum(keys, (i_m + 1) * BLOCK_M + diagonal), 0)
        clear = tl.maximum(tl.minimum(keys, i_m * BLOCK_M + diagonal + 1), 0)
    clear = clear // BLOCK_N * BLOCK_N
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_acc, b_max, b_sum = _attend(
        b_acc, b_max, b_sum, b_q, p_k, p_v, o_row, o_col, o_dim,
        stride_kn, stride_vn, keys, diagonal, scale_log2, 0, clear,
        HEAD_DIM, BLOCK_N, BLOCK_D, IS_CAUSAL, False, PRECISION,
    )  # fmt: skip
    b_acc, b_max, b_sum = _attend(
        b_acc, b_max, b_sum, b_q, p_k, p_v, o_row, o_col, o_dim,
        stride_kn, stride_vn, keys, diagonal, scale_log2, clear, stop,
        HEAD_DIM, BLOCK_N, BLOCK_D, IS_CAUSAL, True, PRECISION,
    )  # fmt: skip
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    b_lse = tl.where(b_sum == 0.0, -float("inf"), (b_max + tl.log2(b_sum)) * LN_2)
    p_lse += i_bh.to(tl.int64) * rows + i_m * BLOCK_M
    o_out = tl.arange(0, BLOCK_M)[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_q)
    tl.store(p_lse + tl.arange(0, BLOCK_M), b_lse, mask=o_row < rows)


def config(head_dim: int, itemsize: int, chip: tuple[int, int]) -> tuple[dict[str, int], int, int]:
    """(constants, warps, stages) on compute capability `chip`: no spills, within its shared memory per block.

    That is 227 KB on 9.0 and 10.0, 163 KB on 8.0, 99 KB on 8.6, 8.9 and 12.0; `gate_cases` lists what is compiled.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    unit = 1 if head_dim * itemsize % 16 else 16 // itemsize
    large = chip[0] in (9, 10)
    if itemsize == 4:
        m, n, warps, stages = (_FLOAT32 | _FLOAT32_BLACKWELL if chip[0] == 10 else _FLOAT32)[block_d]
    elif unit == 1:
        m, n, warps, stages = _UNALIGNED[block_d]
    elif block_d == 256:
        m, n, warps, stages = 64 if large else 32, 32, 8, 2
    else:
        m, warps, stages = 128, 8, 3 if large else 2
        n = (128 if large else 64) * 64 // max(block_d, 64)
    return {"HEAD_DIM": head_dim, "UNIT": unit, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block_d}, warps, stages


# (BLOCK_M, BLOCK_N, warps, stages) by BLOCK_D.
_FLOAT32 = {
    16: (64, 16, 8, 2),
    32: (64, 16, 4, 2),
    64: (64, 16, 8, 2),
    128: (16, 16, 8, 2),
    256: (32, 16, 16, 1),
}
_FLOAT32_BLACKWELL = {64: (32, 16, 4, 2), 128: (16, 16, 4, 2)}
# Half types whose rows start anywhere are loaded element by element, which takes registers for addresses.
_UNALIGNED = {
    16: (64, 64, 8, 2),
    32: (64, 64, 8, 2),
    64: (64, 64, 8, 2),
    128: (64, 32, 8, 2),
    256: (32, 32, 8, 2),
}


def _rows(tensor, unit: int):
    """`tensor` itself if its rows start on multiples of `unit` elements and 32 bits reach across a block, or a copy."""
    *outer, last = tensor.stride()
    regular = last == 1 and outer[2] * 256 < 2**31 and all(stride % unit == 0 for stride in outer)
    if regular and (unit == 1 or tensor.data_ptr() % 16 == 0):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def attention_fwd(query, key, value, scale: float, is_causal: bool, bottom_right: bool):
    """(out, lse) of query (batch, heads, Lq, D), key and value (batch, kv_heads, Lk, D), at any strides."""
    batch, heads, rows, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, rows), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    constants, warps, stages = config(head_dim, query.element_size(), _chip(query))
    unit = constants["UNIT"]
    query, key, value = (_rows(tensor, unit) for tensor in (query, key, value))
    attention_fwd_kernel[(triton.cdiv(rows, constants["BLOCK_M"]) * batch * heads,)](
        query, key, value, out, lse,
        *(stride // unit for tensor in (query, key, value) for stride in tensor.stride()[:3]),
        heads, heads // kv_heads, rows, keys, keys - rows if bottom_right else 0, scale,
        IS_CAUSAL=is_causal, PRECISION=matmul_dot_precision() if query.dtype == torch.float32 else "ieee",
        **constants, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def _chip(tensor) -> tuple[int, int]:
    return (capability(tensor.get_device()) if tensor.is_cuda else None) or (9, 0)


def gate_cases(chip: tuple[int, int], aligned: bool) -> list[tuple]:
    """(label, kernel, signature, constexprs, warps, stages) of every configuration `attention_fwd` picks on `chip`."""
    integers = [name for name in attention_fwd_kernel.arg_names if name.startswith("stride_")]
    integers += ["heads", "group", "rows", "keys", "diagonal"]
    cases = []
    for dtype, itemsize, precision in (
        ("fp16", 2, "ieee"),
        ("bf16", 2, "ieee"),
        ("fp32", 4, "ieee"),
        ("fp32", 4, "tf32"),
    ):
        for head_dim in (16, 32, 64, 80, 128, 256, 15, 31, 63, 127, 255):
            for is_causal in (False, True) if head_dim % 2 == 0 else (True,):
                constants, warps, stages = config(head_dim, itemsize, chip)
                constants = {**constants, "IS_CAUSAL": is_causal, "PRECISION": precision}
                signature = dict.fromkeys(("p_q", "p_k", "p_v", "p_out"), f"*{dtype}")
                signature |= {"p_lse": "*fp32", "scale": "fp32", **dict.fromkeys(integers, "i32")}
                label = f"{dtype} {precision} D={head_dim}{' causal' if is_causal else ''}"
                cases.append((label, attention_fwd_kernel, signature, constants, warps, stages))
    return cases
