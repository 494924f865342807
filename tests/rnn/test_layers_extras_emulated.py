"""The layers' CUDA kernels with extras on the CPU: mask, zoneout, layer norm, projection; forward and backward."""

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
from tests.rnn.layer_oracle import GATES, Layer, layer_case, random_grads
from tests.rnn.test_layers_emulated import DTYPES, ENDED
from tests.support import randn

pytestmark = needs_emulator
needs_host = pytest.mark.skipif(extension.host is None, reason="_host was not built")

PACKED = {"time": 3, "batch": 5, "hidden": 20, "directions": 2, "lengths": [3, 3, 2, 2, 1], "packed": True}
RESET = {**ENDED, "resets": True}
CASES = {
    "mask and zones": {**RESET, "mask": True, "zoneout": "masks"},
    "expected zoneout": {**PACKED, "mask": True, "zoneout": 0.3},
    "norm": {**RESET, "norm": True},
    "norm and all": {**PACKED, "norm": True, "mask": True, "zoneout": "masks"},
    "norm, no bias": {"time": 2, "batch": 17, "hidden": 40, "norm": True, "bias": False, "zoneout": 0.2},
    "one of all": {"time": 1, "batch": 1, "hidden": 1, "norm": True, "seed": 3},
}
OF_LSTM = {
    "zones of h": {**PACKED, "zoneout": ("masks", None)},
    "zones of c": {**PACKED, "norm": True, "zoneout": (None, "masks")},
    "expected zoneout of h": {**RESET, "zoneout": (0.3, None)},
    "expected zoneout of c": {**RESET, "zoneout": (None, 0.3)},
    "projected": {**RESET, "states": 7},
    "projected, mask and zones": {**PACKED, "states": 11, "mask": True, "zoneout": "masks"},
    "projected, norm and all": {**RESET, "states": 13, "norm": True, "mask": True, "zoneout": 0.3},
    "projected to one": {"time": 2, "batch": 18, "hidden": 33, "states": 1, "norm": True},
    "projected to as many": {"time": 2, "hidden": 24, "states": 24, "zoneout": (0.3, None)},
}
EVERY = [(mode, name) for name in CASES for mode in GATES] + [("lstm", name) for name in OF_LSTM]


@pytest.fixture(params=DESIGNS)
def design(request):
    with chip(request.param):
        yield request.param


@pytest.mark.parametrize("mode, name", EVERY)
def test_the_formulas_are_autograds(mode, name):
    layer = layer_case(mode, dtype=torch.float64, **(CASES | OF_LSTM)[name]).to(torch.float64)
    grads, found = random_grads(layer), layer_oracle.forward(layer)
    exact = layer_oracle.backward(layer, grads)
    for key, value in replay(layer, grads, found, exact).items():
        torch.testing.assert_close(value, exact[key], rtol=1e-8, atol=1e-8, msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.parametrize("mode, name, dtype", [(*pair, DTYPES[i % 3]) for i, pair in enumerate(EVERY)], ids=str)
def test_steps_and_slopes(mode, name, dtype, design):
    layer = layer_case(mode, dtype=dtype, **(CASES | OF_LSTM)[name])
    check_backward(layer, check(layer))


@every_schedule
def test_every_schedule(design):
    extras = {"states": 9, "norm": True, "mask": True, "zoneout": "masks"}
    layer = layer_case("lstm", time=2, batch=9, hidden=19, dtype=torch.float16, **extras)
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


@pytest.mark.parametrize(
    "mode, dtype, states",
    [("gru", torch.bfloat16, None), ("lstm", torch.float32, None), ("lstm", torch.float16, 21)],
    ids=str,
)
def test_a_row_is_the_same_alone_in_any_batch_and_again(mode, dtype, states, design):
    layer = layer_case(mode, 2, 10, 40, 1, dtype, lengths=[2, 1] * 5, resets=True, norm=True, states=states)
    # A grid's units, over which a norm is summed, are the chip's.
    check_rows(layer, design, *([4] if design == "cluster" else []))


def test_what_it_cannot_serve_is_said():
    plain, normed = layer_case("gru", dtype=torch.float16), layer_case("lstm", dtype=torch.float16, norm=True)
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
    with pytest.raises(RuntimeError, match="norm_hh goes with hat_hh and rstd_hh"):
        run_backward(normed, gradients(normed), run(normed))
    wide = layer_case("lstm", 1, 1, 340, 1, torch.float16, states=339)
    with chip("grid", 3), pytest.raises(RuntimeError, match="W_hh of hidden size 340 does not fit"):
        run(wide)
