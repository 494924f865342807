"""Where `torch.compile(backend="fused_ops")` gains on a CPU: `python -m bench.measure.dynamo_cpu` writes
results/cpu/dynamo_cpu.json.

`fused_ops.integrations.dynamo.attention` takes its rule from the rows of attention, written so that inductor's own
patterns do not match; the rows of blocks show chains of convolutions under inductor, and under inductor with freezing.
One thread, CPU time, which a neighbour hardly disturbs; the rivals in turn. A graph is compiled once for all lengths.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench import machine
from bench.measure.decode_cpu import cpu_microseconds
from fused_ops.integrations import dynamo
from fused_ops.integrations.dynamo import attention as rewriting
from tests.support import randn

LENGTHS = ((40, 40), (128, 128), (256, 256), (512, 512), (1024, 1024))  # the first only compiles
CROSS = ((24, 40), (16, 4096), (64, 1024))
HEADS = 8
SETTINGS = (
    (64, torch.float32, "inductor"),
    (64, torch.float32, "eager"),
    (128, torch.float32, "inductor"),
)
BLOCKS = (
    ("bottleneck", 256, 64, 56),
    ("bottleneck", 1024, 256, 14),
    ("depthwise", 24, 144, 56),
    ("depthwise", 40, 240, 28),
)


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * 0.125
    return torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), value).flatten(2)


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.size(-1))
    scores = torch.where(mask < 0, torch.finfo(scores.dtype).min, scores)
    return (torch.softmax(scores, -1) @ value).transpose(1, 2).flatten(2)


def causal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.size(-1))
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return (torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ value).transpose(1, 2).flatten(2)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 with batch norm, ReLU and a residual; depthwise: the middle one."""

    def __init__(self, channels: int, width: int, depthwise: bool):
        super().__init__()
        shapes = ((channels, width, 1, 1), (width, width, 3, width if depthwise else 1), (width, channels, 1, 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2, groups=g, bias=False) for i, o, k, g in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in shapes)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            y = norm(conv(y))
            y = torch.relu(y + x if place == 2 else y)
        return y


def row(described: dict, rivals: dict[str, Callable[[], object]], seconds: float) -> dict:
    for call in rivals.values():
        call()  # compiles; so may the first call that is timed
    found = cpu_microseconds(rivals, seconds)
    times = {f"{name}_us": round(taken, 1) for name, taken in found.items()}
    described |= times | {"ratio": round(found["written"] / found["rewritten"], 2)}
    print(*(f"{value!s:>10}" for value in described.values()), flush=True)
    return described


def attention_rows(seconds: float) -> Iterator[dict]:
    """Every length rewritten, whatever the rule says."""
    kinds = product(SETTINGS, (plain, masked, causal), (False, True), (LENGTHS, CROSS))
    for (dim, dtype, then), written, trains, lengths in kinds:
        if written is causal and lengths is CROSS:
            continue
        facts = {"dtype": str(dtype)[6:], "dim": dim, "then": then, "kind": written.__name__, "trains": trains}
        torch.compiler.reset()
        rewritten = torch.compile(written, backend=dynamo.backend, options={"then": then})
        rivals = {"written": torch.compile(written) if then == "inductor" else written, "rewritten": rewritten}
        for rows, columns in lengths:
            call = inputs(rows, columns, dim, dtype, trains)
            steps = {name: partial(step, attend, call, trains) for name, attend in rivals.items()}
            if (rows, columns) == lengths[0]:
                for tensor, dims in zip(call, ((2,), (2,), (2,), (2, 3))):
                    torch._dynamo.mark_dynamic(tensor, dims)
                for run in steps.values():
                    run()
            else:
                yield row(facts | {"queries": rows, "keys": columns}, steps, seconds)


def inputs(rows: int, columns: int, dim: int, dtype: torch.dtype, trains: bool) -> list[Tensor]:
    query = randn(1, HEADS, rows, dim, dtype=dtype, requires_grad=trains)
    key, value = (randn(1, HEADS, columns, dim, dtype=dtype, seed=seed, requires_grad=trains) for seed in (1, 2))
    return [query, key, value, randn(1, 1, rows, columns, dtype=dtype)]


def step(attend: Callable, call: list[Tensor], trains: bool) -> object:
    with torch.set_grad_enabled(trains):
        out = attend(*call)
        return torch.autograd.grad(out.sum(), call[:3]) if trains else out


def block_rows(seconds: float) -> Iterator[dict]:
    for (kind, channels, width, size), batch, frozen in product(BLOCKS, (1, 4), (False, True)):
        torch.compiler.reset()
        block = nn.Sequential(*(Bottleneck(channels, width, kind == "depthwise") for _ in range(2))).eval()
        x, options = randn(batch, channels, size, size), {"freezing": True} if frozen else {}
        rivals = {
            "written": torch.compile(block, options=options),
            "rewritten": torch.compile(block, backend=dynamo.backend, options={"then": "inductor", **options}),
        }
        facts = {"block": kind, "channels": channels, "width": width, "size": size, "batch": batch, "frozen": frozen}
        with torch.no_grad():
            yield row(facts, {name: partial(rival, x) for name, rival in rivals.items()}, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.08, help="for each rival in each row")
    options = parser.parse_args()
    facts = machine.facts()
    torch.set_num_threads(1)
    blocks = list(block_rows(4 * options.seconds))
    with patch.object(rewriting, "_check_worth"):
        attention = list(attention_rows(options.seconds))
    tables = {"machine": facts, "blocks": blocks, "attention": attention}
    path = machine.RESULTS / "cpu" / "dynamo_cpu.json"
    path.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
