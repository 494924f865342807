"""The model table: three pretrained models, plain and fused, on real input, and whole models against PyTorch's best."""

import copy
from collections.abc import Callable

import torch

import fused_ops
from bench.pretrained import PRETRAINED, Pretrained, WeightsMissing
from bench.timing import measure
from bench.whole import MODELS, TOLERANCE, Model
from fused_ops.core import dispatch
from tests.support import error


def run(device: str, seconds: float, advance=lambda label: None) -> list[dict]:
    """One dict per model: both timings, the speed-up, the largest error, the backends, every claim about the output."""
    rows = []
    contests = [(model, contest) for model in MODELS if device in model.devices]
    for model, against in (*((pretrained, compare) for pretrained in PRETRAINED), *contests):
        advance(model.name)
        try:
            rows.append(against(model, device, seconds))
        except WeightsMissing as missing:
            rows.append({"model": model.name, "missing": str(missing)})
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


@torch.no_grad()
def contest(model: Model, device: str, seconds: float) -> dict:
    """The best of our forms against the best of PyTorch's eager ones, and of what torch.compile makes of it."""
    rivals = model.build(device)
    exact = next(iter(rivals.eager.values()))()
    with dispatch.record() as choices:
        values = [call() for call in rivals.ours.values()]
    worst = max(values, key=lambda value: error(value, exact))
    row = {"model": model.name, "backends": _backends(choices), **verdict(worst, exact, [], rivals.tolerance)}
    if not row["correct"]:
        return row
    measured = measure({**rivals.ours, **rivals.eager, **rivals.compiled}, seconds=seconds, on_gpu=device == "cuda")
    best: dict[str, str] = {}
    for side, calls in (("fused", rivals.ours), ("PyTorch", rivals.eager), ("compile", rivals.compiled)):
        if calls:
            best[side] = min(calls, key=lambda name: measured.timings[name].median)
            timing = measured.timings[best[side]]
            row[side] = {"form": best[side], "ms": timing.median, "p20": timing.p20, "p80": timing.p80}
    row["speedup"], row["disturbed"] = measured.ratio(best["fused"], best["PyTorch"]), measured.disturbed
    if "compile" in best:
        row["against_compile"] = measured.ratio(best["fused"], best["compile"])
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


def verdict(
    value: torch.Tensor, exact: torch.Tensor, claims: list[tuple[str, bool]], tolerance: float = TOLERANCE
) -> dict:
    """Whether the fused model says what PyTorch's says, and whether that is true."""
    found, scale = error(value, exact), exact.abs().max().item()
    correct = found <= tolerance * scale and all(holds for _, holds in claims)
    return {"error": found, "scale": scale, "claims": claims, "correct": correct}


def _backends(choices: list[dispatch.Choice]) -> dict[str, str]:
    """op -> the backends its calls took; empty where the model runs PyTorch's own fused module."""
    taken: dict[str, set[str]] = {}
    for choice in choices:
        taken.setdefault(choice.op, set()).add(choice.backend)
    return {op: ", ".join(sorted(names)) for op, names in taken.items()}
