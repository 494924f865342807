"""The layers' CUDA kernels on the CPU, forward and backward: each step in float64, every access checked."""

import pytest
import torch

from fused_ops.core import extension
from tests.emulation import every_schedule, needs_emulator
from tests.rnn import layer_oracle
from tests.rnn.emulated_steps import (
    DESIGNS,
    check,
    check_backward,
    check_rows,
    chip,
    gradients,
    replay,
    run,
    run_backward,
)
from tests.rnn.layer_oracle import BACKWARD, GATES, Layer, layer_case, random_grads
from tests.support import assert_accurate

pytestmark = needs_emulator
needs_host = pytest.mark.skipif(extension.host is None, reason="_host was not built")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ENDED = {"time": 3, "batch": 9, "hidden": 19, "directions": 2, "lengths": [3, 0, 2, 1, 2, 3, 3, 3, 2]}
PACKED = {"time": 4, "batch": 5, "hidden": 12, "directions": 2, "lengths": [4, 3, 2, 2, 1], "packed": True}
CASES = {
    "one of all": {"time": 1, "batch": 1, "hidden": 1, "directions": 2},
    "no biases": {"time": 3, "hidden": 33, "bias": False},
    "17 rows": {"time": 2, "batch": 17, "hidden": 40},
    "33 rows": {"time": 2, "batch": 33, "hidden": 9, "directions": 2},
    "wide": {"time": 2, "batch": 2, "hidden": 96},
    "lengths and resets": {**ENDED, "resets": True},
    "packed and resets": {**PACKED, "resets": True},
}
EVERY = [(mode, case) for mode in GATES for case in CASES]


@pytest.fixture(params=DESIGNS)
def design(request):
    with chip(request.param):
        yield request.param


def plan(layer: Layer, design: str, sms: int, backward: bool = False) -> dict:
    size, (directions, batch, hidden), version = layer.w_hh.element_size(), layer.h0.shape, DESIGNS[design][0]
    return extension.host.plan_rnn_layer(
        layer.mode, backward, hidden, batch, directions, size, sms, 227 * 1024, version
    )


@needs_host
def test_these_designs_share_the_units_among_several_blocks(design):
    for sizes in (CASES["lengths and resets"], CASES["packed and resets"], {"hidden": 37, "directions": 2}):
        for backward in (False, True):
            layer = layer_case("lstm", dtype=torch.float16, **sizes)
            found = plan(layer, design, DESIGNS[design][1], backward)
            assert found["design"] == design and found["slices"] > 1 and found["groups"] > 1


@pytest.mark.parametrize("mode, case", EVERY)
def test_the_formulas_are_autograds(mode, case):
    layer = layer_case(mode, dtype=torch.float64, **CASES[case])
    grads, found = random_grads(layer), layer_oracle.forward(layer)
    exact = layer_oracle.backward(layer, grads)
    for name, value in replay(layer, grads, found, exact).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", GATES)
def test_steps_of_every_kind(mode, dtype, design):
    layer = layer_case(mode, time=3, batch=3, hidden=37, directions=2, dtype=dtype, lengths=[3, 0, 2], resets=True)
    check_backward(layer, check(layer))


@pytest.mark.parametrize("mode, case, dtype", [(*pair, DTYPES[i % 3]) for i, pair in enumerate(EVERY)], ids=str)
def test_steps_of_every_shape(mode, case, dtype, design):
    layer = layer_case(mode, dtype=dtype, **CASES[case])
    check_backward(layer, check(layer))


@every_schedule
@pytest.mark.parametrize("mode, case", list(zip(GATES, ("packed and resets", "lengths and resets") * 2)))
def test_steps_in_every_schedule(mode, case, design):
    layer = layer_case(mode, dtype=torch.float16, **CASES[case])
    check_backward(layer, check(layer))


