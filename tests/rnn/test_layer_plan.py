"""How the CUDA layer's kernels are spread over a chip, asked of the planner alone."""

from itertools import product

import pytest

from fused_ops.core import extension

pytestmark = pytest.mark.skipif(extension.host is None, reason="_host was not built")

H200 = {"multiprocessors": 132, "shared_bytes": 227 * 1024, "capability": 90}
A100 = {"multiprocessors": 108, "shared_bytes": 163 * 1024, "capability": 80}
RTX4090 = {"multiprocessors": 128, "shared_bytes": 99 * 1024, "capability": 89}
CHIPS = {"H200": H200, "A100": A100, "4090": RTX4090}
GATES = {"rnn_tanh": 1, "gru": 3, "lstm": 4}


def plan(mode="lstm", hidden=512, batch=16, directions=1, element_bytes=2, backward=False, **chip) -> dict:
    return extension.host.plan_rnn_layer(
        mode, backward, hidden, batch, directions, element_bytes, **({**H200, **chip} if chip else H200)
    )


@pytest.mark.parametrize("hidden, slices", [(447, 8), (448, 8), (449, 15), (632, 16), (640, 16)])
def test_an_lstm_in_bf16_fits_a_cluster(hidden, slices):
    found = plan(hidden=hidden)
    assert (found["design"], found["slices"]) == ("cluster", slices)
    assert plan(hidden=hidden, backward=True)["design"] != "none"


@pytest.mark.parametrize(
    "mode, hidden, element_bytes", [("lstm", 1800, 2), ("gru", 2090, 2), ("rnn_tanh", 3600, 2), ("lstm", 1280, 4)]
)
@pytest.mark.parametrize("batch, backward", [*product((1, 16), (False, True))])
def test_the_largest_layers_fit_the_grid_in_one_launch(mode, hidden, element_bytes, batch, backward):
    found = plan(mode, hidden, batch, element_bytes=element_bytes, backward=backward)
    assert found["design"] == "grid" and found["launches"] == 1
    assert 0.75 * 132 < found["blocks"] <= 132


def test_what_fits_nowhere_is_said():
    assert plan(hidden=1900)["design"] == "none" and plan(hidden=1900)["blocks"] == 0
    assert plan(hidden=1800, multiprocessors=66)["design"] == "none"
    assert plan(hidden=64, capability=75)["design"] == "none"
    assert plan(hidden=0)["design"] == "none"
    with pytest.raises(ValueError, match=r"mode must be .*, got elman"):
        plan("elman")
    assert plan(hidden=1, shared_bytes=500)["design"] == "none"


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("mode, element_bytes, backward", [*product(GATES, (2, 4), (False, True))])
def test_never_more_than_the_chip_has_and_every_unit_once(chip, mode, element_bytes, backward):
    chip, served = CHIPS[chip], 0
    for hidden, batch, directions in product((1, 7, 64, 100, 447, 633, 1000, 1800), (1, 13, 64, 700), (1, 2)):
        found = plan(mode, hidden, batch, directions, element_bytes, backward, **chip)
        if found["design"] == "none":
            continue
        served += 1
        units, rows, slices, splits = (found[name] for name in ("units", "rows", "slices", "splits"))
        assert (slices - 1) * units < hidden <= slices * units
        assert rows in (8, 16, 32) and found["groups"] == directions * -(-batch // rows)
        assert rows * units <= 512, "two (row, unit) pairs for each of 256 threads"
        assert splits in (1, 2, 4, 8)
        assert found["blocks"] == found["at_once"] * slices
        assert found["launches"] * found["at_once"] >= found["groups"]
        matrix = GATES[mode] * units * hidden * element_bytes
        partial = splits * rows * (1 if backward else GATES[mode]) * units * 4
        assert matrix + partial <= found["shared_bytes"] <= chip["shared_bytes"]
        if found["design"] == "grid":
            assert found["blocks"] <= chip["multiprocessors"]
        else:
            assert chip["capability"] >= 90 and slices <= 16 and units * element_bytes % 16 == 0
    assert served > 0


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("mode, element_bytes, backward", [*product(GATES, (2, 4), (False, True))])
def test_a_product_is_summed_the_same_way_in_every_batch(chip, mode, element_bytes, backward):
    for hidden in (1, 40, 64, 200, 447, 512, 633, 768, 1024, 1300):
        asked = [
            plan(mode, hidden, batch, directions, element_bytes, backward, **CHIPS[chip])
            for batch in (0, 1, 8, 9, 16, 100, 5000)
            for directions in (1, 2)
        ]
        assert len({(found["design"], found["splits"]) for found in asked}) == 1


def test_an_empty_batch_launches_nothing():
    for hidden in (64, 768):
        found = plan(hidden=hidden, batch=0)
        assert found["groups"] == 0 and found["launches"] == 0 and found["blocks"] == 0


def test_a_large_batch_takes_more_rows_or_launches_not_other_weights():
    small, large = plan(hidden=768, batch=16), plan(hidden=768, batch=2000)
    assert large["launches"] > 1 and small["launches"] == 1
    assert plan(hidden=256, batch=4000)["rows"] == 16 and plan(hidden=256, batch=4000)["launches"] == 1
