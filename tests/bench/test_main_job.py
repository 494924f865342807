"""The main job's parts: the comparison, the timing, the rows."""

import pytest
import torch

from bench import models, registry, timing
from bench.ops import check
from bench.pretrained import PRETRAINED, WeightsMissing


@pytest.mark.parametrize("pretrained", PRETRAINED, ids=lambda pretrained: pretrained.name)
def test_a_fused_model_keeps_its_numbers_and_its_truths(pretrained):
    try:
        row, rivals = models.examine(pretrained, "cpu")
    except WeightsMissing as missing:
        pytest.skip(str(missing))
    assert row["correct"], row
    assert row["swapped"] > 0 and list(rivals) == ["PyTorch", "fused"]


@pytest.mark.parametrize(("shift", "holds"), [(1e-3, True), (0.0, False)], ids=["numbers", "claim"])
def test_a_wrong_model_is_not_correct(shift, holds):
    exact = torch.randn(4, 7)
    assert models.verdict(exact.clone(), exact, [("a claim", True)])["correct"]
    assert not models.verdict(exact + shift, exact, [("a claim", holds)])["correct"]


@pytest.mark.parametrize(
    ("row", "dtype"), registry.cases("cpu"), ids=lambda v: f"{v.op}-{v.shape}" if hasattr(v, "op") else str(v)
)
def test_every_row_agrees_with_its_peer(row, dtype):
    with torch.no_grad():
        case = row.build("cpu", dtype)
        for ours in case.ours.values():
            for peer in case.peers.values():
                check(ours(), peer(), dtype)


def test_a_wrong_row_is_refused():
    value = torch.randn(5)
    with pytest.raises(ArithmeticError, match="differs from PyTorch"):
        check(value, value + 1e-3, torch.float32)


def test_percentiles():
    found = timing.Timing.of([float(i) for i in range(11)])
    assert (found.median, found.p20, found.p80) == (5.0, 2.0, 8.0)


def test_a_slower_spin_marks_the_row(monkeypatch):
    monkeypatch.setattr(timing, "at_rest", lambda: 1e-6)
    assert timing.measure({"a": lambda: None, "b": lambda: None}, seconds=0.0).disturbed


def test_repeats_end_when_their_time_is_spent(monkeypatch):
    spins = []
    monkeypatch.setattr(timing, "at_rest", lambda: 1e-6)
    monkeypatch.setattr(timing, "spin", lambda: spins.append(1) or 1.0)
    for spare, attempts in ((60.0, timing.ATTEMPTS), (0.0, 1)):
        spins.clear()
        monkeypatch.setattr(timing, "_spare", spare)
        assert timing.measure({"a": lambda: None}, seconds=0.0).disturbed
        assert len(spins) == 2 * attempts


def test_rivals_are_timed_in_turn():
    order = []
    timing.measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0)
    tail = "".join(order)
    assert "ab" in tail and "ba" in tail
