"""Layers of layers.py in Triton: the launches."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fused_ops.core.device import capability
from fused_ops.core.precision import matmul_dot_precision
from fused_ops.rnn.triton_fused import rnn_fused_bwd_kernel, rnn_fused_fwd_kernel
from fused_ops.rnn.triton_plan import GATES, SLOPES, Plan, plan, plan_product, plan_projection, plan_rows
from fused_ops.rnn.triton_projection import rnn_project_fwd_kernel
from fused_ops.rnn.triton_rows import rnn_row_bwd_kernel, rnn_row_fwd_kernel
from fused_ops.rnn.triton_steps import (
    rnn_product_fwd_kernel,
    rnn_state_bwd_kernel,
    rnn_state_fwd_kernel,
    rnn_step_bwd_kernel,
    rnn_step_fwd_kernel,
    rnn_unit_bwd_kernel,
)


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


def _resident(weight: Tensor | None, gates: int, units: int, k: int) -> Tensor | None:
    """(D, gates·U, K) as (D, gates, units, k), with zeros beyond U and K."""
    if weight is None:
        return None
    weight = weight.unflatten(1, (gates, -1))
    pad = (0, k - weight.size(3), 0, units - weight.size(2))
    return F.pad(weight, pad) if any(pad) else weight


def _rates(zone_h, zone_c, zoneout_h: float, zoneout_c: float) -> dict[str, float | None]:
    """Zoneout's probabilities where its expectation is asked for, else None."""
    pairs = {"zoneout_h": (zone_h, zoneout_h), "zoneout_c": (zone_c, zoneout_c)}
    return {name: p if p > 0.0 and zone is None else None for name, (zone, p) in pairs.items()}


def _launcher(kernel, grid: tuple[int, ...], values: dict, chosen: Plan) -> Callable:
    """The launch of `kernel` with those of `values` that it names, and what is not among them by keyword."""
    values = {name: values[name] for name in kernel.arg_names if name in values}
    return partial(kernel[grid], **values, **chosen.blocks, **chosen.options)


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


def _values(mode: str, h0: Tensor, hidden: int, tokens: int, steps: int, **tensors: Tensor | None) -> dict:
    """What the kernels of both directions take, by their parameters' names."""
    given = dict(zip(tensors, _dense(*tensors.values()), strict=True))
    return {
        **{f"p_{name}": t if t is None or t.numel() else None for name, t in given.items()},
        "p_h0": h0, "batch": h0.size(1), "steps": steps, "tokens": tokens, "hidden": hidden, "states": h0.size(2),
        "outputs": GATES[mode] * hidden, "MODE": mode, "GATES": GATES[mode], "SLOPES": SLOPES[mode],
        "PRECISION": _precision(_dtype(h0)),
    }  # fmt: skip


def _plan(values: dict, is_backward: bool) -> Plan:
    extras = any(values[name] is not None for name in ("p_mask", "p_zone_h", "p_zone_c", "zoneout_h", "zoneout_c"))
    h0 = values["p_h0"]
    states = None if values["p_w_hr"] is None else values["states"]
    normed = values["p_norm_hh"] is not None
    return plan(values["MODE"], values["hidden"], states, _dtype(h0), is_backward, extras, normed, _chip(h0))


def _fused(kernel, values: dict, chosen: Plan) -> None:
    units, states = chosen.blocks["BLOCK_H"], chosen.blocks["BLOCK_P"]
    weights = {
        "p_w": _resident(values["p_w"], values["GATES"], units, states),
        "p_w_hr": _resident(values["p_w_hr"], 1, states, units),
    }
    grid = (triton.cdiv(values["batch"], chosen.blocks["BLOCK_B"]), values["p_h0"].size(0))
    _launcher(kernel, grid, values | weights, chosen)()


def _grid(values: dict, chosen: Plan, outputs: int) -> tuple[int, int, int]:
    rows = triton.cdiv(values["batch"], chosen.blocks["BLOCK_B"])
    return triton.cdiv(outputs, chosen.blocks["BLOCK_U"]), rows, values["p_h0"].size(0)


