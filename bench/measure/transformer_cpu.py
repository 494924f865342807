"""Where torch's inference fast path for Transformer layers is the faster one: `python -m bench.measure.transformer_cpu`
writes results/cpu/transformer_cpu.json.

`fused_ops.attention.modules` takes its rule from it. One thread, CPU time. "fast" is torch's one fused op, "ours" the
same layer on `fused_ops.scaled_dot_product_attention`. Both encoders skip padding, as nested tensors: two layers.
"""

import argparse
import json
from functools import partial

import torch
from torch import nn

import fused_ops
from bench import machine
from bench.measure.decode_cpu import cpu_microseconds
from tests.support import randn

FIELDS = ("kind", "batch", "length", "width", "heads", "masked")
LENGTHS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
SIZES = ((8, 64, 4), (2, 256, 8), (1, 512, 8))
LAYERS = 2


def rivals(kind: str, batch: int, length: int, width: int, heads: int, masked: bool):
    """The same call on torch's fast path and on this package's attention."""
    x, padding = randn(batch, length, width), None
    if masked:
        padding = torch.arange(length) >= torch.linspace(length // 2, length, batch).int()[:, None]
    if kind == "attention":
        ours = fused_ops.nn.MultiheadAttention(width, heads, batch_first=True).eval()
        theirs = nn.MultiheadAttention(width, heads, batch_first=True).eval()
        arguments = {"key_padding_mask": padding, "need_weights": False}
        calls = {"fast": lambda: theirs(x, x, x, **arguments), "ours": lambda: ours(x, x, x, **arguments)}
    elif kind == "encoder":
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True)
        ours = fused_ops.nn.TransformerEncoder(layer, LAYERS).eval()
        theirs = nn.TransformerEncoder(layer, LAYERS).eval()
        calls = {
            name: partial(call, x, src_key_padding_mask=padding) for name, call in (("fast", theirs), ("ours", ours))
        }
    else:
        options = {"dim_feedforward": 4 * width, "batch_first": True}
        ours = fused_ops.nn.TransformerEncoderLayer(width, heads, **options).eval()
        theirs = nn.TransformerEncoderLayer(width, heads, **options).eval()
        arguments = {"src_key_padding_mask": padding}
        calls = {"fast": lambda: theirs(x, **arguments), "ours": lambda: ours(x, **arguments)}
    return {name: _bound(call) if name == "ours" else call for name, call in calls.items()}


def _bound(call):
    def ours():
        with fused_ops.use_backend("reference"):
            return call()

    return ours


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.05, help="for each rival in each row")
    options = parser.parse_args()
    facts, rows = machine.facts(), []
    torch.set_num_threads(1)
    for kind in ("encoder", "layer", "attention"):
        for batch, width, heads in SIZES:
            for length in LENGTHS:
                for masked in (True,) if kind == "encoder" else (False, True):
                    shape = (kind, batch, length, width, heads, masked)
                    found = cpu_microseconds(rivals(*shape), options.seconds)
                    rows.append(dict(zip(FIELDS, shape)) | {f"{name}_us": round(t, 1) for name, t in found.items()})
                    print(*(f"{value!s:>9}" for value in rows[-1].values()), flush=True)
    path = machine.RESULTS / "cpu" / "transformer_cpu.json"
    path.write_text(json.dumps({"machine": facts, "one_thread_cpu_time": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
