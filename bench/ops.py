"""Measures the registry's rows."""

import torch

from bench.registry import Case, cases
from bench.timing import measure
from fused_ops.core import dispatch
from tests.support import error


def run(device: str, seconds: float, advance=lambda label: None) -> list[dict]:
    """One dict per row: op, shape, dtype, backend, milliseconds, the best peer's, the rate, and how they compare."""
    rows = []
    for row, dtype in cases(device):
        advance(f"{row.op} {row.shape}")
        with torch.no_grad():
            rows.append(
                {"op": row.op, "shape": row.shape, **_measure(row.build(device, dtype), dtype, device, seconds)}
            )
    return rows


def _measure(case: Case, dtype: torch.dtype, device: str, seconds: float) -> dict:
    backends = {}
    for name, call in case.ours.items():
        with dispatch.record() as choices:
            value = call()
        backends[name] = choices[0].backend
        try:
            check(value, next(iter(case.peers.values()))(), dtype)
        except ArithmeticError as difference:
            return {"wrong": str(difference)}
    result = measure({**case.ours, **case.peers}, seconds=seconds, on_gpu=device == "cuda")
    best, peer = (min(side, key=lambda name: result.timings[name].median) for side in (case.ours, case.peers))
    ours = result.timings[best]
    by_flops = case.flops / case.bytes > 4.0
    rate = (case.flops if by_flops else case.bytes) / ours.median / 1e6
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "form": best,
        "backend": backends[best],
        "ms": ours.median,
        "p20": ours.p20,
        "p80": ours.p80,
        "rate": rate,
        "unit": "GFLOP/s" if by_flops else "GB/s",
        "peer": peer,
        "peer_ms": result.timings[peer].median,
        "speedup": result.ratio(best, peer),
        "disturbed": result.disturbed,
    }


def check(value, peer, dtype: torch.dtype) -> None:
    """A fast wrong answer has no speed. (Packed output has another layout: its final state is compared.)"""
    value, peer = (out if isinstance(out, torch.Tensor) else out[1] for out in (value, peer))
    size = peer.abs().max().item()
    found = error(value, peer)
    if found > 64 * torch.finfo(dtype).eps * max(size, 1.0):
        raise ArithmeticError(f"differs from PyTorch by {found:.2e}")