# (design, multiprocessors, layer, what the planner makes of its forward)
PARTITIONS = {
    "cluster of 8, 32 rows": ("cluster", 8, {"mode": "lstm", "batch": 30, "hidden": 64}, {"rows": 32, "slices": 8}),
    "cluster of 5, 16 rows": ("cluster", 5, {"mode": "gru", "batch": 10, "hidden": 36}, {"rows": 16, "slices": 5}),
    "cluster of 14": ("cluster", 132, {"mode": "rnn_relu", "batch": 2, "hidden": 550}, {"slices": 14, "splits": 4}),
    "whole sums of a warp": ("cluster", 132, {"mode": "lstm", "batch": 1, "hidden": 30}, {"splits": 1}),
    "grid, 32 rows": ("grid", 3, {"mode": "lstm", "batch": 80, "hidden": 16}, {"rows": 32, "groups": 3}),
    "grid, 16 rows, launch after launch": (
        "grid", 2, {"mode": "gru", "batch": 40, "hidden": 23, "directions": 2}, {"rows": 16, "launches": 3}
    ),
    "grid, sums of 8 warps": ("grid", 8, {"mode": "lstm", "batch": 2, "hidden": 270}, {"splits": 8}),
    "grid, sums of 4 warps": ("grid", 5, {"mode": "gru", "batch": 3, "hidden": 130}, {"splits": 4, "slices": 5}),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTITIONS)
@needs_host
def test_every_partition(name):
    design, sms, sizes, wanted = PARTITIONS[name]
    layer = layer_case(time=2, dtype=torch.float16, **sizes)
    found = plan(layer, design, sms)
    assert {"design": design, **wanted}.items() <= found.items(), found
    with chip(design, sms):
        check_backward(layer, check(layer))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("mode", GATES)
def test_whole_sequences_are_as_accurate_as_torch(mode, dtype, design):
    layer = layer_case(mode, time=7, batch=2, hidden=20, dtype=dtype)
    grads, found, wide = random_grads(layer), run(layer), layer.to(torch.float64)
    exact, own = layer_oracle.forward(wide), layer_oracle.forward(layer)
    for name, value in found.items():
        assert_accurate(value, exact[name], own[name].to(value.dtype), terms=20)
    exact = layer_oracle.backward(wide, [None if g is None else g.double() for g in grads])
    own = layer_oracle.backward(layer, grads)
    for name, value in run_backward(layer, grads, found).items():
        assert_accurate(value, exact[name], own[name].to(value.dtype), factor=3.0, terms=20)


@pytest.mark.parametrize(
    "mode, dtype",
    [("rnn_tanh", torch.float16), ("gru", torch.bfloat16), ("gru", torch.float32), ("lstm", torch.float32)],
    ids=str,
)
def test_a_row_is_the_same_alone_in_any_batch_and_again(mode, dtype, design):
    check_rows(layer_case(mode, 2, 10, 40, 1, dtype, lengths=[2, 1] * 5, resets=True), design, 4)


@pytest.mark.parametrize("mode", GATES)
def test_nothing_is_kept_for_a_call_without_derivatives(mode, design):
    layer = layer_case(mode, hidden=8, dtype=torch.bfloat16)
    kept, bare = run(layer), run(layer, keep=False)
    assert bare["c_all"].numel() == bare["kept"].numel() == 0
    assert all(torch.equal(bare[name], kept[name]) for name in ("output", "h_n", "c_n"))


@pytest.mark.parametrize("which", range(4), ids=layer_oracle.FORWARD[:4])
def test_each_gradient_alone(which, design):
    layer = layer_case("lstm", dtype=torch.float16, **CASES["lengths and resets"])
    grads = tuple(g if i == which else None for i, g in enumerate(gradients(layer)))
    check_backward(layer, check(layer), grads)


def test_no_gradient_at_all_is_zeros(design):
    layer = layer_case("gru", dtype=torch.bfloat16)
    assert all(not t.any() for t in check_backward(layer, check(layer), (None,) * 4).values())


ALL = {"norm": True, "states": 4, "mask": True, "zoneout": "masks"}


@pytest.mark.parametrize("mode, extras", [("gru", {}), ("lstm", {}), ("lstm", ALL)], ids=("gru", "lstm", "extras"))
def test_what_a_reset_discards_may_be_nan(mode, extras, design):
    layer = layer_case(mode, 3, 3, 10, 2, torch.float16, **extras)
    layer.resets, layer.h0 = torch.ones(3, 3, dtype=torch.bool), torch.full_like(layer.h0, float("nan"))
    layer.c0 = None if layer.c0 is None else torch.full_like(layer.c0, float("nan"))
    found = check(layer)
    own = check_backward(layer, found)
    assert all(value.isfinite().all() for value in (found | own).values())
    assert not own["dh0"].any() and not own["dc0"].any()


