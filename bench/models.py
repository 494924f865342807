"""The main job: three pretrained models, plain and fused, on real input."""

import copy

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
            rows.append(_compare(pretrained, device, seconds))
        except WeightsMissing as missing:
            rows.append({"model": pretrained.name, "missing": str(missing)})
    return rows


@torch.inference_mode()
def _compare(pretrained: Pretrained, device: str, seconds: float) -> dict:
    plain = pretrained.build().to(device)
    inputs = tuple(t.to(device) for t in pretrained.inputs())
    fused = copy.deepcopy(plain)
    report = fused_ops.fuse(fused)
    exact = plain(*inputs)
    with dispatch.record() as choices:
        value = fused(*inputs)
    result = {
        "model": pretrained.name,
        "swapped": len([row for row in report if row.new]),
        "backends": _backends(choices),
        "error": error(value, exact),
        "scale": exact.abs().max().item(),
        "claims": [
            (f"{kind}: {claim}", holds)
            for kind, model in (("PyTorch", plain), ("fused", fused))
            for claim, holds in pretrained.truth(model)
        ],
    }
    result["correct"] = result["error"] <= TOLERANCE * result["scale"] and all(holds for _, holds in result["claims"])
    if result["correct"]:
        measured = measure(
            {"PyTorch": lambda: plain(*inputs), "fused": lambda: fused(*inputs)},
            seconds=seconds,
            on_gpu=device == "cuda",
        )
        for name, timing in measured.timings.items():
            result[name] = {"ms": timing.median, "p20": timing.p20, "p80": timing.p80}
        result["speedup"], result["disturbed"] = measured.ratio("fused", "PyTorch"), measured.disturbed
    return result


def _backends(choices: list[dispatch.Choice]) -> dict[str, str]:
    """op -> the backends its calls took; empty where the model runs PyTorch's own fused module."""
    taken: dict[str, set[str]] = {}
    for choice in choices:
        taken.setdefault(choice.op, set()).add(choice.backend)
    return {op: ", ".join(sorted(names)) for op, names in taken.items()}
