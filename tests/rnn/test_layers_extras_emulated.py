"""The layers' CUDA kernels with extras on the CPU: mask, zoneout, layer norm, projection; forward and backward."""

import re

import pytest
import torch
from torch import Tensor

from fused_ops.core import extension
from tests.emulation import every_schedule, needs_emulator, run_on, set_seed
from tests.emulation.build import build_mutant
from tests.rnn.emulated_steps import (
    RESULTS,
    case,
    check,
    check_backward,
    gradients_for,
    hats,
    poisoned,
    replay,
    run,
    run_backward,
    truth,
)
from tests.rnn.layer_oracle import GATES, Layer
from tests.rnn.test_layers_emulated import DESIGNS, chip
from tests.support import randn

pytestmark = needs_emulator
needs_host = pytest.mark.skipif(extension.host is None, reason="_host was not built")

DTYPES = (torch.float16, torch.float32, torch.bfloat16)
ENDED = {"time": 4, "batch": 9, "hidden": 19, "directions": 2, "lengths": [4, 0, 3, 1, 2, 4, 4, 4, 3]}
PACKED = {"time": 5, "batch": 5, "hidden": 20, "directions": 2, "lengths": [5, 4, 2, 2, 1], "packed": True}
# Sizes, and what of norm, projected, mask, zoneout there is.
CASES = {
    "mask and zones": {**ENDED, "resets": True, "mask": True, "zoneout": "masks"},
    "expected zoneout": {**PACKED, "mask": True, "zoneout": 0.3},
    "norm": {**ENDED, "resets": True, "norm": True},
    "norm and all": {**PACKED, "resets": True, "norm": True, "mask": True, "zoneout": "masks"},
    "norm, no bias": {"time": 2, "batch": 17, "hidden": 40, "norm": True, "bias": False, "zoneout": 0.2},
    "one of all": {"time": 1, "batch": 1, "hidden": 1, "norm": True, "seed": 3},
}
PROJECTED = {
    "projected": {**ENDED, "resets": True, "projected": 7},
    "projected, mask and zones": {**PACKED, "resets": True, "projected": 11, "mask": True, "zoneout": "masks"},
    "projected, norm and all": {**ENDED, "resets": True, "projected": 13, "norm": True, "mask": True, "zoneout": 0.3},
    "projected to one": {"time": 2, "batch": 18, "hidden": 33, "projected": 1, "norm": True},
}
EVERY = [(mode, name) for name in CASES for mode in GATES] + [("lstm", name) for name in PROJECTED]


def by_name(name: str, mode: str = "lstm", dtype: torch.dtype = torch.float16) -> Layer:
    return case(mode, dtype, **(CASES | PROJECTED)[name])


@pytest.fixture(params=DESIGNS)
def design(request):
    with chip(request.param):
        yield request.param


