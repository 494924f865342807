"""Where the C++ RNNs beat PyTorch's: `python -m bench.measure.rnn_cpu` writes bench/results/cpu/rnn_cpu.json.

`fused_ops.rnn.functional` takes its rules from the rows on one thread: CPU time, which a neighbour hardly disturbs.
`--wall` adds rows on all threads by the clock, the fastest of calls in turn, and the peak memory of a training step.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_ops
from bench import machine

KINDS = {"rnn_tanh": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
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
LONG = ((64, 8, 256), (64, 32, 64), (64, 32, 256), (64, 128, 256), (16, 128, 64), (16, 1, 1024), (32, 1, 1024))
OTHER = ((1, 1, 64), (8, 1, 64), (64, 1, 64), (8, 8, 128), (64, 8, 128), (8, 32, 256))
LARGE = ((64, 8, 256), (64, 32, 256), (64, 32, 512))  # minutes in float16
# (op, time, batch, inputs = hidden); a cell has one step, packed rows have evenly from `time` to half of it, and a
# projected state has half of hidden.
ONE_THREAD = (
    *((op, steps, batch, hidden) for op in KINDS for hidden in SIZES for steps, batch in SHORT),
    *((op, *shape) for op in KINDS for shape in LONG),
    *((f"{op}_cell", 1, batch, hidden) for op in KINDS for hidden in SIZES for batch in (1, 8, 32, 128, 300)),
    *((f"{op} float16", *shape) for op in KINDS for shape in OTHER),
    *((op, *shape) for op in (*(f"{op} bfloat16" for op in KINDS), "lstm projected") for shape in OTHER + LARGE),
)
ALL_THREADS = (
    *((op, 64, batch, hidden) for op in KINDS for batch, hidden in ((1, 64), (8, 128), (32, 512))),
    ("gru packed", 64, 32, 256),
    ("lstm packed", 500, 16, 64),
)
MEMORY = (*((op, 64, 32, 512) for op in KINDS), ("lstm", 500, 16, 64))


def calls(op: str, steps: int, batch: int, hidden: int, training: bool) -> dict[str, Callable[[], object]]:
    """{"fused", "torch"}: a forward, or a forward and its backward by the input and all parameters."""
    kind, packed = op.split()[0].removesuffix("_cell"), op.endswith("packed")
    settings = {"proj_size": hidden // 2} if op.endswith("projected") else {}
    settings["dtype"] = getattr(torch, op.split()[1]) if op.endswith("float16") else torch.float32
    cls = getattr(nn, f"{KINDS[kind].__name__}Cell") if op.endswith("_cell") else KINDS[kind]
    module = cls(hidden, hidden, **settings)
    fused = getattr(fused_ops.nn, cls.__name__)(hidden, hidden, **settings)
    fused.load_state_dict(module.state_dict())
    x = torch.randn(*((batch,) if op.endswith("_cell") else (steps, batch)), hidden, dtype=settings["dtype"])
    if packed:
        x = pack_padded_sequence(x, torch.linspace(steps, steps // 2, batch).long())
    data = x.data if packed else x
    data.requires_grad_(training)

    def output(module: nn.Module) -> Tensor:
        found = module(x)
        found = found[0] if isinstance(found, tuple) else found
        return found.data if packed else found

    seed = torch.randn_like(output(module))

    def call(module: nn.Module) -> Callable[[], object]:
        leaves = [data, *module.parameters()]
        if training:
            return lambda: torch.autograd.grad(output(module), leaves, seed)
        return lambda: torch.no_grad()(output)(module)

    return {"fused": call(fused), "torch": call(module)}


def fastest(rivals: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Microseconds of each one's fastest call, measured in turn with all served by name for `seconds` each."""
    found = dict.fromkeys(rivals, float("inf"))
    with fused_ops.use_backend("cpu"):
        for call in rivals.values():
            call()
        stop, rounds = time.perf_counter() + seconds * len(rivals), 0
        while time.perf_counter() < stop or rounds < 7:
            rounds += 1
            for name, call in rivals.items():
                start = clock()
                call()
                found[name] = min(found[name], (clock() - start) * 1e6)
    return found


def row(shape: tuple, training: bool, seconds: float, clock: Callable[[], float]) -> dict:
    found = fastest(calls(*shape, training), seconds, clock)
    facts = dict(zip(("op", "time", "batch", "hidden"), shape)) | {"pass": "training" if training else "forward"}
    facts |= {f"{name}_us": round(value, 1) for name, value in found.items()}
    return facts | {"speedup": round(found["torch"] / found["fused"], 2)}


def peak_kilobytes(name: str, op: str, steps: int, batch: int, hidden: int) -> int:
    """What a training step adds to the resident set of this process, a fresh one, at most."""
    call = calls(op, steps, batch, hidden, training=True)[name]
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _resident("VmRSS")
    with fused_ops.use_backend("cpu"):
        for _ in range(2):
            call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def memory(shape: tuple) -> dict:
    found = {}
    for name in ("fused", "torch"):
        program = f"from bench.measure import rnn_cpu; print(rnn_cpu.peak_kilobytes({name!r}, *{shape!r}))"
        found[f"{name}_kb"] = int(
            subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
        )
    return dict(zip(("op", "time", "batch", "hidden"), shape)) | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.1, help="for each rival in each row")
    parser.add_argument("--wall", action="store_true", help="also measure wall time on all threads, and memory")
    options = parser.parse_args()
    seconds, tables = options.seconds, {"machine": machine.facts()}
    if options.wall:
        clock = time.perf_counter
        tables["all_threads_wall_time"] = [
            row(shape, training, 10 * seconds, clock) for shape in ALL_THREADS for training in (False, True)
        ]
        tables["peak_memory_of_training"] = [memory(shape) for shape in MEMORY]
    torch.set_num_threads(1)
    tables["one_thread_cpu_time"] = [
        row(shape, training, seconds, time.thread_time) for shape in ONE_THREAD for training in (False, True)
    ]
    for rows in list(tables.values())[1:]:
        for found in rows:
            print(found)
    path = machine.RESULTS / "cpu" / "rnn_cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
