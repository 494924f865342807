"""The main job: three pretrained models, plain and fused, on real input."""

import copy
from collections.abc import Callable

import torch

import fused_ops
from bench.pretrained import PRETRAINED, Pretrained, WeightsMissing
from bench.timing import measure
from fused_ops.core import dispatch
from tests.support import error

TOLERANCE = 2e-4  # of the largest output: float32 through a whole network


def run(device: str, seconds: float, advance=lambda label: None) -> list[dict]:
    """One dict per model: both timings, the speed-up, the largest error, the backends, every claim about the output."""
    rows = []
    for pretrained in PRETRAINED:
        advance(pretrained.name)
        try:
            rows.append(compare(pretrained, device, seconds))
        except WeightsMissing as missing:
            rows.append({"model": pretrained.name, "missing": str(missing)})
    return rows


@torch.inference_mode()
def compare(pretrained: Pretrained, device: str, seconds: float) -> dict:
    row, rivals = examine(pretrained, device)
    if row["correct"]:
        measured = measure(rivals, seconds=seconds, on_gpu=device == "cuda")
        for name, timing in measured.timings.items():
            row[name] = {"ms": timing.median, "p20": timing.p20, "p80": timing.p80}
        row["speedup"], row["disturbed"] = measured.ratio("fused", "PyTorch"), measured.disturbed
    return row


@torch.inference_mode()
def examine(pretrained: Pretrained, device: str) -> tuple[dict, dict[str, Callable[[], object]]]:
    """Whether the fused model is right and what served it, and the two models as calls to be timed."""
    plain = pretrained.build().to(device)
    inputs = tuple(t.to(device) for t in pretrained.inputs())
    fused = copy.deepcopy(plain)
    report = fused_ops.fuse(fused)
    exact = plain(*inputs)
    with dispatch.record() as choices:
        value = fused(*inputs)
    claims = [
        (f"{kind}: {claim}", holds)
        for kind, model in (("PyTorch", plain), ("fused", fused))
        for claim, holds in pretrained.truth(model)
    ]
    swapped = len([row for row in report if row.new])
    row = {"model": pretrained.name, "swapped": swapped, "backends": _backends(choices)}
    rivals = {"PyTorch": lambda: plain(*inputs), "fused": lambda: fused(*inputs)}
    return {**row, **verdict(value, exact, claims)}, rivals


def verdict(value: torch.Tensor, exact: torch.Tensor, claims: list[tuple[str, bool]]) -> dict:
    """Whether the fused model says what PyTorch's says, and whether that is true."""
    found, scale = error(value, exact), exact.abs().max().item()
    correct = found <= TOLERANCE * scale and all(holds for _, holds in claims)
    return {"error": found, "scale": scale, "claims": claims, "correct": correct}


def _backends(choices: list[dispatch.Choice]) -> dict[str, str]:
    """op -> the backends its calls took; empty where the model runs PyTorch's own fused module."""
    taken: dict[str, set[str]] = {}
    for choice in choices:
        taken.setdefault(choice.op, set()).add(choice.backend)
    return {op: ", ".join(sorted(names)) for op, names in taken.items()}