@pytest.mark.parametrize("mode, name", EVERY)
def test_the_formulas_are_autograds(mode, name):
    layer = vars(by_name(name, mode, torch.float64))
    layer = Layer(**{n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in layer.items()})
    layer.gi = layer.gi.nan_to_num(0.0)
    grads = gradients_for(layer)
    found, exact = truth(layer, grads)
    made = replay(layer, grads, found, hats(layer, found), exact)
    for key, value in made.items():
        torch.testing.assert_close(value, exact[key], rtol=1e-8, atol=1e-8, msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.parametrize("mode, name, dtype", [(*pair, DTYPES[i % 3]) for i, pair in enumerate(EVERY)], ids=str)
def test_steps_and_slopes(mode, name, dtype, design):
    layer = by_name(name, mode, dtype)
    check_backward(layer, check(layer))


@every_schedule
def test_every_schedule(design):
    layer = case("lstm", torch.float16, time=2, batch=9, hidden=19, projected=9, norm=True, mask=True, zoneout="masks")
    check_backward(layer, check(layer))


@needs_host
@pytest.mark.parametrize("backward", (False, True))
def test_these_designs_share_units_and_features_among_several_blocks(design, backward):
    version, sms = DESIGNS[design]
    for hidden, projected in ((19, 0), (19, 13), (33, 1), (70, 30)):
        found = extension.host.plan_rnn_layer(
            "lstm", backward, hidden, 9, 2, 2, sms, 227 * 1024, version, projected, layer_norm=True
        )
        assert found["design"] == design and found["slices"] > 1 and found["groups"] > 1


def row(layer: Layer, b: int) -> Layer:
    """Row b alone; of a padded layer."""
    steps, batch = layer.steps, layer.h0.size(1)
    parts = dict(vars(layer))
    parts["gi"] = layer.gi.unflatten(0, (steps, batch))[:, b].contiguous()
    for name in ("h0", "c0", "resets", "mask"):
        parts[name] = None if parts[name] is None else parts[name][:, b : b + 1].contiguous()
    for name in ("zone_h", "zone_c"):
        zone = parts[name]
        parts[name] = None if zone is None else zone.unflatten(1, (steps, batch))[:, :, b].contiguous()
    parts["lengths"] = layer.lengths[b : b + 1]
    return Layer(**parts)


def both(layer: Layer, grads) -> dict[str, Tensor]:
    found, grads = poisoned(layer, run(layer), grads)
    return found | run_backward(layer, grads, found, hats(layer, found))


@pytest.mark.parametrize(
    "mode, dtype, projected",
    [("gru", torch.bfloat16, 0), ("lstm", torch.float32, 0), ("lstm", torch.float16, 21)],
    ids=str,
)
def test_a_row_is_the_same_alone_in_any_batch_and_again(mode, dtype, projected, design):
    layer = case(
        mode, dtype, time=2, batch=18, hidden=70, lengths=[2, 1, 2] * 6, resets=True, norm=True, projected=projected
    )
    grads = gradients_for(layer)
    whole = both(layer, grads)
    set_seed(5)
    try:
        again = both(layer, grads)
    finally:
        set_seed(0)
    for name, value in whole.items():
        assert torch.equal(value.nan_to_num(7.0), again[name].nan_to_num(7.0)), name
    for b in (0, 17):
        alone_grads = [None if g is None else g[:, b : b + 1].contiguous() for g in grads[1:3]]
        by_output = grads[0].unflatten(0, (2, 18))[:, b].contiguous()
        by_c = None if grads[3] is None else grads[3].unflatten(1, (2, 18))[:, :, b].contiguous()
        for name, value in both(row(layer, b), (by_output, *alone_grads, by_c)).items():
            wanted = whole[name]
            if name in ("h_n", "c_n", "dh0", "dc0"):
                wanted = wanted[:, b : b + 1] if wanted.numel() else wanted
            elif wanted.numel():
                axis = 1 if name in ("c_all", "kept") else 0
                wanted = wanted.unflatten(axis, (2, 18)).select(axis + 1, b)
            assert torch.equal(value.nan_to_num(7.0), wanted.nan_to_num(7.0)), name
    if design == "cluster":  # a grid's units, over which a norm is summed, are the chip's
        with chip(design, 13):
            crowded = both(layer, grads)
        assert all(torch.equal(v.nan_to_num(7.0), crowded[name].nan_to_num(7.0)) for name, v in whole.items())


def test_no_rows_and_no_steps(design):
    for sizes in ({"batch": 0}, {"time": 0}, {"lengths": [0, 0, 0]}):
        layer = case("lstm", torch.float16, norm=True, projected=4, zoneout=0.2, **sizes)
        grads, found = gradients_for(layer), run(layer)
        assert torch.equal(found["h_n"], layer.h0) and torch.equal(found["c_n"], layer.c0)
        own = run_backward(layer, grads, found, hats(layer, found))
        assert not found["output"].any() and all(not own[name].any() for name in RESULTS[:4])
        assert torch.equal(own["dh0"], grads[1]) and torch.equal(own["dc0"], grads[2])


def test_the_ops_as_torch_sees_them():
    layer = case("lstm", torch.float16, time=2, batch=2, norm=True, projected=4, mask=True, zoneout="masks")
    forward, backward = torch.ops.fused_ops.rnn_layer_fwd_cuda, torch.ops.fused_ops.rnn_layer_bwd_cuda
    torch.library.opcheck(forward.default, layer.fwd_arguments())
    found = run(layer)
    saved = (found["output"], found["c_all"], found["kept"], hats(layer, found))
    torch.library.opcheck(backward.default, layer.bwd_arguments(gradients_for(layer), *saved))


def test_what_it_cannot_serve_is_said():
    plain, normed = case("gru", torch.float16), case("lstm", torch.float16, norm=True)
    half, single = randn(1, 3, 5).half(), randn(1, 3, 6)
    for layer, change, said in (
        (plain, {"mask": half}, "mask has the wrong shape"),
        (plain, {"mask": single}, "from a tensor of Float"),
        (plain, {"zoneout_h": 1.5}, "zoneout must be from 0 to 1, got 1.5"),
        (plain, {"zoneout_c": 0.5}, "are the LSTM's"),
        (plain, {"w_hr": half}, "are the LSTM's"),
        (plain, {"b_hh": single}, "a layer norm needs norm_hh"),
        (plain, {"h0": half, "w_hh": plain.w_hh[..., :5].contiguous()}, "h0 must have 6 features without w_hr, got 5"),
        (normed, {"norm_c": None}, "an LSTM with norm_hh needs norm_c and bias_c"),
        (normed, {"norm_hh": normed.norm_hh.half()}, "from a tensor of Half"),
    ):
        with pytest.raises(RuntimeError, match=said):
            run(Layer(**vars(layer) | change))
    found, grads = run(normed), gradients_for(normed)
    with pytest.raises(RuntimeError, match="norm_hh goes with hat_hh and rstd_hh"):
        run_backward(normed, grads, found, (None,) * 4)
    wide = case("lstm", torch.float16, time=1, batch=1, hidden=340, projected=339)
    with chip("grid", 3), pytest.raises(RuntimeError, match="W_hh of hidden size 340 does not fit"):
        run(wide)


# What is replaced in a file of csrc/rnn, and what is said of it. Of the kernels, the projected ones in half precision
# alone are built.
MUTANTS = {
    "fwd: a norm's sums are added before the blocks have met": (
        "row_norm.cuh", "    });\n    exchange.meet();", "    });", "race: reads|which nobody has written"
    ),
    "fwd: both norms' sums in one place": (
        "exchange.cuh", "(which * slices_ + slice_) * rows_", "slice_ * rows_", "race: |nobody has written"
    ),
    "fwd: a state is projected before all of it is there": (
        "exchange.cuh", "void hand_on() {\n    __syncthreads();", "void hand_on() {", "race: "
    ),
    "bwd: a mean is left out of the norm's derivative": (
        "layer_bwd.cuh", "by_norm - mean.first - layer_.hat", "by_norm - layer_.hat", "through: error"
    ),
}  # fmt: skip


def only_one(d: str) -> tuple[tuple[str, str, str], ...]:
    """Changes that leave one projected kernel of each design, in one file."""
    launcher, extra = f"rnn/layer_{d}.cu", f"rnn/layer_{d}_extra.cu"
    others = [("extra", name) for name in ("float", "__half", "__nv_bfloat16")]
    others += [("projected", name) for name in ("float", "__nv_bfloat16")]
    projected = "run(std::integral_constant<Variant, Variant::projected>{})"
    return (
        (launcher, "with_variant(extras.variant(), run)", projected),
        (launcher, "dispatch_float(", "[](auto, auto, auto visit) { visit(__half{}); }("),
        (launcher, f'"rnn/layer_{d}_launch.h"', f'"{extra}"'),
        *((extra, f"INSTANTIATE(Variant::{variant}, {name});\n", "") for variant, name in others),
    )


CASE = "from tests.rnn.test_layers_extras_emulated import check_both_designs; check_both_designs({backward})"


def check_both_designs(backward: bool):
    layer = case("lstm", torch.float16, time=3, batch=9, hidden=19, projected=11, norm=True, zoneout="masks")
    for name in DESIGNS:
        with chip(name):
            check_backward(layer, truth_of(layer)) if backward else check(layer)


def truth_of(layer: Layer) -> dict[str, Tensor]:
    """What a forward would leave, in the layer's dtype."""
    double = Layer(
        **{n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in vars(layer).items()}
    )
    found, _ = truth(double, gradients_for(double))
    return {n: v.float() if n == "c_all" else v.to(layer.w_hh.dtype) for n, v in found.items()}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_caught(name, tmp_path):
    file, old, new, said = MUTANTS[name]
    d = name[:3]
    library = build_mutant(tmp_path / "build", f"rnn/layer_{d}.cu", (f"rnn/{file}", old, new), *only_one(d))
    done = run_on(library, CASE.format(backward=d == "bwd"), tmp_path / "package")
    assert done.returncode == 1 and re.search(said, done.stderr), done.stderr


def test_the_same_cases_pass_with_the_right_kernels():
    check_both_designs(False)
    check_both_designs(True)
