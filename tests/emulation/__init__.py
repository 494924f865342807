"""CUDA kernels on the CPU: what the tests of every family share. FUSED_OPS_EMULATE=1 must have been set at import."""

import ctypes
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

import fused_ops
from fused_ops.core import extension

ROOT = Path(__file__).parents[2]


def _missing() -> str | None:
    """Why no kernel can be emulated here, or None."""
    if not extension.EMULATED or extension.emulator_missing is None:
        return extension.emulator_missing
    from tests.emulation import build

    return build.missing() or extension.emulator_missing


needs_emulator = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))
# Each of these tests runs once for every schedule of tests/conftest.py.
every_schedule = pytest.mark.usefixtures("schedule")


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(extension.EMULATOR))
    library.fused_ops_emulate_seed.argtypes = [ctypes.c_uint64]
    library.fused_ops_emulate_checked.argtypes = [ctypes.c_bool]
    return library


def set_seed(seed: int) -> None:
    """Which of the possible orders threads run in, from now on."""
    _library().fused_ops_emulate_seed(seed)


def set_checked(checked: bool) -> None:
    """Whether races, bounds and uninitialised reads are looked for, from now on."""
    _library().fused_ops_emulate_checked(checked)


@contextmanager
def multiprocessors(count: int):
    """Within the block, the emulated chip has `count` of them, not an H100's 132."""
    _library().fused_ops_emulate_multiprocessors(count)
    try:
        yield
    finally:
        _library().fused_ops_emulate_multiprocessors(132)


@contextmanager
def capability(value: int):
    """Within the block, the emulated chip says this compute capability (80 for 8.0), not 9.0. What it can do stays."""
    _library().fused_ops_emulate_capability(value)
    try:
        yield
    finally:
        _library().fused_ops_emulate_capability(90)


def run_on(library: Path, code: str, folder: Path) -> subprocess.CompletedProcess:
    """`code` in a fresh process, on poisoned memory, with `library` in the place of _emu.so."""
    package = folder / "fused_ops"
    package.mkdir(parents=True)
    for path in Path(fused_ops.__file__).parent.iterdir():
        if path.name != extension.EMULATOR.name:
            (package / path.name).symlink_to(path)
    (package / extension.EMULATOR.name).symlink_to(library)
    env = {**os.environ, "FUSED_OPS_EMULATE": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    code = f"from tests.support import poisoned_memory\nwith poisoned_memory():\n    {code}"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
