"""How fast the emulator is: `python -m tests.emulation.speed`. The best of several runs, beside what is wanted."""

import time
from collections.abc import Callable

import torch

from tests.emulation.kernels import run
from tests.support import randn

TIMES, RUNS = 16384, 7


def best(call: Callable[[], None]) -> float:
    """Seconds of the fastest run; the first one builds, and is not counted."""
    call()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def switches(entry: str, blocks: int, checked: bool) -> float:
    """Millions a second, of 256 threads a block."""
    out = [torch.empty(256 * blocks)] if entry == "shuffles" else []
    times = TIMES // blocks
    return times * blocks * 256 / 1e6 / best(lambda: run("yields", entry, *out, times, 256, blocks, checked=checked))


def attention(queries: int, keys: int, checked: bool) -> float:
    """Milliseconds of one head with 64 dimensions in float16."""
    q, k, v = (randn(n, 64, dtype=torch.float16, seed=i) for i, n in enumerate((queries, keys, keys)))
    out = torch.empty(queries, 64)
    return 1e3 * best(lambda: run("attention", "attention", q, k, v, out, checked=checked))


def main() -> None:
    for checked, wanted in ((False, 20), (True, 2)):
        for entry in ("yields", "barriers", "shuffles"):
            for blocks in (1, 8):
                rate = switches(entry, blocks, checked)
                print(f"{entry}, 256 threads, {blocks} blocks, checked={checked}: {rate:.1f} M/s (wanted: {wanted})")
    for checked, wanted in ((False, 10), (True, 30)):
        for queries in (64, 128):
            took = attention(queries, 128, checked)
            print(
                f"attention of {queries} queries, 128 keys, checked={checked}: {took:.1f} ms (wanted of 64: {wanted})"
            )


if __name__ == "__main__":
    main()
