"""Where the C++ GRU beats PyTorch's: `python -m bench.measure.gru_cpu` writes bench/results/cpu/gru_cpu.json.

`fused_ops.rnn.functional` takes its rules from the rows on one thread: CPU time, which a neighbour hardly disturbs.
`--wall` adds rows on all threads by the clock, for a machine that does nothing else.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_ops
from bench import machine
from bench.timing import measure

SIZES = (16, 64, 128, 256, 512)
SHORT = (
    (1, 1),
    (2, 1),
    (4, 1),
    (8, 1),
    (16, 1),
    (64, 1),
    (1, 8),
    (4, 8),
    (16, 8),
    (1, 32),
    (4, 32),
    (1, 128),
    (2, 128),
)
# (op, time, batch, inputs = hidden); a cell has one step, ragged rows have from 1 to `time`, all equally often.
ONE_THREAD = (
    *(("gru", steps, batch, hidden) for hidden in SIZES for steps, batch in SHORT),
    *(("gru_cell", 1, batch, hidden) for hidden in SIZES for batch in (1, 8, 32, 64, 128, 300)),
)
ALL_THREADS = (
    *(("gru", 64, batch, hidden) for batch, hidden in ((1, 64), (1, 512), (8, 128), (32, 256), (32, 512), (128, 256))),
    *(("gru ragged", 16, batch, 256) for batch in (8, 300)),
    *(("gru_cell", 1, batch, 256) for batch in (32, 128, 300)),
)


def calls(op: str, steps: int, batch: int, hidden: int) -> dict[str, Callable[[], object]]:
    module = (nn.GRUCell if op == "gru_cell" else nn.GRU)(hidden, hidden).eval()
    params, h, x = list(module.parameters()), torch.randn(1, batch, hidden), torch.randn(steps, batch, hidden)
    call = (x, h, params, True, 1, 0.0, False, False, False)
    if op == "gru_cell":
        return {
            "fused": lambda: fused_ops.gru_cell(x[0], h[0], *params, backend="cpu"),
            "torch": lambda: module(x[0], h[0]),
        }
    if op == "gru ragged":
        lengths = torch.arange(batch) % steps + 1
        return {
            "fused": lambda: fused_ops.gru(*call, lengths=lengths, backend="cpu"),
            "torch": lambda: module(pack_padded_sequence(x, lengths, enforce_sorted=False), h),
        }
    return {"fused": lambda: fused_ops.gru(*call, backend="cpu"), "torch": lambda: module(x, h)}


def cpu_microseconds(call: Callable[[], object], seconds: float) -> float:
    """The 10th percentile of this thread's CPU time per call."""
    samples, stop = [], time.perf_counter() + seconds
    call()
    while time.perf_counter() < stop or len(samples) < 10:
        start = time.thread_time()
        call()
        samples.append(time.thread_time() - start)
    return sorted(samples)[len(samples) // 10] * 1e6


@torch.no_grad()
def one_thread(shape: tuple, seconds: float) -> dict:
    found = {name: cpu_microseconds(call, seconds) for name, call in calls(*shape).items()}
    return described(shape, found)


@torch.no_grad()
def all_threads(shape: tuple, seconds: float) -> dict:
    found = measure(calls(*shape), seconds=seconds)
    return described(shape, {name: timing.p20 * 1e3 for name, timing in found.timings.items()}) | {
        "disturbed": found.disturbed
    }


def described(shape: tuple, microseconds: dict[str, float]) -> dict:
    row = dict(zip(("op", "time", "batch", "hidden"), shape))
    row |= {f"{name}_us": round(value, 1) for name, value in microseconds.items()}
    return row | {"speedup": round(microseconds["torch"] / microseconds["fused"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each rival in each row")
    parser.add_argument("--wall", action="store_true", help="also measure wall time on all threads")
    options = parser.parse_args()
    seconds, facts = options.seconds, machine.facts()
    wall = [all_threads(shape, 2 * seconds) for shape in ALL_THREADS] if options.wall else []
    torch.set_num_threads(1)
    cpu = [one_thread(shape, seconds) for shape in ONE_THREAD]
    for row in (*wall, *cpu):
        print(row)
    path = machine.RESULTS / "cpu" / "gru_cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = {"machine": facts, "one_thread_cpu_time": cpu} | ({"all_threads_wall_time": wall} if wall else {})
    path.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
