"""Where a head in blocks beats F.linear: `python -m bench.measure.head_cpu` writes results/cpu/head_cpu.json.

`fused_ops.models.language` takes its rule from the rows on one thread: CPU time, which a neighbour hardly disturbs.
`--wall` adds rows on all threads by the clock, for a machine that does nothing else.
"""

import argparse
import json

import torch
import torch.nn.functional as F

from bench import machine
from bench.measure.decode_cpu import cpu_microseconds
from bench.timing import measure
from fused_ops.models.language import in_blocks
from tests.support import randn

TABLES = ((50257, 768), (50257, 1280), (30522, 384), (30522, 768), (8000, 512), (4096, 256), (1000, 256))
ROWS = (1, 2, 3, 4, 5, 6, 8)


def row(vocabulary: int, hidden: int, rows: int, seconds: float, wall: bool) -> dict:
    x, weight = randn(rows, hidden), torch.randn(vocabulary, hidden)
    rivals = {"blocks": lambda: in_blocks(x, weight), "linear": lambda: F.linear(x, weight)}
    if wall:
        found = measure(rivals, seconds=seconds)
        microseconds = {name: timing.p20 * 1e3 for name, timing in found.timings.items()}
    else:
        microseconds = cpu_microseconds(rivals, seconds)
    described = {"vocabulary": vocabulary, "hidden": hidden, "rows": rows}
    described |= {f"{name}_us": round(taken, 1) for name, taken in microseconds.items()}
    described["against_linear"] = round(microseconds["linear"] / microseconds["blocks"], 2)
    return described | ({"disturbed": found.disturbed} if wall else {})


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each rival in each row")
    parser.add_argument("--wall", action="store_true", help="also measure wall time on all threads")
    options = parser.parse_args()
    facts = machine.facts()
    cases = [(*table, rows) for table in TABLES for rows in ROWS]
    wall = [row(*case, options.seconds, True) for case in cases] if options.wall else []
    torch.set_num_threads(1)
    cpu = [row(*case, options.seconds, False) for case in cases]
    for found in (*wall, *cpu):
        print(*(f"{value!s:>9}" for value in found.values()))
    tables = {"machine": facts, "one_thread_cpu_time": cpu} | ({"all_threads_wall_time": wall} if wall else {})
    (machine.RESULTS / "cpu" / "head_cpu.json").write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
