"""From which size on one op beats three modules: the measurement behind `small_chain` in fused_ops/conv/rules.py.

`python -m bench.measure.conv_chains` writes bench/results/cpu/conv_chains.json. A row is a convolution with a batch
norm and ReLU, called as a model calls it; its numbers are microseconds (20th percentile) of nn.Sequential as PyTorch
runs it and as `fuse` leaves it, with the backend cpu asked for and by itself (auto), and what auto took.
"""

import copy
import json
from functools import partial

import torch
from torch import nn

import fused_ops
from bench.machine import RESULTS, line
from bench.timing import measure
from fused_ops.core import dispatch
from tests.support import randn

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# channels, out_channels, kernel, stride, groups: sizes
KINDS = {
    "1x1": {(64, 64, 1, 1, 1): (1, 2, 4, 7, 14, 28), (64, 256, 1, 1, 1): (4, 7, 14), (96, 24, 1, 1, 1): (7, 14, 28)},
    "depthwise": {(64, 64, 3, 1, 64): (4, 14, 28, 56), (256, 256, 5, 1, 256): (4, 7, 14), (96, 96, 3, 2, 96): (14, 56)},
    "stride 2": {(64, 64, 3, 2, 1): (4, 14, 28, 56), (128, 128, 3, 2, 1): (4, 14, 28), (256, 256, 3, 2, 1): (4, 14)},
    "grouped": {(64, 64, 3, 1, 4): (4, 14, 56), (256, 256, 3, 1, 16): (4, 14)},
    "3x3": {(16, 16, 3, 1, 1): (4, 14, 56), (64, 64, 3, 1, 1): (2, 4, 7, 14), (256, 256, 3, 1, 1): (2, 4)},
    "stem": {(3, 32, 3, 2, 1): (32, 96, 224), (3, 64, 7, 2, 1): (32, 96, 224)},
}


def row(kind: str, layout: str, shape: tuple[int, ...], size: int) -> dict:
    channels, out_channels, kernel, stride, groups = shape
    conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    plain = nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)).eval().requires_grad_(False)
    fused = copy.deepcopy(plain)
    fused_ops.fuse(fused)
    plain, fused = (model.to(memory_format=LAYOUTS[layout]) for model in (plain, fused))
    x = randn(1, channels, size, size).contiguous(memory_format=LAYOUTS[layout])
    with dispatch.record() as choices:
        torch.testing.assert_close(fused(x), plain(x), atol=1e-3, rtol=1e-3)
    rivals = {"torch": partial(plain, x), "auto": partial(fused, x)}
    times = {name: timing.p20 for name, timing in measure(rivals, seconds=0.2).timings.items()}
    with fused_ops.use_backend("cpu"):
        times["cpu"] = measure({"cpu": partial(fused, x)}, seconds=0.1).timings["cpu"].p20
    found = {f"{name}_us": round(milliseconds * 1e3, 1) for name, milliseconds in times.items()}
    return {"kind": kind, "shape": shape, "size": size, "layout": layout, **found, "taken": choices[0].backend}


@torch.no_grad()
def main() -> None:
    results = {"machine": line(), "rows": []}
    for layout in LAYOUTS:
        for kind, shapes in KINDS.items():
            for shape, sizes in shapes.items():
                for size in sizes:
                    found = row(kind, layout, shape, size)
                    results["rows"].append(found)
                    cpu, auto = (found["torch_us"] / found[name] for name in ("cpu_us", "auto_us"))
                    print(*(f"{value!s:<20}" for value in found.values()), f"cpu {cpu:.2f}  auto {auto:.2f}")
    (RESULTS / "cpu" / "conv_chains.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
