"""Small kernels of the tests, compiled for the emulator: kernels/*.cu and mutants/*.cu here, one library each.

Every entry point is `FUSED_OPS_TEST name(pointer, count, ..., int64 values) { return tell([&] { ... }); }`.
"""

import ctypes
import fcntl
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.emulation import build

HERE = Path(__file__).parent
BUILD = build.BUILD / "tests"


def source(name: str) -> Path:
    """Of kernels/`name`.cu, or mutants/barriers.cu for "mutants/barriers"."""
    return (HERE if "/" in name else HERE / "kernels") / f"{name}.cu"


def compiled(name: str) -> Path:
    """`name` linked with an emulator of its own."""
    folder = BUILD
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        emulator = [path for path in build.sources().values() if path.suffix == ".cpp"]
        objects = " ".join(f"{path.stem}.o" for path in emulator)
        lines = [f"build {path.stem}.o: emulator {path}" for path in emulator]
        for path in sorted([*HERE.glob("kernels/*.cu"), *HERE.glob("mutants/*.cu")]):
            target = f"{path.parent.name}.{path.stem}"
            lines += [f"build {target}.o: kernel {path}", f"build {target}.so: link {objects} {target}.o"]
        rules = build._rules([HERE / "kernels/emulated", HERE])
        build._write(folder / "build.ninja", "\n".join([rules, *lines, ""]))
        path = source(name)
        build._run(folder, f"{path.parent.name}.{path.stem}.so")
    return folder / f"{path.parent.name}.{path.stem}.so"


@cache
def library(name: str) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(compiled(name)))
    loaded.fused_ops_emulate_seed.argtypes = [ctypes.c_uint64]
    loaded.fused_ops_emulate_checked.argtypes = [ctypes.c_bool]
    return loaded


def call(loaded: ctypes.CDLL, entry: str, *arguments) -> None:
    """Calls an entry point: a tensor is passed as its pointer and its count, an int as int64. Raises what it tells."""
    values = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            values += [ctypes.c_void_p(argument.data_ptr()), ctypes.c_int64(argument.numel())]
        else:
            values.append(ctypes.c_int64(argument))
    function = getattr(loaded, entry)
    function.restype = ctypes.c_char_p
    said = function(*values)
    if said is not None:
        raise RuntimeError(said.decode())


def run(name: str, entry: str, *arguments, seed: int = 0, checked: bool = True) -> None:
    """`call`, in the emulator, in the order of threads that `seed` gives."""
    loaded = library(name)
    loaded.fused_ops_emulate_seed(seed)
    loaded.fused_ops_emulate_checked(checked)
    call(loaded, entry, *arguments)


needs_kernels = pytest.mark.skipif(build.missing() is not None, reason=f"kernels are not emulated: {build.missing()}")
SCHEDULES = tuple((seed, checked) for checked in (True, False) for seed in range(4))


def every_schedule(call: Callable[[int, bool], torch.Tensor]) -> torch.Tensor:
    """call(seed, checked), which is the same, bit for bit, in four orders of threads, checked and unchecked."""
    first, *others = (call(seed, checked) for seed, checked in SCHEDULES)
    assert all(torch.equal(first, other) for other in others)
    return first
