"""Wrong CUDA layers, each caught by the emulator's checks or by the comparison with what a step must make.

All faults of a direction are in one library, of few kernels: PLANTED is true for one of them at a time.
"""

import ctypes
import json
import re

import pytest
import torch

from fused_ops.core import extension
from tests.emulation import needs_emulator, run_on
from tests.emulation.build import build_mutant
from tests.rnn.emulated_steps import DESIGNS, as_left, check, check_backward, chip
from tests.rnn.layer_oracle import Layer, layer_case
from tests.rnn.test_layers_emulated import CASES

pytestmark = needs_emulator

# Name: file of csrc/rnn, what is replaced, by what, what is said of it.
FORWARD = {
    "cluster: both turns in one place": (
        "exchange.cuh", "(step & 1) * rows_ * stride_", "(PLANTED ? 0 : step & 1) * rows_ * stride_",
        "race: (writes|reads) shared memory",
    ),
    "grid: one block is not waited for": (
        "exchange.cuh", "awaited_ += blocks_;", "awaited_ += blocks_ - PLANTED;", "race: (reads|writes) a tensor"
    ),
    "grid: arrived before all have published": (
        "exchange.cuh", "__syncthreads();\n    if (threadIdx.x == 0) atomic",
        "if (!PLANTED) __syncthreads();\n    if (threadIdx.x == 0) atomic", "race: (reads|writes) a tensor",
    ),
    "sums are read before they are there": (
        "layer_fwd.cuh", "received(step), exchange.stride());\n",
        "received(step), exchange.stride());\n    if (!PLANTED) ",
        "race: reads shared memory|which nobody has written",
    ),
    "a reset forgets to reach the others": (
        "layer_fwd.cuh", "state.reset ? 0.0f : state.h", "state.reset && !PLANTED ? 0.0f : state.h", "error"
    ),
    "a row that has ended goes on": (
        "layer_fwd.cuh", "step >= cell.length) continue;\n      float product",
        "(step >= cell.length && !PLANTED)) continue;\n      float product", "AssertionError"
    ),
    "the mask is left out": ("layer_fwd.cuh", "h *= state.mask", "h *= PLANTED ? 1.0f : state.mask", "error"),
    "a norm's sums are added before the blocks have met": (
        "row_norm.cuh", "    });\n    exchange.meet();", "    });\n    if (!PLANTED) exchange.meet();",
        "race: reads|which nobody has written",
    ),
    "the last block's units are counted as all others'": (
        "row_norm.cuh", "per * units_of(slice)", "per * (PLANTED ? units_ : units_of(slice))", "error"
    ),
    "blocks' means are as good as the row's": (
        "row_norm.cuh", "part.second + apart * apart", "part.second + (PLANTED ? 0.0f : apart) * apart", "error"
    ),
    "both norms' sums in one place": (
        "exchange.cuh", "(which * slices_ + slice_) * rows_", "((PLANTED ? 0 : which) * slices_ + slice_) * rows_",
        "race: |nobody has written",
    ),
    "a state is projected before all of it is there": (
        "exchange.cuh", "void hand_on() {\n    __sync", "void hand_on() {\n    if (!PLANTED) __sync", "race: "
    ),
    "c forgets its zone": (
        "layer_fwd.cuh", "noise.c(cell.zone_c, cell.c,", "noise.c(cell.zone_c && !PLANTED, cell.c,", "error"
    ),
    "zoneout keeps what a reset took": (
        "layer_fwd.cuh", "if (state.reset) state.h = 0.0f;", "if (state.reset && !PLANTED) state.h = 0.0f;", "error"
    ),
}  # fmt: skip
BACKWARD = {
    "nobody waits for the others' slopes": (
        "layer_bwd.cuh", "exchange.wait(turn);", "if (!PLANTED) exchange.wait(turn);", "race: reads shared memory"
    ),
    "sums are read before all warps have left theirs": (
        "layer_bwd.cuh", "received(turn), exchange.stride());\n",
        "received(turn), exchange.stride());\n      if (!PLANTED) ",
        "race: .* shared memory",
    ),
    "slopes of one gate meet another's weights": (
        "layer_bwd_state.cuh", "(part + 2) % 3", "(part + (PLANTED ? 1 : 2)) % 3", "slopes: error"
    ),
    "what a reset cuts comes through": (
        "layer_bwd.cuh", "reset = !last &&", "reset = !PLANTED && !last &&", "slopes: error"
    ),
    "units past the last have weights": (
        "layer_bwd.cuh", "unit >= hidden ||", "(unit >= hidden && !PLANTED) ||", "out of bounds: reads 2 bytes"
    ),
    "the mask is left out": (
        "layer_bwd.cuh", "+= state.mask * products", "+= (PLANTED ? 1.0f : state.mask) * products", "error"
    ),
    "the old h has no share": (
        "layer_bwd.cuh", "state.dh = layer_.noise.h(", "state.dh = PLANTED ? 0.0f : layer_.noise.h(", "error"
    ),
    "the old c has no share": (
        "layer_bwd.cuh", "cell.bypass_c = layer_", "cell.bypass_c = PLANTED ? 0.0f : layer_", "slopes: error"
    ),
    "c after zoneout is c before it": (
        "layer_bwd.cuh", "if (!cell.zone_c &&", "if (PLANTED || !cell.zone_c &&", "slopes: error"
    ),
    "a mean is left out of the norm's derivative": (
        "layer_bwd.cuh", "by_norm - mean.first - layer_.hat", "by_norm - (PLANTED ? 0.0f : mean.first) - layer_.hat",
        "through: error",
    ),
    "c's norm forgets how its hat correlates": (
        "layer_bwd.cuh", "hat_c(cell) * mean.second", "hat_c(cell) * (PLANTED ? 0.0f : mean.second)", "slopes: error"
    ),
    "a norm's two sums in one place": (
        "layer_bwd.cuh", "products.partial + products.rows *", "products.partial + !PLANTED * products.rows *", "error"
    ),
    "dL/dh is projected before all of it is there": (
        "exchange.cuh", "void hand_on() {\n    __sync", "void hand_on() {\n    if (!PLANTED) __sync", "race: "
    ),
}  # fmt: skip
FAULTS = {"fwd": FORWARD, "bwd": BACKWARD}
SWITCH = """\
namespace fused_ops::layers {
static int number = 0;
__attribute__((noinline, no_sanitize("thread"))) bool planted(int fault) { return fault == number; }
}
extern "C" __attribute__((visibility("default"))) void fused_ops_plant(int fault) { fused_ops::layers::number = fault; }
FUSED_OPS_CUDA_LIBRARY(m)"""


