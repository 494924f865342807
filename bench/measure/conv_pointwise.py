"""Where the CPU kernels beat eager PyTorch: the measurement behind fused_ops/conv/rules.py.

`python -m bench.measure.conv_pointwise` writes bench/results/cpu/conv_pointwise.json. A row is a convolution, a layout
and an epilogue; its numbers are milliseconds (20th percentile) of F.conv2d and the eager epilogue in place, of
backend="cpu", and the ratio. The eager epilogue is F.batch_norm for scale and shift, as in a network that runs its
modules one by one. `chains` are 1x1 convolutions with a batch norm and ReLU6 as the modules run them, down to the
smallest: eager is PyTorch's three modules, cpu the backend's conv_bn_act2d alone, both in CPU time on one thread, which
a neighbour hardly disturbs. `chains_channels_last` are the same in channels_last, where cpu is the C++ kernel, which
reads the weights as they are, and onednn the other way to serve them: oneDNN on weights kept between calls. `residuals`
add a residual; their output is about as large as a cache, or larger. `--chains` measures chains and keeps the rows.
"""

import argparse
import itertools
import json
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import fused_ops
from bench.machine import RESULTS, line
from bench.measure.decode_cpu import cpu_microseconds
from bench.timing import measure
from fused_ops.conv import op, reference
from tests.support import randn