def test_resets_nowhere(design):
    layer = layer_case("gru", dtype=torch.float16, directions=2, hidden=10)
    layer.resets = torch.zeros(layer.steps, 3, dtype=torch.bool)
    found, layer.resets = run(layer), None
    assert all(torch.equal(value, found[name]) for name, value in run(layer).items())


@pytest.mark.parametrize("extras", ({}, ALL), ids=("plain", "extras"))
def test_no_rows_and_no_steps(extras, design):
    for sizes in ({"batch": 0}, {"time": 0}, {"lengths": [0, 0, 0]}):
        layer = layer_case("lstm", dtype=torch.float16, **sizes, **extras)
        grads, found = gradients(layer), run(layer)
        assert torch.equal(found["h_n"], layer.h0) and torch.equal(found["c_n"], layer.c0)
        assert found["output"].shape == (layer.gi.size(0), layer.h0.size(2)) and not found["output"].any()
        found |= zip(layer_oracle.HATS, layer_oracle.hats(layer_oracle.forward(layer), layer))
        own = run_backward(layer, grads, found)
        assert own["slopes"].shape == (layer.gi.size(0), 1, 4, 6) and not any(own[n].any() for n in BACKWARD[:4])
        assert torch.equal(own["dh0"], grads[1]) and torch.equal(own["dc0"], grads[2])


@pytest.mark.parametrize("mode, extras", [("rnn_tanh", {}), ("lstm", ALL)], ids=("plain", "extras"))
def test_the_ops_as_torch_sees_them(mode, extras):
    layer = layer_case(mode, 2, 2, 5, 2, torch.float16, **extras)
    ops, found = torch.ops.fused_ops, check(layer)
    torch.library.opcheck(ops.rnn_layer_fwd_cuda.default, layer.fwd_arguments())
    saved, hats = [found[n] for n in ("output", "c_all", "kept")], [found.get(n) for n in layer_oracle.HATS]
    torch.library.opcheck(ops.rnn_layer_bwd_cuda.default, layer.bwd_arguments(random_grads(layer), *saved, hats))


def test_what_it_cannot_serve_is_said():
    layer = layer_case("gru", dtype=torch.float16)
    for change, said in (
        ({"mode": "elman"}, "mode must be .*, got elman"),
        ({"steps": 4}, "there must be steps·batch tokens, got 15"),
        ({"h0": layer.h0[:, :2]}, "there must be steps·batch tokens"),
        ({"w_hh": layer.w_hh[:, :17]}, "w_hh has the wrong shape"),
        ({"gi": layer.gi.half()}, "a kernel reads Float from a tensor of Half"),
        ({"c0": layer.h0}, "c0 is the LSTM's"),
        ({"lengths": torch.tensor([1, 2])}, "lengths has the wrong shape"),
    ):
        with pytest.raises(RuntimeError, match=said):
            run(Layer(**(vars(layer) | change)))
    grads, found = random_grads(layer), run(layer)
    for change, by, said in (
        ({"mode": "lru"}, grads, "mode must be"),
        ({"w_hh": layer.w_hh[:, 1:]}, grads, "w_hh has the wrong shape"),
        ({}, (*grads[:2], grads[1], None), "only an LSTM has gradients of c"),
        ({"c0": layer.h0}, grads, "c0 is the LSTM's"),
        ({}, (grads[0].t().contiguous().t(), *grads[1:]), "grad_output must be contiguous"),
        ({}, (grads[0].float(), *grads[1:]), "from a tensor of Float"),
    ):
        with pytest.raises(RuntimeError, match=said):
            run_backward(Layer(**(vars(layer) | change)), by, found)


def test_a_layer_that_does_not_fit_is_refused():
    wide, said = layer_case("gru", 1, 1, 700, 1, torch.float16), r"W_hh of hidden size 700 does not fit .* 1 multip"
    found = {"output": wide.h0[0], "c_all": torch.zeros(0), "kept": wide.h0.expand(1, 4, 700)[:, None].contiguous()}
    for call in (run, lambda layer: run_backward(layer, random_grads(layer), found)):
        with chip("grid", 1), pytest.raises(RuntimeError, match=said):
            call(wide)
