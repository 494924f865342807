"""Layers of layers.py in Triton: which kernel, with which tiles, and its launches."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fused_ops.core.device import capability
from fused_ops.core.precision import matmul_dot_precision
from fused_ops.rnn.triton_fused import rnn_fused_bwd_kernel, rnn_fused_fwd_kernel
from fused_ops.rnn.triton_projection import rnn_project_fwd_kernel
from fused_ops.rnn.triton_steps import rnn_step_bwd_kernel, rnn_step_fwd_kernel

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
SLOPES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 4, "lstm": 4}


class Plan(NamedTuple):
    """is_fused: the whole time loop in one launch, else one launch a step. registers: at most, for a thread."""

    is_fused: bool
    blocks: dict[str, int]
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


# Warps of the one launch by hidden's next power of two, for multiples of 16 and for other sizes; 0: registers spill.
_FUSED_WARPS = {
    ("rnn", "half"): {16: (4, 4), 32: (4, 4), 64: (4, 4), 128: (8, 8), 256: (8, 0)},
    ("gru", "half"): {16: (4, 4), 32: (4, 4), 64: (4, 8), 128: (8, 0)},
    ("lstm", "half"): {16: (4, 4), 32: (4, 4), 64: (8, 8), 128: (8, 0)},
    ("rnn", "tf32"): {16: (4, 4), 32: (4, 4), 64: (4, 4), 128: (8, 0)},
    ("gru", "tf32"): {16: (4, 4), 32: (4, 4), 64: (8, 8)},
    ("lstm", "tf32"): {16: (4, 4), 32: (4, 4), 64: (8, 0)},
    ("rnn", "ieee"): {16: (4, 4), 32: (4, 4)},
    ("gru", "ieee"): {16: (4, 4)},
    ("lstm", "ieee"): {16: (4, 4)},
}


def plan(mode: str, hidden: int, dtype: str, is_backward: bool, has_extras: bool, chip: tuple[int, int]) -> Plan:
    """How a layer runs on compute capability `chip`: without spills, within its shared memory (`gate_cases`).

    The batch and the time have no say, so that a row's result does not depend on them.

    Args:
        dtype: "half", "tf32" or "ieee".
        has_extras: a recurrent mask or zoneout.
    """
    block, aligned = max(16, triton.next_power_of_2(hidden)), hidden % 16 == 0
    gates, itemsize = GATES[mode], 2 if dtype == "half" else 4
    warps = _FUSED_WARPS[mode.split("_")[0], dtype].get(block, (0, 0))[0 if aligned else 1]
    # Here registers are just enough.
    if gates > 1 and block == 128 and (has_extras or (mode, is_backward, chip) == ("lstm", True, (8, 0))):
        warps = 0
    # W_hh and what passes between layouts: 163 KB of shared memory on 8.0, 227 KB on 9.0 and 10.0, 99 KB elsewhere.
    if gates * block * block * itemsize > 64 * 1024 and chip not in ((8, 0), (9, 0)) and chip[0] != 10:
        warps = 0
    if warps:
        # Left alone, ptxas spills small ones to fit more of them on a multiprocessor; told so, it spills large ones.
        registers = None if gates > 1 and block == 128 else 255
        return Plan(True, {"BLOCK_B": 16, "BLOCK_H": block}, warps, 1, registers)
    if dtype == "ieee":
        return Plan(False, {"BLOCK_B": 16, "BLOCK_U": 16, "BLOCK_K": 16}, 4, 3)
    # Elements of other sizes are moved one by one, each with an address in a register: half the tile.
    block_k = (128 if aligned else 64) // itemsize
    return Plan(False, {"BLOCK_B": 32, "BLOCK_U": 16, "BLOCK_K": block_k}, 4, 3, 255)


def plan_projection(dtype: str) -> Plan:
    if dtype == "ieee":
        return Plan(False, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}, 8, 3)
    return Plan(False, {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, 8, 3)


def _dtype(tensor: Tensor) -> str:
    return matmul_dot_precision() if tensor.dtype is torch.float32 else "half"


def _precision(dtype: str) -> str:
    return "tf32" if dtype == "tf32" else "ieee"


def _chip(tensor: Tensor) -> tuple[int, int]:
    return (capability(tensor.get_device()) if tensor.is_cuda else None) or (9, 0)


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous, each from a multiple of 16 bytes on."""
    dense = [t if t is None else t.contiguous() for t in tensors]
    return [t if t is None or t.data_ptr() % 16 == 0 else t.clone() for t in dense]