def changes(direction: str):
    """(file, old, new) of a library of two half-precision kernels, the plain GRU's and the projected LSTM's."""
    launcher, launch, extra = (f"rnn/layer_{direction}{end}" for end in (".cu", "_launch.h", "_extra.cu"))
    variants = (f"std::integral_constant<Variant, Variant::{name}>{{}}" for name in ("plain", "projected"))
    plain, projected = (f"run({variant})" for variant in variants)
    yield launcher, "with_variant(extras.variant(), run)", f"if (extras.w_hr) {projected}; else {plain}"
    yield launcher, "dispatch_float(", "[](auto, auto, auto visit) { visit(__half{}); }("
    yield launch, "with_kind(kind, launch_kind)", "launch_kind(std::integral_constant<Kind, Kind::gru>{})"
    yield launcher, f'"{launch}"', f'"{extra}"'
    for variant, names in (("extra", ("float", "__half", "__nv_bfloat16")), ("projected", ("float", "__nv_bfloat16"))):
        for name in names:
            yield extra, f"INSTANTIATE(Variant::{variant}, {name});\n", ""
    yield "rnn/layer.h", "// The four modes", "bool planted(int fault);\n// The four modes"
    yield launcher, "FUSED_OPS_CUDA_LIBRARY(m)", SWITCH
    for number, (file, old, new, _) in enumerate(FAULTS[direction].values(), 1):
        yield f"rnn/{file}", old, new.replace("PLANTED", f"planted({number})")


def layers() -> list[Layer]:
    extras = {"time": 3, "batch": 9, "hidden": 19, "states": 11, "resets": True, "mask": True, "zoneout": "masks"}
    return [
        layer_case("gru", dtype=torch.float16, **CASES["lengths and resets"]),
        *(layer_case("lstm", dtype=torch.float16, **extras, norm=norm) for norm in (True, False)),
    ]


def said(direction: str) -> str:
    """What is said of the planted fault, "" if nothing."""
    try:
        for layer in layers():
            for design in DESIGNS:
                with chip(design):
                    check(layer) if direction == "fwd" else check_backward(layer, as_left(layer))
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def try_every_fault(direction: str) -> None:
    """Prints what is said of each, by name, and of none."""
    plant, found = ctypes.CDLL(str(extension.EMULATOR)).fused_ops_plant, {}
    for number, name in enumerate(("none", *FAULTS[direction])):
        plant(number)
        found[name] = said(direction)
    print(json.dumps(found))


@pytest.mark.parametrize("direction", FAULTS)
def test_wrong_kernels_are_caught_and_the_right_ones_pass(direction, tmp_path):
    library = build_mutant(tmp_path / "build", f"rnn/layer_{direction}.cu", *changes(direction))
    code = f"from tests.rnn.test_layers_mutants_emulated import try_every_fault; try_every_fault({direction!r})"
    done = run_on(library, code, tmp_path / "package")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    wanted = {"none": "^$"} | {name: fault[-1] for name, fault in FAULTS[direction].items()}
    assert {name: text for name, text in found.items() if not re.search(wanted[name], text)} == {}
