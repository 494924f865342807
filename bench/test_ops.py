"""The op rows under pytest-benchmark: pytest bench/ --benchmark-only."""

import pytest
import torch

from bench.registry import cases

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("rival", ["ours", "torch"])
@pytest.mark.parametrize(
    ("row", "dtype"),
    cases(_DEVICE),
    ids=lambda value: f"{value.op}-{value.shape}" if hasattr(value, "op") else str(value),
)
def test_op(benchmark, row, dtype, rival):
    benchmark.group = f"{row.op} {row.shape} {dtype}"
    with torch.no_grad():
        case = row.build(_DEVICE, dtype)
        call = next(iter((case.ours if rival == "ours" else case.peers).values()))

        def run():
            call()
            if _DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(run)
