"""Where transformers' models gain by decode_attention and varlen_attention: `python -m bench.measure.huggingface_cpu`.

Writes results/cpu/huggingface_cpu.json, the CPU time of one layer's attention on one thread: decode steps, with and
without the mask of a static cache, and packed batches. `fused_ops.integrations.huggingface` has its constants from it.
A rival is transformers' `sdpa`; `masked` is ours without the two ops.
"""

import argparse
import json
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from tests import third_party  # noqa: F401 - it makes torchvision importable, which transformers wants

# isort: split
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

from bench import machine
from bench.measure.decode_cpu import DTYPES, cpu_microseconds
from fused_ops.integrations import huggingface
from tests.support import randn

FIELDS = ("dtype", "batch", "heads", "kv_heads", "queries", "keys", "dim")
HEADS = ((4, 4, 16), (12, 12, 64), (32, 8, 128))  # (heads, kv_heads, dim)
STEPS = [(batch, *heads, keys) for heads in HEADS for keys in (16, 64, 256, 1024) for batch in (1, 4)]
PACKED = ((64, 4), (128, 2), (128, 8), (256, 2), (256, 8), (1024, 4), (1024, 16))  # (length, sequences)
LIMITS = {"fused": 0, "masked": 2**62}


class Layer(nn.Module):
    """What a model passes as the layer that calls."""

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def row(dtype: str, sizes: tuple, mask: Tensor | None, what: str, seconds: float, backward: bool = False) -> dict:
    batch, heads, kv_heads, queries, keys, dim = sizes
    q = randn(batch, heads, queries, dim, dtype=DTYPES[dtype], requires_grad=backward)
    k, v = (randn(batch, kv_heads, keys, dim, dtype=DTYPES[dtype], seed=s, requires_grad=backward) for s in (1, 2))
    layer = Layer(heads // kv_heads)

    def timed(attention: Callable) -> Callable[[], object]:
        def run():
            out, _ = attention(layer, q, k, v, mask)
            if backward:
                out.sum().backward()

        return run

    described = dict(zip(FIELDS, (dtype, *sizes))) | {"what": what}
    for name, limit in LIMITS.items():
        keys_limits = dict.fromkeys(DTYPES.values(), (limit, limit))
        with (
            torch.set_grad_enabled(backward),
            mock.patch.multiple(huggingface, _DECODE_KEYS=keys_limits, _PACKED_LENGTH=limit),
        ):
            found = cpu_microseconds({"sdpa": timed(sdpa), name: timed(huggingface.attention)}, seconds)
        described |= {
            f"{name}_us": round(found[name], 1),
            f"{name}_against_sdpa": round(found["sdpa"] / found[name], 2),
        }
    return described


def block_mask(length: int, sequences: int) -> Tensor:
    """(1, 1, length, length): causal within each of as many sequences of one length."""
    sequence = torch.arange(length) // (length // sequences)
    return ((sequence[:, None] == sequence) & torch.ones(length, length, dtype=torch.bool).tril())[None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.05, help="for each rival in each row")
    options = parser.parse_args()
    facts, rows = machine.facts(), []
    torch.set_num_threads(1)
    for dtype in DTYPES:
        for batch, heads, kv_heads, dim, keys in STEPS:
            sizes = (batch, heads, kv_heads, 1, keys, dim)
            filled = (torch.arange(keys) <= keys // 2).expand(batch, 1, 1, keys)
            rows.append(row(dtype, sizes, None, "decode step", options.seconds))
            rows.append(row(dtype, sizes, filled, "decode step, static cache half full", options.seconds))
        for length, sequences in PACKED:
            for backward in (False, True):
                what = f"{sequences} sequences packed" + (", forward+backward" if backward else "")
                sizes = (1, 8, 4, length, length, 64)
                rows.append(row(dtype, sizes, block_mask(length, sequences), what, options.seconds, backward))
    for found in rows:
        print(*(f"{value!s:>9}" for value in found.values()))
    path = machine.RESULTS / "cpu" / "huggingface_cpu.json"
    path.write_text(json.dumps({"machine": facts, "one_thread_cpu_time": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