def _steps_fwd(values: dict, chosen: Plan) -> None:
    h0, c0, normed, hidden = values["p_h0"], values["p_c0"], values["p_norm_hh"] is not None, values["hidden"]
    of_cells = (*h0.shape[:2], hidden)
    values["p_c"] = None if c0 is None else c0.to(torch.float32, copy=True)
    values["p_m"] = None if values["p_w_hr"] is None else h0.new_empty(of_cells)
    gemm = plan_product(_dtype(h0), hidden % 16 == 0 and values["states"] % 16 == 0)
    if normed:
        values["p_z"] = h0.new_empty((*h0.shape[:2], values["outputs"]), dtype=torch.float32)
        rows = (values["batch"], h0.size(0))
        launches = [
            _launcher(rnn_product_fwd_kernel, _grid(values, gemm, values["outputs"]), values, gemm),
            _launcher(rnn_row_fwd_kernel, rows, values, plan_rows(hidden)),
        ]
    else:
        launches = [_launcher(rnn_step_fwd_kernel, _grid(values, chosen, hidden), values, chosen)]
    if values["p_m"] is not None:
        launches.append(_launcher(rnn_state_fwd_kernel, _grid(values, gemm, values["states"]), values, gemm))
    for step in range(values["steps"]):
        for launch in launches:
            launch(i_s=step)


