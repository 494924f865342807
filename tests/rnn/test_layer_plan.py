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


def plan(mode="lstm", hidden=512, batch=16, directions=1, element_bytes=2, backward=False, **more) -> dict:
    """more: of the chip, or projected and layer_norm."""
    return extension.host.plan_rnn_layer(mode, backward, hidden, batch, directions, element_bytes, **{**H200, **more})


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


# projected, layer_norm
EXTRAS = ((0, True), (100, False), (100, True))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("projected, layer_norm, element_bytes, backward", [
    (*extra, *rest) for extra, *rest in product(EXTRAS, (2, 4), (False, True))
])  # fmt: skip
def test_extras_are_counted_and_shared_out(chip, projected, layer_norm, element_bytes, backward):
    extras, served = {"projected": projected, "layer_norm": layer_norm}, 0
    for hidden, batch, directions in product((100, 447, 768, 1200), (1, 13, 700), (1, 2)):
        sizes = ("lstm", hidden, batch, directions, element_bytes, backward)
        found = plan(*sizes, **CHIPS[chip], **extras)
        if found["design"] == "none":
            continue
        served += 1
        units, features, rows, slices, splits = (found[n] for n in ("units", "features", "rows", "slices", "splits"))
        assert (slices - 1) * units < hidden <= slices * units
        assert max(units, features) * rows <= 512
        if projected:
            assert slices * features >= projected
            made = features if backward else units
            matrices = 4 * units * projected if not backward else features * 4 * hidden
            matrices += features * hidden if not backward else units * projected
        else:
            assert features == units
            made, matrices = units, 4 * units * hidden
        partial = max(splits, 2 if layer_norm else 1) * rows * made * (1 if backward else 4) * 4
        sums = rows * 8 * (1 + (2 * slices if found["design"] == "cluster" else 0)) if layer_norm else 0
        assert matrices * element_bytes + partial + sums <= found["shared_bytes"] <= CHIPS[chip]["shared_bytes"]
        if found["design"] == "cluster":
            assert units * element_bytes % 16 == features * element_bytes % 16 == 0
        else:
            assert found["blocks"] <= CHIPS[chip]["multiprocessors"]
    assert served > 0


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("mode, projected, backward", [
    *product(("gru",), (0,), (False, True)), *product(("lstm",), (0, 64), (False, True))
])  # fmt: skip
def test_a_norm_is_summed_over_the_same_units_in_every_batch(chip, mode, projected, backward):
    for hidden in (64, 200, 447, 768, 1000):
        asked = [
            plan(
                mode,
                hidden,
                batch,
                directions,
                2,
                backward,
                **CHIPS[chip],
                projected=min(projected, hidden),
                layer_norm=True,
            )
            for batch in (0, 1, 8, 9, 16, 100, 5000)
            for directions in (1, 2)
        ]
        assert len({(found["design"], found["splits"], found["units"], found["slices"]) for found in asked}) == 1


def test_what_is_asked_of_a_projection():
    for mode, projected in (("gru", 8), ("lstm", 513)):
        with pytest.raises(ValueError, match=f"projected must be .*, got {projected}"):
            plan(mode, projected=projected)
    narrow, whole = plan(hidden=1000, projected=100), plan(hidden=1000)
    assert narrow["slices"] < whole["slices"] or narrow["shared_bytes"] < whole["shared_bytes"]
    assert plan(hidden=2500, projected=500)["design"] != "none" and plan(hidden=2500)["design"] == "none"
