"""The pointwise half of the RNN cells in Triton: gates to new state in one pass, float32 maths.

gi = W_ih·x + b_ih and gh = W_hh·h + b_hh, (batch, gates·hidden), come from torch's GEMMs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_ops.rnn.triton_gates import relu, sigmoid, tanh


@triton.jit
def _gate(p_gates, o_gate, m_unit):
    return tl.load(p_gates + o_gate, mask=m_unit, other=0.0).to(tl.float32)


@triton.jit
def rnn_cell_fwd_kernel(p_gi, p_gh, p_out, hidden, RELU: tl.constexpr, BLOCK: tl.constexpr):
    """h' = f(gi + gh), f tanh or ReLU; Elman 1990."""
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_unit = i_block * BLOCK + tl.arange(0, BLOCK)
    m_unit = o_unit < hidden
    o_state = i_row * hidden + o_unit
    s = _gate(p_gi, o_state, m_unit) + _gate(p_gh, o_state, m_unit)
    h = relu(s) if RELU else tanh(s)
    tl.store(p_out + o_state, h.to(p_out.dtype.element_ty), mask=m_unit)


@triton.jit
def gru_cell_fwd_kernel(p_gi, p_gh, p_h, p_out, hidden, BLOCK: tl.constexpr):
    """r, z = σ(gi + gh), n = tanh(gi + r·gh), h' = (1 - z)·n + z·h; Cho et al. 2014, reset after the product."""
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_unit = i_block * BLOCK + tl.arange(0, BLOCK)
    m_unit = o_unit < hidden
    o_state, o_gate = i_row * hidden + o_unit, i_row * hidden * 3 + o_unit
    r = sigmoid(_gate(p_gi, o_gate, m_unit) + _gate(p_gh, o_gate, m_unit))
    z = sigmoid(_gate(p_gi, o_gate + hidden, m_unit) + _gate(p_gh, o_gate + hidden, m_unit))
    n = tanh(_gate(p_gi, o_gate + 2 * hidden, m_unit) + r * _gate(p_gh, o_gate + 2 * hidden, m_unit))
    h = n + z * (_gate(p_h, o_state, m_unit) - n)
    tl.store(p_out + o_state, h.to(p_out.dtype.element_ty), mask=m_unit)


@triton.jit
def lstm_cell_fwd_kernel(p_gi, p_gh, p_c, p_out_h, p_out_c, hidden, BLOCK: tl.constexpr):
    """i, f, o = σ(gi + gh), g = tanh(gi + gh), c' = f·c + i·g, h' = o·tanh(c'); Gers et al. 2000."""
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_unit = i_block * BLOCK + tl.arange(0, BLOCK)
    m_unit = o_unit < hidden
    o_state, o_gate = i_row * hidden + o_unit, i_row * hidden * 4 + o_unit
    i = sigmoid(_gate(p_gi, o_gate, m_unit) + _gate(p_gh, o_gate, m_unit))
    f = sigmoid(_gate(p_gi, o_gate + hidden, m_unit) + _gate(p_gh, o_gate + hidden, m_unit))
    g = tanh(_gate(p_gi, o_gate + 2 * hidden, m_unit) + _gate(p_gh, o_gate + 2 * hidden, m_unit))
    o = sigmoid(_gate(p_gi, o_gate + 3 * hidden, m_unit) + _gate(p_gh, o_gate + 3 * hidden, m_unit))
    c = f * _gate(p_c, o_state, m_unit) + i * g
    tl.store(p_out_c + o_state, c.to(p_out_c.dtype.element_ty), mask=m_unit)
    tl.store(p_out_h + o_state, (o * tanh(c)).to(p_out_h.dtype.element_ty), mask=m_unit)


def config(hidden: int) -> tuple[int, int]:
    """(BLOCK, warps): one program a row up to 1024 units."""
    if hidden <= 64:
        return 64, 1
    return (256, 1) if hidden <= 256 else (1024, 4)


def _launch(kernel, state: Tensor, *arguments, **constants) -> None:
    rows, hidden = state.shape
    if rows == 0 or hidden == 0:
        return
    block, warps = config(hidden)
    kernel[(rows, triton.cdiv(hidden, block))](*arguments, hidden, **constants, BLOCK=block, num_warps=warps)


def rnn_cell_fwd(gi: Tensor, gh: Tensor, relu: bool) -> Tensor:
    gi, gh = gi.contiguous(), gh.contiguous()
    out = torch.empty_like(gi)
    _launch(rnn_cell_fwd_kernel, out, gi, gh, out, RELU=relu)
    return out


def gru_cell_fwd(gi: Tensor, gh: Tensor, h: Tensor) -> Tensor:
    gi, gh, h = gi.contiguous(), gh.contiguous(), h.contiguous()
    out = torch.empty_like(h)
    _launch(gru_cell_fwd_kernel, out, gi, gh, h, out)
    return out


def lstm_cell_fwd(gi: Tensor, gh: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    gi, gh, c = gi.contiguous(), gh.contiguous(), c.contiguous()
    out_h, out_c = torch.empty_like(c), torch.empty_like(c)
    _launch(lstm_cell_fwd_kernel, out_h, gi, gh, c, out_h, out_c)
    return out_h, out_c


def gate_cases(chip: tuple[int, int], aligned: bool) -> list[tuple]:
    """(label, kernel, signature, constexprs, warps, stages) of every configuration the cells pick, on any chip."""
    cases = []
    for hidden in (64, 256, 1024):
        block, warps = config(hidden)
        for dtype in ("fp32", "fp16", "bf16"):
            for kernel, names, constants in (
                (rnn_cell_fwd_kernel, ("p_gi", "p_gh", "p_out"), {"RELU": False}),
                (rnn_cell_fwd_kernel, ("p_gi", "p_gh", "p_out"), {"RELU": True}),
                (gru_cell_fwd_kernel, ("p_gi", "p_gh", "p_h", "p_out"), {}),
                (lstm_cell_fwd_kernel, ("p_gi", "p_gh", "p_c", "p_out_h", "p_out_c"), {}),
            ):
                signature = {**dict.fromkeys(names, f"*{dtype}"), "hidden": "i32"}
                label = f"{kernel.__name__.removesuffix('_kernel')} {dtype} H={hidden} {constants or ''}".strip()
                cases.append((label, kernel, signature, {**constants, "BLOCK": block}, warps, 3))
    return cases
