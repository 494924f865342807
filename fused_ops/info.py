"""`python -m fused_ops.info`: versions, what was built, what loaded and why not, devices, and what runs where.

`--markdown` prints the support matrix alone, as the README has it. Needs nothing but torch, and works with everything
else missing.
"""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import fused_ops
from fused_ops.core import device, extension, verified
from fused_ops.core.dispatch import NAMES, OPS, Backend

SETTINGS = ("FUSED_OPS_BACKEND", "FUSED_OPS_EMULATE", "TRITON_INTERPRET")


class Cell(NamedTuple):
    """One backend of one op. `state`: "yes", "experimental" (by name only: no GPU run has verified it), "missing" from
    this installation, or "none" (the op has no such backend); `reason` says why it is missing."""

    state: str
    reason: str = ""


class Row(NamedTuple):
    op: str
    cells: dict[str, Cell]


def support_matrix() -> list[Row]:
    """What this installation serves on a device of the right kind, whether or not one is here. One row per op."""
    return [
        Row(name, {backend: _cell(op.by_name.get(backend)) for backend in NAMES}) for name, op in sorted(OPS.items())
    ]


def _cell(backend: Backend | None) -> Cell:
    if backend is None:
        return Cell("none")
    on_gpu = backend.name in ("cuda", "triton")
    # What `missing` asks of a tensor. GPU 0 stands for all of them; without one no chip is asked about.
    stand_in = SimpleNamespace(is_cuda=on_gpu, is_cpu=not on_gpu, get_device=lambda: 0 if on_gpu else -1)
    reason = backend.missing(stand_in)
    if reason is not None:
        return Cell("missing", reason)
    if backend.kernel is not None and verified.experimental(backend.kernel.name):
        return Cell("experimental")
    return Cell("yes")


def markdown(rows: list[Row]) -> str:
    """The support matrix as a Markdown table, its reasons as footnotes."""
    words, notes = _words(rows)
    lines = ["| op | " + " | ".join(NAMES) + " |", "| --- " * (len(NAMES) + 1) + "|"]
    lines += [f"| `{name}` | " + " | ".join(cells) + " |" for name, *cells in words]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def _words(rows: list[Row]) -> tuple[list[list[str]], list[str]]:
    """The matrix as words, reasons numbered and told once."""
    reasons = list(dict.fromkeys(cell.reason for row in rows for cell in row.cells.values() if cell.reason))
    words = [[row.op, *(_word(row.cells[name], reasons) for name in NAMES)] for row in rows]
    return words, [f"({i}) {reason}" for i, reason in enumerate(reasons, 1)]


def _word(cell: Cell, reasons: list[str]) -> str:
    if cell.state == "none":
        return "-"
    return f"{cell.state} ({reasons.index(cell.reason) + 1})" if cell.reason else cell.state


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  " + "  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in lines]


def _section(title: str, pairs: list[tuple[str, str]]) -> list[str]:
    return [title, *_aligned([[name, value] for name, value in pairs]), ""]


def _distribution(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _versions() -> list[tuple[str, str]]:
    host = extension.host
    triton = _distribution("triton") or "version unknown" if device.TRITON_INSTALLED else "not installed"
    return [
        ("fused_ops", f"{_distribution('fused_ops') or 'not installed by pip'}, {Path(fused_ops.__file__).parent}"),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("triton", triton),
        ("nvcc used", (host.nvcc_version if host else "") or "none"),
        *((name, f"{os.environ[name]} (environment)") for name in SETTINGS if name in os.environ),
    ]


def _built() -> list[tuple[str, str]]:
    host = extension.host
    if host is None:
        return [("facts", "unknown, they are in _host")]
    return [
        ("compiler", host.compiler),
        ("flags", host.flags),
        ("GPU architectures", host.arch_list or "none"),
        ("against torch", host.torch_version),
    ]


def _loaded() -> list[tuple[str, str]]:
    return [
        ("_C.so", extension.kernels_missing or f"loaded, built from {len(extension.sources)} files of csrc/"),
        ("_host", extension.host_missing or "loaded"),
        ("_emu.so", extension.emulator_missing or 'loaded: backend="cuda" takes CPU tensors, emulated'),
    ]


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _devices() -> list[tuple[str, str]]:
    instructions = torch.backends.cpu.get_cpu_capability()
    rows = [("CPU", f"{_cpu_model()}, {platform.machine()} {instructions}, {torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        return [*rows, ("GPU", "none")]
    for index in range(torch.cuda.device_count()):
        chip = torch.cuda.get_device_properties(index)
        facts = f"{chip.name}, sm_{chip.major}{chip.minor}, {chip.multi_processor_count} multiprocessors"
        lack = device.architecture_missing(index) if extension.host else None
        rows.append((f"GPU {index}", f"{facts}, {chip.total_memory / 2**30:.0f} GiB{f'; {lack}' if lack else ''}"))
    return rows


def _kernels() -> list[tuple[str, str]]:
    def state(name: str) -> str:
        if verified.experimental(name):
            return "experimental: no GPU run has verified it since its source last changed"
        entry = verified.record()[name]
        return f"verified on {entry['device']}, {entry['date']}"

    return [(name, state(name)) for name in sorted(verified.KERNELS)]


def report() -> str:
    """All of it as text."""
    words, notes = _words(support_matrix())
    lines = [
        *_section("versions", _versions()),
        *_section("built", _built()),
        *_section("loaded", _loaded()),
        *_section("devices", _devices()),
        *_section("GPU kernels", _kernels()),
        "backends",
        *_aligned([["op", *NAMES], *words]),
        *(f"  {note}" for note in notes),
    ]
    if not torch.cuda.is_available():
        lines.append("  No GPU is here: cuda and triton say what would run on one.")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--markdown"]):
        sys.exit("usage: python -m fused_ops.info [--markdown]")
    print(markdown(support_matrix()) if sys.argv[1:] else report())
