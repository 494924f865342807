"""Which kernel a layer of layers.py runs on, with which tiles: plain functions of sizes, dtype and chip.

The batch and the time have no say, so that a row's result does not depend on them.
"""

from typing import NamedTuple

import triton

from fused_ops.rnn.triton_fused import rnn_fused_bwd_kernel, rnn_fused_fwd_kernel
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
# The same with layer norms. The LSTM's in TF32 spill at every size.
_NORMED_WARPS = {
    ("rnn", "half"): {16: (4, 4), 32: (4, 4), 64: (8, 8), 128: (8, 8), 256: (8, 0)},
    ("gru", "half"): {16: (4, 4), 32: (8, 8), 64: (8, 8)},
    ("lstm", "half"): {16: (8, 8), 32: (8, 0), 64: (8, 0)},
    ("rnn", "tf32"): {16: (4, 4), 32: (4, 4), 64: (8, 8), 128: (8, 0)},
    ("gru", "tf32"): {16: (4, 4), 32: (8, 8), 64: (8, 0)},
    ("lstm", "tf32"): {},
    ("rnn", "ieee"): {16: (4, 4), 32: (8, 8)},
    ("gru", "ieee"): {16: (8, 8)},
    ("lstm", "ieee"): {16: (8, 8)},
}


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def plan(
    mode: str, hidden: int, states: int | None, dtype: str, is_backward: bool, has_extras: bool, is_normed: bool,
    chip: tuple[int, int],
) -> Plan:  # fmt: skip
    """How a layer runs on compute capability `chip`: without spills, within its shared memory (`gate_cases`).

    Args:
        states: features of a projected h, None if it is not projected.
        dtype: "half", "tf32" or "ieee".
        has_extras: a recurrent mask or zoneout.
        is_normed: layer norms.
    """
    block, aligned = _block(hidden), hidden % 16 == 0 and (states or 0) % 16 == 0
    gates, itemsize = GATES[mode], 2 if dtype == "half" else 4
    table = _NORMED_WARPS if is_normed else _FUSED_WARPS
    warps = table[mode.split("_")[0], dtype].get(block, (0, 0))[0 if aligned else 1]
    if states is not None and (block == 128 or _block(states) > block or (dtype == "tf32" and not aligned)):
        warps = 0
    # Here registers are just enough.
    if gates > 1 and block == 128 and (has_extras or (mode == "lstm" and is_backward and chip != (9, 0))):
        warps = 0
    # All of it at once spills on 8.0.
    if mode == "lstm" and is_backward and has_extras and is_normed and states is not None and chip == (8, 0):
        warps = 0
    # W_hh and what passes between layouts: 163 KB of shared memory on 8.0, 227 KB on 9.0 and 10.0, 99 KB elsewhere.
    if gates * block * block * itemsize > 64 * 1024 and chip not in ((8, 0), (9, 0)) and chip[0] != 10:
        warps = 0
    if warps:
        # Left alone, ptxas spills small ones to fit more of them on a multiprocessor; told so, it spills large ones.
        registers = None if gates > 1 and block == 128 else 255
        blocks = {"BLOCK_B": 16, "BLOCK_H": block, "BLOCK_P": block if states is None else _block(states)}
        return Plan(True, blocks, warps, 1, registers)
    if dtype == "ieee":
        return Plan(False, {"BLOCK_B": 16, "BLOCK_U": 16, "BLOCK_K": 16}, 4, 3, 255)
    # Elements of other sizes are moved one by one, each with an address in a register: half the tile.
    block_k = (128 if aligned else 64) // itemsize
    return Plan(False, {"BLOCK_B": 32, "BLOCK_U": 16, "BLOCK_K": block_k}, 4, 3, 255)


def plan_product(dtype: str, aligned: bool) -> Plan:
    """The GEMMs that a step takes beside it where there are norms or a W_hr. aligned: all sizes are multiples of 16."""
    if dtype == "ieee":
        return Plan(False, {"BLOCK_B": 16, "BLOCK_U": 16, "BLOCK_K": 16}, 4, 3, 255)
    block_k = (128 if aligned else 64) // (2 if dtype == "half" else 4)
    return Plan(False, {"BLOCK_B": 32, "BLOCK_U": 32, "BLOCK_K": block_k}, 4, 3)


