"""What bench/measure/rnn_gpu.py times on a GPU computes the same on all rivals: small, emulated."""

from dataclasses import replace

import pytest
import torch

from bench.measure import rnn_gpu
from tests.emulation import needs_emulator

pytestmark = needs_emulator


@pytest.mark.parametrize("what", ("padded", "lengths", "resets"))
def test_rivals_agree(what):
    row = next(row for row in rnn_gpu.ROWS if row.what == what)
    rivals = rnn_gpu.calls(replace(row, batch=3, steps=4, hidden=12), "cpu")
    assert set(rivals) >= {"cuda", "triton", "torch"}
    ours, torchs = (rivals[name][0]().float() for name in ("cuda", "torch"))
    if what == "padded":
        torch.testing.assert_close(ours, torchs, atol=0.02, rtol=0.02)
    for name in ("cuda", "torch"):
        rnn_gpu.training(*rivals[name])()


def test_errors_at_many_steps():
    found = rnn_gpu.errors("cpu", steps=9, hidden=8)
    assert 0 < found["cuda"] < 0.02 and 0 < found["torch"] < 0.02
    assert "triton" in found["triton"]