def _on(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.device("cpu")


def _resident(w_hh: Tensor, gates: int, block: int) -> Tensor:
    """(D, G·H, H) as (D, G, block, block), with zeros beyond H."""
    pad = block - w_hh.size(-1)
    return F.pad(w_hh.unflatten(1, (gates, -1)), (0, pad, 0, pad)) if pad else w_hh


def _rates(zone_h, zone_c, zoneout_h: float, zoneout_c: float) -> tuple:
    """Zoneout's probabilities where its expectation is asked for, else None."""
    return tuple(p if p > 0.0 and zone is None else None for zone, p in ((zone_h, zoneout_h), (zone_c, zoneout_c)))


def rnn_project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·weightᵀ + bias, (N, M) float32, of x (N, I), weight (M, I), bias (M,) float32."""
    x, weight, bias = _dense(x, weight, bias)
    rows, inputs = x.shape
    outputs = weight.size(0)
    out = x.new_empty((rows, outputs), dtype=torch.float32)
    if out.numel() == 0:
        return out
    dtype = _dtype(x)
    chosen = plan_projection(dtype)
    grid = (triton.cdiv(rows, chosen.blocks["BLOCK_M"]) * triton.cdiv(outputs, chosen.blocks["BLOCK_N"]),)
    with _on(x):
        rnn_project_fwd_kernel[grid](
            x, weight, bias, out, rows, inputs, outputs,
            **chosen.blocks, PRECISION=_precision(dtype), **chosen.options,
        )  # fmt: skip
    return out


def rnn_layer_fwd(
    gi, w_hh, b_hn, h0, c0, lengths, starts, resets, mask, zone_h, zone_c, zoneout_h, zoneout_c,
    mode: str, steps: int, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(output, h_n, c_n, c_all, kept), as `rnn_layer_fwd_triton` in layers.py."""
    rates = _rates(zone_h, zone_c, zoneout_h, zoneout_c)
    extras = any(x is not None for x in (mask, zone_h, zone_c, *rates))
    gi, w_hh, b_hn, h0, c0, *how = _dense(gi, w_hh, b_hn, h0, c0, lengths, starts, resets, mask, zone_h, zone_c)
    tokens, directions, gates, hidden = gi.shape
    batch, lstm = h0.size(1), mode == "lstm"
    padded = lengths is not None and starts is None
    output = (torch.zeros if padded else torch.empty)((tokens, directions * hidden), dtype=h0.dtype, device=h0.device)
    h_n, c_n = h0.clone(), c0.clone() if lstm else h0.new_empty(0)
    c_all = gi.new_empty((directions, tokens, hidden) if lstm and keep else 0)
    kept = h0.new_empty((directions, tokens, 4, hidden) if gates > 1 and keep else 0)
    if h0.numel() == 0 or tokens == 0:
        return output, h_n, c_n, c_all, kept
    dtype = _dtype(h0)
    chosen = plan(mode, hidden, dtype, False, extras, _chip(h0))
    blocks = chosen.blocks
    constants = {"MODE": mode, "GATES": gates, "PRECISION": _precision(dtype), **blocks}
    results = (output, h_n, c_n if lstm else None, *(t if t.numel() else None for t in (c_all, kept)))
    sizes = (batch, steps, tokens, hidden)
    rows = triton.cdiv(batch, blocks["BLOCK_B"])
    with _on(h0):
        if chosen.is_fused:
            w = _resident(w_hh, gates, blocks["BLOCK_H"])
            rnn_fused_fwd_kernel[(rows, directions)](
                gi, w, b_hn, h0, c0, *how, *rates, *results, *sizes, **constants, **chosen.options
            )
        else:
            c = c0.to(torch.float32, copy=True) if lstm else None
            grid = (triton.cdiv(hidden, blocks["BLOCK_U"]), rows, directions)
            for step in range(steps):
                rnn_step_fwd_kernel[grid](
                    gi, w_hh, b_hn, h0, *how, *rates, *results, c, step, *sizes, **constants, **chosen.options
                )
    return output, h_n, c_n, c_all, kept


def rnn_layer_bwd(
    grad_output, grad_h_n, grad_c_n, grad_c_all, w_hh, h0, c0, lengths, starts, resets, mask, zone_h, zone_c,
    zoneout_h, zoneout_c, output, c_all, kept, mode: str, steps: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(slopes, dh0, dc0), as `rnn_layer_bwd_triton` in layers.py."""
    rates = _rates(zone_h, zone_c, zoneout_h, zoneout_c)
    extras = any(x is not None for x in (mask, zone_h, zone_c, *rates))
    grads = _dense(grad_output, grad_h_n, grad_c_n, grad_c_all)
    w_hh, h0, c0, *how = _dense(w_hh, h0, c0, lengths, starts, resets, mask, zone_h, zone_c)
    saved = [t if t.numel() else None for t in _dense(output, c_all, kept)]
    (directions, batch, hidden), tokens, lstm = h0.shape, output.size(0), mode == "lstm"
    gates, padded = GATES[mode], lengths is not None and starts is None
    slopes = (torch.zeros if padded else torch.empty)(
        (tokens, directions, SLOPES[mode], hidden), dtype=h0.dtype, device=h0.device
    )
    dh0, dc0 = torch.empty_like(h0), torch.empty_like(c0) if lstm else h0.new_empty(0)
    if h0.numel() == 0:
        return slopes, dh0, dc0
    dtype = _dtype(h0)
    chosen = plan(mode, hidden, dtype, True, extras, _chip(h0))
    blocks = chosen.blocks
    passes = mode == "gru" or zone_h is not None or rates[0] is not None
    constants = {
        "MODE": mode, "GATES": gates, "SLOPES": SLOPES[mode], "PRECISION": _precision(dtype), **blocks,
        "NEEDS_H": mode == "gru" or (not lstm and rates[0] is not None),
    }  # fmt: skip
    results = (slopes, dh0, dc0 if lstm else None)
    sizes = (batch, steps, tokens, hidden)
    rows = triton.cdiv(batch, blocks["BLOCK_B"])
    with _on(h0):
        if chosen.is_fused:
            w = _resident(w_hh, gates, blocks["BLOCK_H"])
            rnn_fused_bwd_kernel[(rows, directions)](
                *grads, w, h0, c0, *how, *rates, *saved, *results, *sizes, **constants, **chosen.options
            )
        else:
            passed, dc = (torch.empty_like(h0, dtype=torch.float32) if there else None for there in (passes, lstm))
            grid = (triton.cdiv(hidden, blocks["BLOCK_U"]), rows, directions)
            for step in range(steps - 1, -2, -1):
                rnn_step_bwd_kernel[grid](
                    *grads, w_hh, h0, c0, *how, *rates, *saved, *results, passed, dc, step, *sizes,
                    **constants, **chosen.options,
                )  # fmt: skip
    return slopes, dh0, dc0


_LSTM_ONLY = ("p_c0", "p_c_n", "p_c_all", "p_c", "p_dc", "p_dc0", "p_grad_c_n", "p_grad_c_all", "p_zone_c")
_EXTRAS = ("p_mask", "p_zone_h", "p_zone_c")
_POINTERS = {
    **dict.fromkeys(("p_gi", "p_c_all", "p_c", "p_dc", "p_passed", "p_bias"), "*fp32"),
    **dict.fromkeys(("p_lengths", "p_starts"), "*i64"),
    **dict.fromkeys(("p_resets", "p_zone_h", "p_zone_c"), "*i1"),
}


def _gate_case(kernel, mode: str, dtype: str, precision: str, variant: str, chosen: Plan) -> tuple:
    """variant: "plain"; "varlen": with lengths, packed, and resets; "extras": with masks and zoneout too."""
    gated = mode in ("gru", "lstm")
    missing = {"zoneout_h", "zoneout_c"} | (set() if variant == "extras" else set(_EXTRAS))
    missing |= set() if mode == "lstm" else set(_LSTM_ONLY)
    missing |= set() if mode == "gru" else {"p_b_hn"} | (set() if variant == "extras" else {"p_passed"})
    missing |= set() if gated else {"p_kept"}
    missing |= {"p_lengths", "p_starts", "p_resets"} if variant == "plain" else set()
    constants = dict.fromkeys(missing, None) | chosen.blocks
    constants |= {"MODE": mode, "GATES": GATES[mode], "SLOPES": SLOPES[mode], "NEEDS_H": mode == "gru"}
    constants |= {"PRECISION": precision}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: _POINTERS.get(name, f"*{dtype}") if name.startswith("p_") else "i32"
        for name in kernel.arg_names
        if name not in constants
    }
    tile = "x".join(map(str, chosen.blocks.values()))
    return f"{mode} {dtype} {precision} {variant} {tile}", kernel, signature, constants, *chosen[2:]


def gate_cases(chip: tuple[int, int], aligned: bool) -> list[tuple]:
    """(label, kernel, signature, constexprs, warps, stages) of every configuration a layer picks on `chip`.

    bfloat16 stands for both half types, rnn_tanh for both of its kind.
    """
    kernels = {
        (True, False): rnn_fused_fwd_kernel,
        (True, True): rnn_fused_bwd_kernel,
        (False, False): rnn_step_fwd_kernel,
        (False, True): rnn_step_bwd_kernel,
    }
    cases = []
    for dtype, name, precision in (("half", "bf16", "ieee"), ("tf32", "fp32", "tf32"), ("ieee", "fp32", "ieee")):
        chosen = plan_projection(dtype)
        pointers = {"p_x": f"*{name}", "p_w": f"*{name}", "p_bias": "*fp32", "p_out": "*fp32"}
        signature = {**pointers, **dict.fromkeys(("rows", "inputs", "outputs"), "i32")}
        constants = {**chosen.blocks, "PRECISION": precision}
        label = f"{name} {precision} {'x'.join(map(str, chosen.blocks.values()))}"
        cases.append((label, rnn_project_fwd_kernel, signature, constants, *chosen[2:]))
        for mode in ("rnn_tanh", "gru", "lstm"):
            picked = {}
            for block in (16, 32, 64, 128, 256, 512):
                for variant in ("plain", "varlen", "extras")[0 if block > 64 else 2 :]:
                    for is_backward in (False, True):
                        hidden = block if aligned else block - 1
                        chosen = plan(mode, hidden, dtype, is_backward, variant == "extras", chip)
                        kernel = kernels[chosen.is_fused, is_backward]
                        case = _gate_case(kernel, mode, name, precision, variant, chosen)
                        picked[case[0], kernel.__name__] = case
            cases += picked.values()
    return cases
