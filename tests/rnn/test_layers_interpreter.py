"""The Triton layers, interpreted on the CPU, against plain PyTorch in float64; and wrong kernels, to be caught."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from fused_ops.core.device import TRITON_INTERPRETED
from fused_ops.rnn import layers
from tests.rnn import layer_oracle
from tests.rnn.gpu_sequences import check_extras
from tests.rnn.layer_oracle import layer_case, of_row, random_grads, row
from tests.support import assert_accurate, noncontiguous, randn

pytestmark = [
    pytest.mark.skipif(not TRITON_INTERPRETED, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning"),
]

MODES = ("rnn_tanh", "rnn_relu", "gru", "lstm")
DESIGNS = ("fused", "steps")
VARLEN = {"time": 3, "lengths": [2, 0, 3], "resets": True}
SHORT = {"time": 2, "lengths": [1, 0, 2], "resets": True}
PACKED = {"time": 2, "lengths": [2, 2, 1], "packed": True, "directions": 2}
CASES = {
    "plain": {"time": 2, "bias": False},
    "lengths and resets": VARLEN | {"directions": 2},
    "packed": PACKED | {"mask": True},
    "zoneout": VARLEN | {"zoneout": "masks", "mask": True},
    "expected zoneout": VARLEN | {"zoneout": 0.3},
    "norms": SHORT | {"norm": True},
    "norms and masks": SHORT | {"norm": True, "bias": False, "zoneout": "masks", "mask": True},
}
OF_LSTM = {
    "zones of h": {"time": 2, "zoneout": ("masks", None)},
    "zones of c": {"time": 2, "zoneout": (None, "masks")},
    "expected zoneout of h": {"time": 2, "zoneout": (0.3, None)},
    "expected zoneout of c": {"time": 2, "states": 6, "zoneout": (None, 0.3)},
    "projected": SHORT | {"states": 3},
    "projected and masked": SHORT | {"states": 3, "zoneout": "masks", "mask": True},
    "projected and normed": PACKED | {"norm": True, "states": 4, "zoneout": 0.3},
}
OF_RNN = {
    "rnn_tanh": ("lengths and resets", "zoneout", "expected zoneout", "norms and masks"),
    "rnn_relu": ("plain", "packed", "norms"),
}
EVERY = [(mode, case) for mode in MODES for case in OF_RNN.get(mode, CASES)] + [("lstm", case) for case in OF_LSTM]


def kernels():
    from fused_ops.rnn import triton_layers

    return triton_layers


def use(module, design: str, monkeypatch, rows: int = 4) -> None:
    """Plans `module` for a layer of six units to have more than one tile."""

    def plan(is_fused: bool, **blocks: int):
        return lambda *_: module.Plan(is_fused, blocks, 4, 1)

    tiles = {"BLOCK_B": rows, "BLOCK_U": 4, "BLOCK_K": 16}
    fused = plan(True, BLOCK_B=rows, BLOCK_H=16, BLOCK_P=16)
    monkeypatch.setattr(module, "plan", fused if design == "fused" else plan(False, **tiles))
    monkeypatch.setattr(module, "plan_product", plan(False, **tiles | {"BLOCK_U": 16}))
    monkeypatch.setattr(module, "plan_rows", plan(False, BLOCK=4))


@pytest.fixture(params=DESIGNS)
def design(request, monkeypatch):
    use(kernels(), request.param, monkeypatch)
    return request.param


def run(layer, grads=None, module=None, hats=None):
    """The op's results by name, and those of its backward where `grads` are given; hats: by default the oracle's."""
    module = module or kernels()
    found = dict(zip(layer_oracle.FORWARD, module.rnn_layer_fwd(*layer.fwd_arguments()), strict=True))
    if grads is not None:
        if hats is None:
            hats = layer_oracle.hats(layer_oracle.forward(layer), layer) if layer.norm_hh is not None else (None,) * 4
        arguments = layer.bwd_arguments(grads, found["output"], found["c_all"], found["kept"], hats)
        found |= zip(layer_oracle.BACKWARD, module.rnn_layer_bwd(*arguments), strict=True)
    return found


def truth(layer, grads):
    with torch.enable_grad():
        found = layer_oracle.forward(layer) | layer_oracle.backward(layer, grads)
    return {name: found[name].detach() for name in (*layer_oracle.FORWARD, *layer_oracle.BACKWARD)}


def check(layer, grads=None, module=None):
    """Every result is as accurate as the oracle in its dtype. Of kept and c_all, only what is not padding counts."""
    grads = random_grads(layer) if grads is None else grads
    found = run(layer, grads, module)
    exact = truth(layer.to(torch.float64), [g if g is None else g.double() for g in grads])
    own, places = truth(layer, grads), layer.places()
    for name, value in found.items():
        wanted, peer = exact[name], own[name].to(value.dtype)
        if name in ("c_all", "kept") and value.numel():
            value, wanted, peer = (t[:, places] for t in (value, wanted, peer))
        factor = 3.0 if name in layer_oracle.BACKWARD else 2.0
        assert_accurate(value, wanted, peer, factor=factor, terms=layer.h0.size(-1))
    return found


@pytest.mark.parametrize("mode, case", EVERY)
def test_values_and_gradients(mode, case, design):
    check(layer_case(mode, **(CASES | OF_LSTM)[case]))


@pytest.mark.parametrize("mode", ("gru", "lstm"))
def test_half_precision(mode, design):
    check(layer_case(mode, dtype=torch.float16, **VARLEN))


@pytest.mark.parametrize("mode, states", (("gru", None), ("lstm", 5)))
def test_norms_in_half_precision(mode, states, design):
    check(layer_case(mode, dtype=torch.float16, time=2, lengths=[2, 0], batch=2, norm=True, states=states))


@pytest.mark.parametrize("mode", ("rnn_tanh", "rnn_relu"))
def test_expected_zoneout_of_an_rnn_in_half_precision(mode, design):
    check(layer_case(mode, dtype=torch.float16, time=3, zoneout=0.4))


@pytest.mark.parametrize("mode, extras", (("gru", {}), ("lstm", {"norm": True, "states": 3, "zoneout": 0.3})), ids=str)
def test_what_a_reset_discards_may_be_nan(mode, extras, design):
    layer = layer_case(mode, time=2, **extras)
    layer.resets, layer.h0 = torch.ones(2, 3, dtype=torch.bool), torch.full_like(layer.h0, float("nan"))
    layer.c0 = None if layer.c0 is None else torch.full_like(layer.c0, float("nan"))
    assert all(value.isfinite().all() for value in check(layer).values())


@pytest.mark.parametrize("given", range(4), ids=("output", "h_n", "c_n", "c_all"))
def test_gradients_of_one_result(given, design):
    layer = layer_case("lstm", time=2, batch=2)
    check(layer, [g if i == given else None for i, g in enumerate(random_grads(layer))])


@pytest.mark.parametrize("mode", MODES)
def test_one_step_of_one_unit(mode, design):
    check(layer_case(mode, time=1, hidden=1, directions=2))


@pytest.mark.parametrize("mode, extras", (("gru", {}), ("lstm", {"norm": True, "states": 3})), ids=("plain", "extras"))
def test_a_row_alone_is_what_it_is_in_a_batch(mode, extras, design, monkeypatch):
    use(kernels(), design, monkeypatch, rows=2)
    layer = layer_case(mode, time=2, batch=3, **extras)
    grads = dict(zip(layer_oracle.FORWARD, random_grads(layer)))
    hats = dict(zip(layer_oracle.HATS, layer_oracle.hats(layer_oracle.forward(layer), layer)))
    whole = run(layer, tuple(grads.values()), hats=hats.values())
    mine, my_hats = ([of_row(layer, name, t, 2) for name, t in part.items()] for part in (grads, hats))
    for name, value in run(row(layer, 2), mine, hats=my_hats).items():
        assert torch.equal(value, of_row(layer, name, whole[name], 2)), name


@pytest.mark.parametrize("mode", ("rnn_relu", "lstm"))
def test_nan_and_infinity_stay_in_their_row(mode, design):
    layer = layer_case(mode, time=2)
    grads = random_grads(layer)
    clean = run(layer, grads)
    layer.gi[0, 0, 0, 3], layer.gi[2, 0, 0, 2] = float("nan"), float("inf")
    found = run(layer, grads)
    for name in ("output", "slopes"):
        value, wanted = (t[name].view(2, 3, -1)[:, 1] for t in (found, clean))
        assert torch.equal(value, wanted)
    assert found["output"][0].isnan().any() and found["dh0"][:, 1].equal(clean["dh0"][:, 1])


def test_saturated_gates(design):
    layer = layer_case("lstm", time=2)
    layer.gi *= 60.0
    assert all(value.isfinite().all() for value in check(layer).values())


@pytest.mark.parametrize("mode, hidden, is_fused", (("lstm", 50, True), ("gru", 130, False)), ids=str)
def test_the_planned_tiles(mode, hidden, is_fused):
    """Of sizes that fill none."""
    assert kernels().plan(mode, hidden, None, "half", True, False, False, (9, 0)).is_fused == is_fused
    check(layer_case(mode, time=2, batch=2, hidden=hidden, dtype=torch.float16))


def test_nothing_to_do():
    for mode in MODES:
        layer = layer_case(mode, batch=0)
        found = run(layer, random_grads(layer))
        assert found["output"].shape == (0, 6) and found["slopes"].numel() == 0
        layer = layer_case(mode, time=0)
        grads = random_grads(layer)
        found = run(layer, grads)
        assert torch.equal(found["h_n"], layer.h0) and torch.equal(found["dh0"], grads[1])
        layer = layer_case(mode, lengths=[0, 0, 0])
        found = run(layer, random_grads(layer))
        assert torch.equal(found["h_n"], layer.h0) and not found["output"].any() and not found["slopes"].any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_projection(dtype):
    project = kernels().rnn_project
    for rows, inputs, outputs in ((3, 5, 7), (130, 33, 70), (1, 1, 1), (2, 64, 64)):
        x, w, bias = randn(rows, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype), randn(outputs)
        found = project(noncontiguous(x), w.t().contiguous().t(), bias)
        assert found.dtype == torch.float32
        assert_accurate(found, x.double() @ w.double().t() + bias, terms=inputs)
        assert torch.equal(project(x[rows - 1 :], w, None) + bias, found[rows - 1 :])
    assert project(randn(0, 3), randn(4, 3), None).shape == (0, 4)


WHOLE = {
    "plain": ("gru", set(), torch.float32),
    "normed": ("rnn_relu", {"norm", "zoneout"}, torch.float32),
    "packed": ("lstm", {"masks", "zones"}, torch.float16),
    "everything": ("lstm", {"norm", "masks", "zones"}, torch.float32),
    "everything in a half type": ("gru", {"norm", "masks", "zoneout"}, torch.float16),
}


@pytest.mark.parametrize("what", WHOLE)
def test_a_whole_call(what):
    """Two layers, both directions, through the driver."""
    mode, extras, dtype = WHOLE[what]
    check_extras("triton", mode, extras, dtype, "cpu", packs=what == "packed")


@pytest.mark.parametrize("case", ({}, {"norm": True, "states": 3}), ids=("plain", "projected and normed"))
def test_the_ops(case):
    layer = layer_case("lstm", time=2, directions=2, **case)
    grads = random_grads(layer)
    hats = layer_oracle.hats(layer_oracle.forward(layer), layer)
    forward, backward = torch.ops.fused_ops.rnn_layer_fwd_triton, torch.ops.fused_ops.rnn_layer_bwd_triton
    output, _, _, c_all, kept = forward(*layer.fwd_arguments())
    for op, arguments in (
        (forward, layer.fwd_arguments()),
        (backward, layer.bwd_arguments(grads, output, c_all, kept, hats)),
        (torch.ops.fused_ops.rnn_project_triton, (randn(3, 5), randn(4, 5), None)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_an_rnn_keeps_of_an_expected_zoneout():
    arguments = layer_case("rnn_relu", zoneout=0.3).fwd_arguments()
    forward = torch.ops.fused_ops.rnn_layer_fwd_triton
    assert forward(*arguments)[-1].shape == (1, 15, 1, 6)
    torch.library.opcheck(forward.default, arguments, test_utils=("test_schema", "test_faketensor"))


# Name: mode, design, case, what is replaced, by what.
MUTANTS = {
    "an input gate is lost": ("lstm", "fused", "plain", "b_f * b_c + b_i * b_g", "b_f * b_c + b_g"),
    "the reset gate misses the product": ("gru", "steps", "plain", "b_x[2] + b_r * b_q", "b_x[2] + b_q"),
    "reversed rows begin at the longest's end": (
        "gru", "fused", "lengths and resets", "b_len - 1 - i_s", "tl.max(b_len) - 1 - i_s"
    ),
    "rows that have ended go on": (
        "lstm", "fused", "lengths and resets", "tl.where(m_cell, b_new_c, b_c)", "b_new_c"
    ),
    "a reset spares c": ("lstm", "fused", "lengths and resets", "tl.where(b_reset[:, None], 0.0, b_c)", "b_c"),
    "a reset lets gradients through": (
        "gru", "fused", "lengths and resets", "b_new = tl.where(b_reset[:, None], 0.0, b_new)", "b_new = b_new"
    ),
    "a reset lets gradients through, step by step": (
        "rnn_tanh", "steps", "lengths and resets", "~reset_at(p_resets, b_time, m_after, o_row, batch)\n    p_after",
        "m_after\n    p_after",
    ),
    "slopes meet the wrong gates": ("gru", "fused", "plain", "= b_slopes[1], b_slopes[2], b_slopes[0]", "= b_slopes"),
    "slopes meet the wrong gates, step by step": (
        "gru", "steps", "plain", "o_slope + 2 * hidden, o_slope - hidden", "o_slope, o_slope"
    ),
    "the bypass is lost": ("gru", "steps", "plain", "b_dh += tiles(p_passed,", "b_dh += 0 * tiles(p_passed,"),
    "c before is c after": (
        "lstm", "steps", "plain", "(i_d * tokens + b_before) * hidden", "(i_d * tokens + b_token) * hidden"
    ),
    "the last gradient comes at the longest's end": (
        "lstm", "steps", "lengths and resets", "m_ends = m_row & (i_s + 1 == b_len)[:, None]",
        "m_ends = m_row & (i_s + 1 == tl.max(b_len))"
    ),
    "the mask is left out of the gradient": ("lstm", "fused", "zoneout", "b_into *= b_mask", "b_into *= b_into"),
    "the old state's share is lost": (
        "rnn_tanh", "fused", "expected zoneout", "* b_d, zoneout * b_d", "* b_d, tl.zeros_like(b_d)"
    ),
    "a zone is turned round": ("gru", "steps", "zoneout", "!= 0, b_old, b_new)", "!= 0, b_new, b_old)"),
    "the old c has no share": ("lstm", "steps", "expected zoneout", "b_dc + b_passed_c, b_into", "b_dc, b_into"),
    "c after zoneout is c before it": (
        "lstm", "fused", "expected zoneout", "tanh(b_kept[1] * b_c_before + b_kept[0] * b_kept[2])", "tanh(b_c)"
    ),
    "a norm's slope keeps its mean": ("rnn_tanh", "fused", "norms", "b_d[i] - b_mean[:, None]", "b_d[i]"),
    "norms meet the wrong gates": ("gru", "fused", "norms", "= 1 if MODE", "= 0 if MODE"),
    "a row's mean is its last tile's": ("gru", "steps", "norms", "b_sum_hat += summed", "b_sum_hat = summed"),
    "a row's variance is its last tile's": (
        "lstm", "steps", "norms", "b_squares += squares(t", "b_squares = squares(t"
    ),
    "c's norm has no slope": ("lstm", "fused", "norms", "b_d, b_hat = b_into * b_norm[0]", "b_d, b_hat = b_into * 0.0"),
    "a projected state forgets its zoneout": (
        "lstm", "fused", "projected and masked", "b_passed = b_past", "b_passed = 0 * b_past"
    ),
    "W_hr is left out step by step": (
        "lstm", "steps", "projected and masked", "b_w = tl.load(p_tile, mask=m_k[:, None] & m_unit",
        "b_w = 1 + 0 * tl.load(p_tile, mask=m_k[:, None] & m_unit",
    ),
}  # fmt: skip


def mutant(folder: Path, name: str, old: str, new: str):
    """triton_layers and all that it imports, with one piece of their source replaced."""
    package = f"mutant_{abs(hash(name))}"
    (folder / package).mkdir()
    found = 0
    for path in Path(layers.__file__).parent.glob("triton_*.py"):
        source = path.read_text()
        found += source.count(old)
        source = source.replace(old, new).replace("fused_ops.rnn.triton_", f"{package}.triton_")
        (folder / package / path.name).write_text(source)
    assert found == 1
    return import_module(f"{package}.triton_layers")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_caught(name, tmp_path, monkeypatch):
    mode, design, case, old, new = MUTANTS[name]
    monkeypatch.syspath_prepend(tmp_path)
    wrong = mutant(tmp_path, name, old, new)
    use(wrong, design, monkeypatch)
    with pytest.raises(AssertionError, match="error"):
        check(layer_case(mode, **(CASES | OF_LSTM)[case]), module=wrong)