# name: batch, channels, out_channels, size, kernel, stride, groups
SHAPES = {
    "1x1 expand 112": (2, 16, 96, 112, 1, 1, 1),
    "1x1 project 56": (2, 144, 24, 56, 1, 1, 1),
    "1x1 expand 14": (2, 112, 672, 14, 1, 1, 1),
    "1x1 project 7": (2, 1152, 192, 7, 1, 1, 1),
    "1x1 bottleneck 56": (1, 64, 256, 56, 1, 1, 1),
    "1x1 bottleneck 7": (8, 2048, 512, 7, 1, 1, 1),
    "depthwise 3x3 112": (2, 32, 32, 112, 3, 1, 32),
    "depthwise 3x3 56 stride 2": (2, 96, 96, 113, 3, 2, 96),
    "depthwise 5x5 14": (2, 672, 672, 14, 5, 1, 672),
    "depthwise 5x5 7": (2, 1152, 1152, 7, 5, 1, 1152),
    "depthwise 7x7 28": (1, 192, 192, 28, 7, 1, 192),
    "stem 3x3 stride 2": (2, 3, 32, 225, 3, 2, 1),
    "stem 7x7 stride 2": (1, 3, 64, 224, 7, 2, 1),
    "3x3 56": (1, 64, 64, 56, 3, 1, 1),
    "3x3 28": (4, 128, 128, 28, 3, 1, 1),
    "3x3 7": (1, 512, 512, 7, 3, 1, 1),
    "3x3 grouped 28": (2, 256, 256, 28, 3, 1, 32),
    "tiny 1x1": (1, 4, 4, 4, 1, 1, 1),
    "tiny depthwise": (1, 4, 4, 4, 3, 1, 4),
    "tiny 3x3": (1, 4, 4, 4, 3, 1, 1),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
EPILOGUES = ("relu", "affine relu6", "affine residual relu", "affine silu")


# batch, channels, out_channels, size
CHAINS = (
    *((batch, 64, 64, 1) for batch in (1, 2, 4, 8, 16, 32)),
    *((batch, 512, 512, 1) for batch in (1, 2, 4, 8, 16, 32)),
    *((1, *channels, size) for channels in ((16, 64), (512, 64), (64, 512), (512, 512)) for size in (2, 3, 4, 7, 8)),
    (1, 1152, 320, 7),
    (1, 320, 1280, 7),
    (2, 1152, 192, 7),
    (1, 480, 80, 14),
)
CHAINS_LAST = (
    *(
        (1, *channels, size)
        for channels in ((16, 96), (96, 24), (64, 64), (64, 256), (256, 64), (256, 1024), (1024, 256), (512, 2048))
        for size in (1, 2, 3, 7, 14, 28, 56)
    ),
    *((8, *channels) for channels in ((64, 64, 56), (256, 64, 56), (512, 128, 28), (256, 1024, 14), (2048, 512, 7))),
)


RESIDUALS = (
    (1, 64, 256, 56),
    (2, 64, 256, 56),
    (8, 64, 256, 56),
    (16, 64, 256, 56),
    (8, 128, 512, 28),
    (8, 256, 1024, 14),
)


def row(name: str, layout: str, epilogue: str) -> dict:
    batch, channels, out_channels, size, kernel, stride, groups = SHAPES[name]
    x = randn(batch, channels, size, size).contiguous(memory_format=LAYOUTS[layout])
    w = randn(out_channels, channels // groups, kernel, kernel).contiguous(memory_format=LAYOUTS[layout])
    scale, shift = randn(out_channels, seed=1).abs(), randn(out_channels, seed=2)
    mean, var = torch.zeros(out_channels), torch.ones(out_channels)
    affine, act = "affine" in epilogue, epilogue.split()[-1]
    place = (stride, kernel // 2, 1, groups)
    residual = torch.randn_like(F.conv2d(x, w, None, *place)) if "residual" in epilogue else None

    def eager():
        y = F.conv2d(x, w, None, *place)
        y = F.batch_norm(y, mean, var, scale, shift, False, 0.0, 0.0) if affine else y
        y = y if residual is None else y.add_(residual)
        return getattr(F, act)(y, inplace=True)

    def ours():
        return fused_ops.conv2d(
            x, w, None, *place, scale=scale if affine else None, shift=shift if affine else None,
            residual=residual, activation=act, backend="cpu",
        )  # fmt: skip

    torch.testing.assert_close(ours(), eager(), atol=1e-3, rtol=1e-3)
    found = measure({"eager": eager, "cpu": ours}, seconds=0.12)
    times = {f"{rival}_ms": round(timing.p20, 4) for rival, timing in found.timings.items()}
    ratio = round(times["eager_ms"] / times["cpu_ms"], 3)
    place = {"shape": name, "sizes": SHAPES[name], "layout": layout, "epilogue": epilogue}
    return {**place, **times, "ratio": ratio, "disturbed": found.disturbed}


class Residual(nn.Module):
    """relu6(chain(x) + residual) of a chain's first two modules."""

    def __init__(self, chain: nn.Sequential, residual: torch.Tensor):
        super().__init__()
        self.chain, self.residual = chain, residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu6(self.chain[1](self.chain[0](x)).add_(self.residual), inplace=True)


def chain(batch: int, channels: int, out_channels: int, size: int, last: bool, adds: bool = False) -> dict:
    conv, norm = nn.Conv2d(channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
    layout = torch.channels_last if last else torch.contiguous_format
    eager = nn.Sequential(conv, norm, nn.ReLU6(inplace=True)).eval().to(memory_format=layout)
    x = torch.empty(batch, channels, size, size, memory_format=layout).copy_(randn(batch, channels, size, size))
    residual = torch.rand(batch, out_channels, size, size).to(memory_format=layout) if adds else None
    eager = Residual(eager, residual) if adds else eager
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, residual)
    call = (x, conv.weight, None, *statistics, conv.stride, conv.padding, conv.dilation, conv.groups)
    code = reference.CODES["relu6"]
    rivals = {"eager": partial(eager, x), "cpu": partial(torch.ops.fused_ops.conv_bn_act2d_cpu, *call, code)}
    if last:
        rivals["onednn"] = partial(op.conv_bn_act2d_onednn, *call, code)
    for rival in rivals.values():
        torch.testing.assert_close(rival(), eager(x), atol=1e-3, rtol=1e-3)
    found = cpu_microseconds(rivals, 0.1)
    times = {f"{rival}_ms": round(microseconds / 1e3, 4) for rival, microseconds in found.items()}
    sizes = {"batch": batch, "channels": channels, "out_channels": out_channels, "size": size}
    return {**sizes, **times, "ratio": round(times["eager_ms"] / times["cpu_ms"], 3)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", action="store_true", help="measure the chains alone")
    path = RESULTS / "cpu" / "conv_pointwise.json"
    if parser.parse_args().chains:
        results = json.loads(path.read_text())
    else:
        results = {"machine": line(), "rows": []}
        for name, layout, epilogue in itertools.product(SHAPES, LAYOUTS, EPILOGUES):
            results["rows"].append(row(name, layout, epilogue))
            print(*(f"{value!s:<28}" for value in results["rows"][-1].values()))
    torch.set_num_threads(1)
    results["chains"] = [chain(*sizes, last=False) for sizes in CHAINS]
    results["chains_channels_last"] = [chain(*sizes, last=True) for sizes in CHAINS_LAST]
    results["residuals"] = [chain(*sizes, last=True, adds=True) for sizes in RESIDUALS]
    for found in results["chains"] + results["chains_channels_last"] + results["residuals"]:
        print(*(f"{value!s:<12}" for value in found.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
