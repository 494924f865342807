"""Where Winograd's filtering and the direct kernel beat PyTorch and oneDNN: for `filtered` and `direct` of conv.op.

`python -m bench.measure.conv_filters` writes bench/results/cpu/conv_filters.json. A row is a channels_last convolution;
its numbers are milliseconds (20th percentile). `alone`: torch is F.conv2d, fused_ops is conv2d(backend="cpu"). `chain`,
with a batch norm and ReLU: torch is the three modules, fused_ops the C++ kernel, and onednn the other way to serve it:
oneDNN on weights kept between calls. `rows` are 3x3 kernels of stride 1, `direct` others.
"""

import json
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import fused_ops
from bench.machine import RESULTS, line
from bench.timing import measure
from fused_ops.conv import op, reference
from tests.support import randn

# batch, channels, out_channels, size
SHAPES = (
    *((1, 16, 16, size) for size in (4, 8, 16, 32, 64)),
    *((1, 64, 64, size) for size in (4, 7, 14, 28, 56, 112)),
    *((1, 128, 128, size) for size in (4, 7, 14, 28, 56)),
    *((1, 256, 256, size) for size in (4, 7, 14, 28)),
    *((batch, 512, 512, 7) for batch in (1, 2, 4, 8)),
    *((8, channels, channels, size) for channels, size in ((64, 56), (128, 28), (256, 14))),
    *((1, *channels, 28) for channels in ((16, 128), (128, 16), (24, 40), (512, 512))),
    (32, 16, 16, 32),
    (1, 1024, 1024, 14),
)
# the same, kernel, stride
DIRECT = (
    *((batch, 3, 64, 224, 7, 2) for batch in (1, 8)),
    *((1, 3, 32, size, 3, 2) for size in (32, 96, 224)),
    *((1, 64, 64, size, 3, 2) for size in (7, 14, 28, 56)),
    *((batch, 128, 128, 56, 3, 2) for batch in (1, 8)),
    *((batch, 256, 256, 28, 3, 2) for batch in (1, 8)),
    *((batch, 512, 512, 14, 3, 2) for batch in (1, 8)),
    *((1, 32, 64, size, 5, 1) for size in (14, 28)),
)


def row(batch: int, channels: int, out_channels: int, size: int, kernel: int = 3, stride: int = 1) -> dict:
    last, pad = {"memory_format": torch.channels_last}, kernel // 2
    conv, norm = nn.Conv2d(channels, out_channels, kernel, stride, pad, bias=False), nn.BatchNorm2d(out_channels)
    chain = nn.Sequential(conv, norm, nn.ReLU(inplace=True)).eval().to(**last)
    x = randn(batch, channels, size, size).contiguous(**last)
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, None)
    call = (x, conv.weight, None, *statistics, conv.stride, conv.padding, (1, 1), 1, reference.CODES["relu"])
    groups = {
        "alone": {
            "torch": partial(F.conv2d, x, conv.weight, None, stride, pad),
            "fused_ops": partial(fused_ops.conv2d, x, conv.weight, None, stride, pad, backend="cpu"),
        },
        "chain": {
            "torch": partial(chain, x),
            "fused_ops": partial(torch.ops.fused_ops.conv_bn_act2d_cpu, *call),
            "onednn": partial(op.conv_bn_act2d_onednn, *call),
        },
    }
    found = {"batch": batch, "channels": channels, "out_channels": out_channels, "size": size}
    found |= {"kernel": kernel, "stride": stride}
    for name, rivals in groups.items():
        for rival in rivals.values():
            torch.testing.assert_close(rival(), rivals["torch"](), atol=1e-3, rtol=1e-3)
        measured = measure(rivals, seconds=0.3)
        found |= {f"{name}_{rival}_ms": round(timing.p20, 4) for rival, timing in measured.timings.items()}
        found[f"{name}_disturbed"] = measured.disturbed
    return found


@torch.no_grad()
def main() -> None:
    path = RESULTS / "cpu" / "conv_filters.json"
    results = {"machine": line(), "rows": [], "direct": []}
    for shape in (*SHAPES, *DIRECT):
        found = row(*shape)
        results["direct" if shape in DIRECT else "rows"].append(found)
        alone = found["alone_torch_ms"] / found["alone_fused_ops_ms"]
        chain, onednn = (found[f"chain_{rival}_ms"] / found["chain_fused_ops_ms"] for rival in ("torch", "onednn"))
        print(f"{shape!s:<30} alone {alone:5.2f}   chain {chain:5.2f}   chain on kept weights {onednn:5.2f}")
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