def rnn_layer_fwd(
    gi, w_hh, b_hn, w_hr, norm_hh, b_hh, norm_c, bias_c, h0, c0, lengths, starts, resets, mask, zone_h, zone_c,
    zoneout_h, zoneout_c, mode: str, steps: int, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(output, h_n, c_n, c_all, kept), as `rnn_layer_fwd_triton` in layers.py."""
    tokens, directions, gates, hidden = gi.shape
    lstm, rates = mode == "lstm", _rates(zone_h, zone_c, zoneout_h, zoneout_c)
    (h0,) = _dense(h0)
    new = torch.zeros if lengths is not None and starts is None else torch.empty
    output = new((tokens, directions * h0.size(2)), dtype=h0.dtype, device=h0.device)
    h_n, c_n = h0.clone(), c0.clone(memory_format=torch.contiguous_format) if lstm else h0.new_empty(0)
    count = 4 if gates > 1 else int(rates["zoneout_h"] is not None)
    c_all = gi.new_empty((directions, tokens, hidden) if lstm and keep else 0)
    kept = h0.new_empty((directions, tokens, count, hidden) if count and keep else 0)
    if h_n.numel() == 0 or tokens == 0:
        return output, h_n, c_n, c_all, kept
    values = rates | _values(
        mode, h0, hidden, tokens, steps, gi=gi, w=w_hh, b_hn=b_hn, w_hr=w_hr, norm_hh=norm_hh, b_hh=b_hh,
        norm_c=norm_c, bias_c=bias_c, c0=c0, lengths=lengths, starts=starts, resets=resets, mask=mask, zone_h=zone_h,
        zone_c=zone_c, output=output, h_n=h_n, c_n=c_n, c_all=c_all, kept=kept,
    )  # fmt: skip
    chosen = _plan(values, False)
    with _on(h0):
        if chosen.is_fused:
            _fused(rnn_fused_fwd_kernel, values, chosen)
        else:
            _steps_fwd(values, chosen)
    return output, h_n, c_n, c_all, kept


def _steps_bwd(values: dict, chosen: Plan) -> None:
    h0, hidden, normed = values["p_h0"], values["hidden"], values["p_norm_hh"] is not None
    projected = values["p_w_hr"] is not None
    zoned = values["p_zone_h"] is not None or values["zoneout_h"] is not None
    passes = zoned or values["MODE"] == "gru"
    of_cells = (*h0.shape[:2], hidden)
    values["p_passed"] = torch.empty_like(h0, dtype=torch.float32) if passes else None
    values["p_dc"] = h0.new_empty(of_cells, dtype=torch.float32) if values["MODE"] == "lstm" else None
    if not (normed or projected):
        launches = [_launcher(rnn_step_bwd_kernel, _grid(values, chosen, hidden), values, chosen)]
    else:
        gemm = plan_product(_dtype(h0), hidden % 16 == 0 and values["states"] % 16 == 0)
        dh = h0.new_empty(of_cells, dtype=torch.float32) if normed else None
        through = {"p_through": values["p_through" if normed else "p_slopes"], "p_dh": None if projected else dh}
        through["stride"] = hidden * values["GATES" if normed else "SLOPES"]
        grid = _grid(values, gemm, values["states"])
        launches = [_launcher(rnn_state_bwd_kernel, grid, values | through, gemm)]
        values["p_dh"] = dh
        if projected:  # the cell is not concerned with the state
            values |= dict.fromkeys(("p_grad_output", "p_zone_h", "zoneout_h", "p_passed"))
            launches.append(_launcher(rnn_unit_bwd_kernel, _grid(values, chosen, hidden), values, chosen))
        if normed:
            rows = (values["batch"], h0.size(0))
            launches.append(_launcher(rnn_row_bwd_kernel, rows, values, plan_rows(hidden)))
    for step in range(values["steps"] - 1, -2, -1):
        for launch in launches:
            launch(i_s=step)


def rnn_layer_bwd(
    grad_output, grad_h_n, grad_c_n, grad_c_all, w_hh, w_hr, norm_hh, norm_c, bias_c, hat_hh, rstd_hh, hat_c, rstd_c,
    h0, c0, lengths, starts, resets, mask, zone_h, zone_c, zoneout_h, zoneout_c, output, c_all, kept,
    mode: str, steps: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(slopes, through, slopes_c, grad_states, dh0, dc0), as `rnn_layer_bwd_triton` in layers.py."""
    (h0,) = _dense(h0)
    (directions, _, states), tokens, lstm, gates = h0.shape, output.size(0), mode == "lstm", GATES[mode]
    hidden, normed = w_hh.size(1) // gates, norm_hh is not None
    new = torch.zeros if lengths is not None and starts is None else torch.empty

    def result(wanted: bool, *shape: int) -> Tensor:
        return new((tokens, directions, *shape) if wanted else 0, dtype=h0.dtype, device=h0.device)

    results = {
        "slopes": result(True, SLOPES[mode], hidden),
        "through": result(normed, gates, hidden),
        "slopes_c": result(normed and lstm, hidden),
        "grad_states": result(w_hr is not None, states),
        "dh0": torch.empty_like(h0),
        "dc0": torch.empty_like(c0, memory_format=torch.contiguous_format) if lstm else h0.new_empty(0),
    }
    if h0.numel() == 0 or tokens == 0:
        for name, grad in (("dh0", grad_h_n), ("dc0", grad_c_n)):
            results[name] = torch.zeros_like(results[name]) if grad is None else grad.clone()
        return tuple(results.values())
    values = _rates(zone_h, zone_c, zoneout_h, zoneout_c) | _values(
        mode, h0, hidden, tokens, steps, grad_output=grad_output, grad_h_n=grad_h_n, grad_c_n=grad_c_n,
        grad_c_all=grad_c_all, w=w_hh, w_hr=w_hr, norm_hh=norm_hh, norm_c=norm_c, bias_c=bias_c, hat_hh=hat_hh,
        rstd_hh=rstd_hh, hat_c=hat_c, rstd_c=rstd_c, c0=c0, lengths=lengths, starts=starts, resets=resets, mask=mask,
        zone_h=zone_h, zone_c=zone_c, output=output, c_all=c_all, kept=kept, **results,
    )  # fmt: skip
    chosen = _plan(values, True)
    with _on(h0):
        if chosen.is_fused:
            _fused(rnn_fused_bwd_kernel, values, chosen)
        else:
            _steps_bwd(values, chosen)
    return tuple(results.values())
