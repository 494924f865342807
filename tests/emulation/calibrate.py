"""Is the emulator right? `python -m tests.emulation.calibrate [--write]`.

Kernels of tests/emulation/kernels, each of which uses one wrapper of csrc/common, on inputs and with results that are
committed in tests/emulation/calibration. The emulator's results are compared with them and, where there is a GPU, its
own, whose libraries nvcc builds from the same .cu files. Small integers, whose sums are exact, and data that is only
moved must agree bit for bit; the rest may differ by what its case states. `--write` writes the emulator's.
"""

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy
import torch
from torch import Tensor

from tests.emulation import build, kernels
from tests.gate import ROOT, find_nvcc
from tests.support import randn

DATA = kernels.HERE / "calibration"
DEVICE_BUILD = ROOT / "build/calibration"


@dataclass(frozen=True)
class Case:
    """`entry` of kernels/`library`.cu, which overwrites its outputs among the tensors of `arguments`.

    `bound(*arguments)` is by how much an element of the last tensor may differ; None: bit for bit.
    """

    library: str
    entry: str
    label: str
    arguments: tuple[Tensor | int, ...]
    bound: Callable[..., Tensor | float] | None = None

    @property
    def name(self) -> str:
        return f"{self.entry} {self.label}".strip()


def _integers(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def _mma_bound(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """PTX leaves the order and the rounding open: terms are cut off at 2^-24 of the largest, 17 of them, and an ulp."""
    terms = (a.double().abs()[:, :, None] * b.double().abs()[None]).amax(1)
    exact = a.double() @ b.double() + c.double()
    return 2.0**-20 * torch.maximum(terms, c.double().abs()) + 2.0**-23 * exact.abs()


def _sync() -> Iterator[Case]:
    zero = torch.zeros(1, dtype=torch.int32)
    yield Case("sync", "produce", "", (_integers(21, 32), torch.zeros(32)))
    yield Case("sync", "halves", "", (randn(128), torch.zeros(128), 5))
    yield Case("sync", "chain", "", (_integers(13, 32), torch.zeros(13, 32), torch.zeros(13, dtype=torch.int32)))
    for fenced in (0, 1):
        arguments = (_integers(40, 16), torch.zeros(40), torch.zeros(1), zero, fenced)
        yield Case("sync", "last", "with a fence" if fenced else "", arguments)
    yield Case("sync", "steps", "", (_integers(400), torch.zeros(400), zero, 5, 96))
    for library, scopes in (("sync", 3), ("hopper", 1)):
        for entry, dtype in (("float", torch.float32), ("int", torch.int32), ("long", torch.int64)):
            yield Case(library, f"words_{entry}", library, (torch.arange(5 * scopes).to(dtype) + 1,))


def _copies() -> Iterator[Case]:
    for size in (4, 8, 16):
        x = randn(5, 32 * size // 4)
        for stages in (2, 4):
            yield Case("async_copy", "staged", f"{size}, {stages}", (x, torch.zeros_like(x), size, 32, stages))
        for n in (1, 31, 64):
            x = torch.randint(1, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
            yield Case("async_copy", "padded", f"{size}, {n}", (x, torch.zeros(32 * size, dtype=torch.uint8), size))


def _matrices() -> Iterator[Case]:
    rows = torch.arange(256, dtype=torch.int16).view(32, 8)
    for count in (1, 2, 4):
        for suffix in ("", "_trans"):
            registers = torch.arange(1, 64 * count + 1, dtype=torch.int16).view(torch.int32)
            yield Case("mma", f"load_x{count}{suffix}", "", (rows, torch.zeros(32 * count, dtype=torch.int32)))
            yield Case("hopper", f"store_x{count}{suffix}", "", (registers, rows - 256))
    for entry, dtype, k in (
        ("multiply_half", torch.float16, 16),
        ("multiply_bfloat16", torch.bfloat16, 16),
        ("multiply_tf32", torch.float32, 8),
    ):
        made = [(_integers, "integers", None), (randn, "random", _mma_bound)]
        for make, label, bound in made:
            a, b = make(16, k, dtype=dtype), make(k, 8, dtype=dtype, seed=1)
            if dtype == torch.float32:  # what tf32 holds of it
                a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
            yield Case("mma", entry, label, (a, b, make(16, 8, seed=2)), bound)
    whole = randn(16, 8), randn(8, 8, seed=1), randn(16, 8, seed=2)
    yield Case("mma", "multiply_tf32", "with lower bits", whole, _mma_bound)
    x = torch.cat([randn(100), torch.tensor([1 + 2**-11, -1 - 2**-11, 0.0, 3e-39, float("inf")])])
    yield Case("mma", "round_tf32", "", (x, torch.zeros(len(x), dtype=torch.int32)))


def _attention() -> Iterator[Case]:
    q, k, v = (randn(n, 64, dtype=torch.float16, seed=i) for i, n in enumerate((33, 70, 70)))

    def bound(q, k, v, out):
        return 2.0**-10 * v.abs().max().item()  # __expf, and probabilities rounded to float16 after it

    yield Case("attention", "attention", "", (q, k, v, torch.zeros(33, 64)), bound)


def _clusters() -> Iterator[Case]:
    counts = torch.randint(0, 37, (513,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    yield Case("cluster", "ranks", "", (torch.zeros(4, 4, 4, 2, dtype=torch.int32), 4, 4, 4, 2, 2, 2))
    yield Case("cluster", "sum", "", (_integers(1001), torch.zeros(2), 16, 8))
    yield Case("cluster", "histogram", "", (counts, torch.zeros(37, dtype=torch.int32), 5))
    yield Case("cluster", "pass_on", "", (torch.zeros(8, 32, dtype=torch.int32), 4, 0))
    yield Case("mbarrier", "ring", "", (_integers(500), torch.zeros(500)))
    yield Case("mbarrier", "phases", "", (torch.zeros(14, dtype=torch.int32),))
    yield Case("mbarrier", "all_to_all", "", (torch.zeros(2, 5, 5, dtype=torch.int32), 5, 4))
    yield Case("mbarrier", "many", "", (torch.zeros(64),))


def _bulk_copies() -> Iterator[Case]:
    """Boxes of 8 rows of a (9, 88) matrix, the innermost dimension first in what describes them to the kernel."""
    yield Case("bulk_copy", "add_one", "", (_integers(1000), torch.zeros(1000), 128))
    for tensor in (0, 1):
        yield Case("bulk_copy", "multicast", f"{tensor}", (_integers(128), torch.zeros(4, 128), 4, tensor))
    matrix = torch.arange(9 * 88, dtype=torch.float16).view(9, 88)
    for swizzle, width in enumerate((24, 16, 32, 64)):
        for at in ((-3, -1), (70, 4)):
            five = ((88, 9), (1, 88), (width, 8), (1, 1), at)
            spec = torch.tensor([n for two in five for n in (*two, 0, 0, 0)] + [swizzle, 0])
            label = f"swizzle {swizzle}, {at}"
            tile = -1 - torch.arange(8 * width, dtype=torch.float16)
            yield Case("bulk_copy", "load_half", label, (matrix, torch.zeros(8 * width, dtype=torch.float16), spec, 2))
            yield Case("bulk_copy", "store_half", label, (tile, matrix, spec, 2))


@cache
def cases() -> tuple[Case, ...]:
    from tests.emulation.wgmma_cases import wgmma_cases  # which imports this module

    found = (*_sync(), *_copies(), *_matrices(), *_attention(), *_clusters(), *_bulk_copies(), *wgmma_cases())
    assert len({(case.library, case.name) for case in found}) == len(found)
    return found


def run(case: Case, device: bool = False) -> list[Tensor]:
    """The case's tensors after a call in the emulator, or on the GPU."""
    mine = [a.clone() if isinstance(a, Tensor) else a for a in case.arguments]
    if device:
        kernels.call(device_library(case.library), case.entry, *mine)
    else:
        kernels.run(case.library, case.entry, *mine)
    return [a for a in mine if isinstance(a, Tensor)]


def write() -> None:
    DATA.mkdir(exist_ok=True)
    for library in libraries():
        arrays = {}
        for case in (case for case in cases() if case.library == library):
            before = [a for a in case.arguments if isinstance(a, Tensor)]
            for i, (old, new) in enumerate(zip(before, run(case), strict=True)):
                arrays[f"{case.name}/before {i}"] = old.contiguous().view(torch.uint8).numpy()
                if not torch.equal(old.view(torch.uint8), new.view(torch.uint8)):  # what is not written is there once
                    arrays[f"{case.name}/after {i}"] = new.contiguous().view(torch.uint8).numpy()
        numpy.savez_compressed(DATA / f"{library}.npz", **arrays)


def libraries() -> list[str]:
    return sorted({case.library for case in cases()})


@cache
def _committed(library: str) -> dict[str, numpy.ndarray]:
    return dict(numpy.load(DATA / f"{library}.npz"))


def committed(case: Case, when: str) -> list[Tensor]:
    tensors = [a for a in case.arguments if isinstance(a, Tensor)]
    data = _committed(case.library)
    arrays = (data.get(f"{case.name}/{when} {i}", data[f"{case.name}/before {i}"]) for i in range(len(tensors)))
    return [torch.from_numpy(a.copy()).view(t.dtype).view(t.shape) for a, t in zip(arrays, tensors, strict=True)]


def with_committed_inputs(case: Case) -> Case:
    before = iter(committed(case, "before"))
    arguments = tuple(next(before) if isinstance(a, Tensor) else a for a in case.arguments)
    return Case(case.library, case.entry, case.label, arguments, case.bound)


def difference(case: Case, device: bool = False) -> str:
    """How the results on the committed inputs differ from the committed ones, or ""."""
    case = with_committed_inputs(case)
    found, wanted = run(case, device), committed(case, "after")
    last = len(found) - 1
    for i, (got, want) in enumerate(zip(found, wanted, strict=True)):
        if i == last and case.bound is not None:
            excess = ((got.double() - want.double()).abs() / case.bound(*case.arguments)).max().item()
            if not excess <= 1:
                return f"differs by {excess:.2f} times what it may"
        elif not torch.equal(got.view(torch.uint8), want.view(torch.uint8)):
            count = (got.view(torch.uint8) != want.view(torch.uint8)).sum().item()
            return f"{count} bytes of tensor {i} differ"
    return ""


def compile_for_device(library: str, architecture: str) -> Path:
    """kernels/`library`.cu as a shared library for the GPU: the same entry points, arrays copied to it and back."""
    DEVICE_BUILD.mkdir(parents=True, exist_ok=True)
    target = DEVICE_BUILD / f"{library}.{architecture}.so"
    folders = (ROOT / "csrc", kernels.HERE, kernels.HERE / "kernels/device")
    chip = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    command = [find_nvcc(), "-std=c++20", "-O3", chip, "-shared", "-Xcompiler", "-fPIC"]
    command += [*(f"-I{folder}" for folder in folders), "-o", str(target), str(kernels.source(library))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{library}.cu does not compile for {architecture}:\n{done.stderr}")
    return target


@cache
def device_library(library: str) -> ctypes.CDLL:
    major, minor = torch.cuda.get_device_capability()
    return ctypes.CDLL(str(compile_for_device(library, f"sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}")))


def runs_on_device(case: Case) -> bool:
    capability = torch.cuda.get_device_capability()
    if case.library == "wgmma":
        return capability == (9, 0)
    return case.library not in ("hopper", "cluster", "mbarrier", "bulk_copy") or capability >= (9, 0)


def report(device: bool) -> int:
    """Prints every case that differs, and returns how many."""
    which = [case for case in cases() if not device or runs_on_device(case)]
    if device:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(device_library, sorted({case.library for case in which})))
    failures = 0
    for case in which:
        said = difference(case, device)
        failures += bool(said)
        if said:
            print(f"{case.library}.cu {case.name}: {said}")
    where = torch.cuda.get_device_name() if device else "the emulator"
    print(f"{where}: {len(which)} cases, {failures} differ from tests/emulation/calibration")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulation.calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write what the emulator finds")
    if parser.parse_args().write:
        write()
    failures, reason = 0, build.missing()
    if reason is None:
        failures += report(False)
    else:
        print(f"nothing is compared with the emulator: {reason}")
    if torch.cuda.is_available():
        failures += report(True)
    else:
        print("no GPU: nothing is compared with one")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
