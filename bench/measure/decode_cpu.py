"""Where the C++ decode kernel beats PyTorch: `python -m bench.measure.decode_cpu` writes results/cpu/decode_cpu.json.

`fused_ops.attention.functional` takes its rule from the rows on one thread: CPU time, which a neighbour hardly
disturbs. A rival is the `reference` backend; F is F.scaled_dot_product_attention with a mask, which reads each cache to
its end. `--wall` adds rows on all threads by the clock, for a machine that does nothing else.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench import machine
from bench.timing import measure
from fused_ops import decode_attention
from tests.support import randn

FIELDS = ("dtype", "batch", "heads", "kv_heads", "capacity", "dim", "queries")
HEADS = ((1, 1), (8, 8), (8, 2), (16, 1))
QUERIES = (1, 2, 4, 8, 16, 32, 64, 128)
# (batch, heads, kv_heads, capacity, dim, queries); lengths go evenly from half the capacity to all of it.
SHAPES = (
    (1, 1, 1, 1, 8, 1),
    (1, 1, 1, 16, 8, 1),
    (1, 4, 2, 64, 32, 1),
    *((batch, *heads, capacity, 64, 1) for batch in (1, 4) for heads in HEADS for capacity in (64, 256, 1024)),
    *((1, *heads, 512, dim, queries) for heads in ((4, 4), (8, 2)) for dim in (64, 128) for queries in QUERIES),
    (1, 32, 8, 4096, 128, 1),
    (4, 8, 2, 1024, 80, 1),
    (4, 8, 2, 1024, 72, 1),
)
WALL = ((4, 8, 2, 1024, 64, 1), (1, 8, 8, 1024, 64, 1), (1, 32, 8, 4096, 128, 1), (4, 8, 2, 1024, 64, 4))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def calls(dtype: str, batch: int, heads: int, kv_heads: int, capacity: int, dim: int, queries: int):
    """(rivals, bytes of the caches within the lengths)"""
    q = randn(batch, heads, queries, dim, dtype=DTYPES[dtype])
    k, v = (randn(batch, kv_heads, capacity, dim, dtype=DTYPES[dtype], seed=seed) for seed in (1, 2))
    lengths = (
        torch.linspace((capacity + 1) // 2, capacity, batch).int() if batch > 1 else torch.tensor([capacity]).int()
    )
    own = lengths[:, None, None] - queries + torch.arange(queries)[:, None]
    mask = (torch.arange(capacity) <= own)[:, None]
    rivals: dict[str, Callable[[], object]] = {
        "cpu": lambda: decode_attention(q, k, v, lengths, backend="cpu"),
        "reference": lambda: decode_attention(q, k, v, lengths, backend="reference"),
        "F": lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
    }
    return rivals, 2 * int(lengths.sum()) * kv_heads * dim * q.element_size()


def cpu_microseconds(rivals: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The 10th percentile of this thread's CPU time per call, the rivals in turn."""
    samples = {name: [] for name in rivals}
    for call in rivals.values():
        call()
    stop = time.perf_counter() + seconds * len(rivals)
    while time.perf_counter() < stop or min(map(len, samples.values())) < 10:
        for name, call in rivals.items():
            start = time.thread_time()
            call()
            samples[name].append(time.thread_time() - start)
    return {name: sorted(taken)[len(taken) // 10] * 1e6 for name, taken in samples.items()}


def row(dtype: str, shape: tuple, seconds: float, wall: bool) -> dict:
    rivals, size = calls(dtype, *shape)
    disturbed = {}
    if wall:
        found = measure(rivals, seconds=seconds)
        microseconds, disturbed = (
            {name: timing.p20 * 1e3 for name, timing in found.timings.items()},
            {"disturbed": found.disturbed},
        )
    else:
        microseconds = cpu_microseconds(rivals, seconds)
    described = dict(zip(FIELDS, (dtype, *shape))) | {f"{name}_us": round(t, 1) for name, t in microseconds.items()}
    for name in ("reference", "F"):
        described[f"against_{name}"] = round(microseconds[name] / microseconds["cpu"], 2)
    return described | {"gigabytes_a_second": round(size / microseconds["cpu"] / 1e3, 1)} | disturbed


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.05, help="for each rival in each row")
    parser.add_argument("--wall", action="store_true", help="also measure wall time on all threads")
    options = parser.parse_args()
    facts = machine.facts()
    wall = [row(dtype, shape, 6 * options.seconds, True) for dtype in DTYPES for shape in WALL] if options.wall else []
    torch.set_num_threads(1)
    cpu = [row(dtype, shape, options.seconds, False) for dtype in DTYPES for shape in SHAPES]
    for found in (*wall, *cpu):
        print(*(f"{value!s:>9}" for value in found.values()))
    path = machine.RESULTS / "cpu" / "decode_cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = {"machine": facts, "one_thread_cpu_time": cpu} | ({"all_threads_wall_time": wall} if wall else {})
    path.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