def plan_rows(hidden: int) -> Plan:
    """A row's units, at most 1024 at a time."""
    block = min(max(128, _block(hidden)), 1024)
    return Plan(False, {"BLOCK": block}, block // 128, 1, 255)


def plan_projection(dtype: str) -> Plan:
    if dtype == "ieee":
        return Plan(False, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}, 8, 3)
    return Plan(False, {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, 8, 3)


_POINTERS = {
    **dict.fromkeys(("p_gi", "p_c_all", "p_c", "p_dc", "p_passed", "p_bias", "p_z", "p_dh"), "*fp32"),
    **dict.fromkeys(("p_norm_hh", "p_b_hh", "p_norm_c", "p_bias_c"), "*fp32"),
    **dict.fromkeys(("p_hat_hh", "p_rstd_hh", "p_hat_c", "p_rstd_c"), "*fp32"),
    **dict.fromkeys(("p_lengths", "p_starts"), "*i64"),
    **dict.fromkeys(("p_resets", "p_zone_h", "p_zone_c"), "*i1"),
}
_LSTM_ONLY = (
    "p_c0", "p_c_n", "p_c_all", "p_c", "p_dc", "p_dc0", "p_grad_c_n", "p_grad_c_all", "p_zone_c", "p_norm_c",
    "p_bias_c", "p_hat_c", "p_rstd_c", "p_slopes_c",
)  # fmt: skip
_OF = {  # what only calls with these features have
    "varlen": ("p_lengths", "p_starts", "p_resets"),
    "extras": ("p_mask", "p_zone_h", "p_zone_c"),
    "normed": (
        "p_norm_hh", "p_b_hh", "p_norm_c", "p_bias_c", "p_hat_hh", "p_rstd_hh", "p_hat_c", "p_rstd_c", "p_slopes_c",
        "p_z",
    ),
    "projected": ("p_w_hr", "p_m", "p_grad_states"),
}  # fmt: skip


def _gate_case(kernel, mode: str, dtype: str, precision: str, features: tuple[str, ...], chosen: Plan) -> tuple:
    missing = {"zoneout_h", "zoneout_c"} | {name for of in _OF if of not in features for name in _OF[of]}
    missing |= set() if mode == "lstm" else set(_LSTM_ONLY)
    missing |= set() if mode == "gru" and "normed" not in features else {"p_b_hn"}
    missing |= set() if mode == "gru" or "extras" in features else {"p_passed"}
    missing |= set() if mode in ("gru", "lstm") else {"p_kept"}
    name = kernel.__name__
    if "projected" in features:  # of the step's kernels, some have no business with the state, others with the cell
        of_state = ("p_grad_output", "p_zone_h", "p_passed") if name == "rnn_row_bwd_kernel" else ()
        missing |= {*of_state, *(("p_dh",) if name == "rnn_state_bwd_kernel" else ())}
    elif name == "rnn_state_bwd_kernel":
        missing |= {"p_grad_output", "p_zone_h"}
    missing |= {"p_dh"} if name == "rnn_unit_bwd_kernel" and "normed" not in features else set()
    missing |= {"p_through"} if name == "rnn_fused_bwd_kernel" and "normed" not in features else set()
    constants = dict.fromkeys(missing, None) | chosen.blocks
    constants |= {"MODE": mode, "GATES": GATES[mode], "SLOPES": SLOPES[mode], "PRECISION": precision}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: _POINTERS.get(name, f"*{dtype}") if name.startswith("p_") else "i32"
        for name in kernel.arg_names
        if name not in constants
    }
    kind = f"{dtype} {precision}" if "PRECISION" in kernel.arg_names else dtype
    label = f"{mode} {kind} {'+'.join(features) or 'plain'} {'x'.join(map(str, chosen.blocks.values()))}"
    return label, kernel, signature, constants, *chosen[2:]


def _launched(chosen: Plan, is_backward: bool, features: tuple, dtype: str, hidden: int) -> list[tuple]:
    """(kernel, its plan) of all that one layer of these features launches; what is projected has `hidden` features."""
    normed, projected = "normed" in features, "projected" in features
    if chosen.is_fused:
        return [(rnn_fused_bwd_kernel if is_backward else rnn_fused_fwd_kernel, chosen)]
    if not normed and not projected:
        return [(rnn_step_bwd_kernel if is_backward else rnn_step_fwd_kernel, chosen)]
    gemm, rows = plan_product(dtype, hidden % 16 == 0), plan_rows(hidden)
    if is_backward:
        found = [(rnn_state_bwd_kernel, gemm), *([(rnn_unit_bwd_kernel, chosen)] if projected else [])]
        return [*found, *([(rnn_row_bwd_kernel, rows)] if normed else [])]
    found = [(rnn_product_fwd_kernel, gemm), (rnn_row_fwd_kernel, rows)] if normed else [(rnn_step_fwd_kernel, chosen)]
    return [*found, *([(rnn_state_fwd_kernel, gemm)] if projected else [])]


def _features(mode: str, block: int) -> list[tuple[str, ...]]:
    """What a layer may have; the small ones, where registers are many, only with everything."""
    extras = ("varlen", "extras")
    most = [(*extras, "normed")]
    most += [(*extras, "projected"), (*extras, "normed", "projected")] if mode == "lstm" else []
    return [extras, *most] if block <= 64 else [(), ("varlen",), extras, *most]


def gate_cases(chip: tuple[int, int], aligned: bool) -> list[tuple]:
    """(label, kernel, signature, constexprs, warps, stages) of every configuration a layer picks on `chip`.

    bfloat16 stands for both half types, rnn_tanh for both of its kind.
    """
    cases = {}

    def add(label: str, kernel, *rest) -> None:
        cases[label, kernel.__name__] = (label, kernel, *rest)

    for dtype, name, precision in (("half", "bf16", "ieee"), ("tf32", "fp32", "tf32"), ("ieee", "fp32", "ieee")):
        chosen = plan_projection(dtype)
        pointers = {"p_x": f"*{name}", "p_w": f"*{name}", "p_bias": "*fp32", "p_out": "*fp32"}
        signature = {**pointers, **dict.fromkeys(("rows", "inputs", "outputs"), "i32")}
        constants = {**chosen.blocks, "PRECISION": precision}
        label = f"{name} {precision} {'x'.join(map(str, chosen.blocks.values()))}"
        add(label, rnn_project_fwd_kernel, signature, constants, *chosen[2:])
        for mode in ("rnn_tanh", "gru", "lstm"):
            for block in (16, 32, 64, 128, 256, 512, 1024):
                for features in _features(mode, block):
                    hidden = block if aligned else block - 1
                    states = hidden if "projected" in features else None
                    how = ("extras" in features, "normed" in features)
                    for back in (False, True):
                        chosen = plan(mode, hidden, states, dtype, back, *how, chip)
                        for kernel, own in _launched(chosen, back, features, dtype, hidden):
                            add(*_gate_case(kernel, mode, name, precision, features, own))
    return list(cases.values())
