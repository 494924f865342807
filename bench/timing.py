"""Interleaved timing that notices a neighbour.

Before and after each row a fixed spin loop is timed; if it runs slower than the machine at rest, the row is measured
again, and marked if that doesn't help or a minute of the run has gone into such repeats.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

DISTURBED = 1.25  # a spin loop this much slower than at rest means a neighbour
ATTEMPTS = 3
_rest: float | None = None
_spare = 60.0  # seconds left for repeats


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        ordered = sorted(samples)
        return cls(
            statistics.median(ordered),
            ordered[len(ordered) // 5],
            ordered[min(len(ordered) * 4 // 5, len(ordered) - 1)],
        )


@dataclass(frozen=True)
class Measurement:
    """The timings of rivals measured together, and whether a neighbour disturbed them."""

    timings: dict[str, Timing]
    disturbed: bool

    def ratio(self, ours: str, theirs: str) -> float:
        """How many times faster `ours` is."""
        return self.timings[theirs].median / self.timings[ours].median


def spin() -> float:
    """Milliseconds of the fastest of three runs of a fixed loop that needs one core."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        total = 0
        for i in range(60_000):
            total += i * i
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def at_rest() -> float:
    """The spin loop's time on this machine undisturbed: the fastest seen so far."""
    global _rest
    if _rest is None:
        _rest = min(spin() for _ in range(10))
    return _rest


def measure(rivals: dict[str, Callable[[], object]], *, seconds: float = 1.0, on_gpu: bool = False) -> Measurement:
    """Time `rivals` in turn, round after round, for about `seconds` each; a disturbed row is measured again."""
    global _spare
    result = None
    for _ in range(ATTEMPTS):
        start, rest, before = time.perf_counter(), at_rest(), spin()
        timings = (_gpu_rounds if on_gpu else _cpu_rounds)(rivals, seconds)
        after = spin()
        result = Measurement(timings, max(before, after) > DISTURBED * rest)
        if not result.disturbed or _spare <= 0.0:
            break
        _spare -= time.perf_counter() - start
    return result


def _cpu_rounds(rivals, seconds: float) -> dict[str, Timing]:
    calls = {name: _calls_per_sample(fn) for name, fn in rivals.items()}
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    stop = time.perf_counter() + seconds * len(rivals)
    turns = list(rivals)
    while time.perf_counter() < stop or len(samples[turns[0]]) < 7:
        for name in turns:
            fn = rivals[name]
            start = time.perf_counter()
            for _ in range(calls[name]):
                fn()
            samples[name].append((time.perf_counter() - start) * 1e3 / calls[name])
        turns.append(turns.pop(0))  # nobody always follows the same rival's caches
    return {name: Timing.of(values) for name, values in samples.items()}


def _calls_per_sample(fn: Callable[[], object], shortest: float = 2e-3) -> int:
    """How many calls fill `shortest` seconds, after a warm-up."""
    for _ in range(3):
        fn()
    start = time.perf_counter()
    fn()
    return max(1, int(shortest / max(time.perf_counter() - start, 1e-7)))


def _gpu_rounds(rivals, seconds: float) -> dict[str, Timing]:
    """Device time by events, the L2 cache flushed before every call."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    for fn in rivals.values():
        for _ in range(5):
            fn()
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    stop = time.perf_counter() + seconds * len(rivals)
    turns = list(rivals)
    while time.perf_counter() < stop or len(samples[turns[0]]) < 10:
        events = {}
        for name in turns:
            fn = rivals[name]
            flush.fill_(1)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            fn()
            end.record()
            events[name] = start, end
        turns.append(turns.pop(0))
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            samples[name].append(start.elapsed_time(end))
    return {name: Timing.of(values) for name, values in samples.items()}
