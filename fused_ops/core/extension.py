"""Loads the compiled parts. Nothing here raises: why something is missing is kept as text, for `info` and `explain`.

setup.py appends a line to `_C.so`, `TRAILER` and JSON: the CRC-32 of what precedes it, and the SHA-256 of every source.
So does what builds `_emu.so`, the CUDA kernels for the CPU (csrc/emulation), loaded if FUSED_OPS_EMULATE=1 at import.
"""

import json
import os
import platform
import struct
import zlib
from importlib import import_module
from pathlib import Path

import torch

from fused_ops.core.library import traced_as_constant

_PACKAGE = Path(__file__).parent.parent
EMULATED = os.environ.get("FUSED_OPS_EMULATE") == "1"
EMULATOR = _PACKAGE / "_emu.so"
TRAILER = b"\nfused_ops:"
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


def damage(data: bytes) -> str | None:
    """Why a file of these bytes must not be handed to the dynamic loader (which dies of a cut one), or None."""
    if len(data) < 64 or data[:5] != b"\x7fELF\x02":
        return "not a 64-bit ELF file"
    machine = struct.unpack_from("<H", data, 18)[0]
    if machine != _ELF_MACHINES.get(platform.machine(), machine):
        return f"built for another processor (ELF machine {machine})"
    try:
        promised = _promised_size(data)
        if promised > len(data):
            return f"truncated: {len(data)} bytes where its headers promise {promised}"
        body, mark, tail = data.rpartition(TRAILER)
        if mark and zlib.crc32(body) != json.loads(tail)["crc32"]:
            return "corrupt: its checksum does not match"
    except (struct.error, ValueError, KeyError, TypeError) as error:
        return f"corrupt: {error}"
    return None


def _promised_size(data: bytes) -> int:
    """How long an ELF file must be to hold both of its header tables and every segment the loader maps."""
    segments, sections = struct.unpack_from("<2Q", data, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", data, 54)
    tables = max(segments + segment_size * segment_count, sections + section_size * section_count)
    if tables > len(data):
        return tables
    headers = (struct.unpack_from("<2I6Q", data, segments + i * segment_size) for i in range(segment_count))
    return max([tables, *(offset + size for _, _, offset, _, _, size, _, _ in headers)])


def _load_kernels(path: Path, remedy: str = "") -> tuple[str | None, dict[str, str]]:
    """(Why there are no compiled kernels, hashes of the sources they were built from.)"""
    if not path.is_file():
        return f"{path.name} was not built{remedy}", {}
    try:
        data = path.read_bytes()
        reason = damage(data)
        if reason is None:
            torch.ops.load_library(str(path))
            _, mark, tail = data.rpartition(TRAILER)
            return None, json.loads(tail)["sources"] if mark else {}
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]  # torch's own message leaves out the loader's
    return f"{path.name} did not load: {reason}", {}


def _load_host():
    try:
        return import_module("fused_ops._host"), None
    except ImportError as error:
        return None, f"_host did not load: {error}"


kernels_missing, sources = _load_kernels(_PACKAGE / "_C.so")
emulator_missing = _load_kernels(EMULATOR, ": make emulate")[0] if EMULATED else "FUSED_OPS_EMULATE=1 was not set"
host, host_missing = _load_host()


@traced_as_constant
def has_kernel(op: str, key: str) -> bool:
    """Whether fused_ops::`op` has a kernel for dispatch key `key` ("CPU", "CUDA"). Remembered once it has."""
    if (op, key) not in _registered:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_ops::{op}", key):
            return False
        _registered.add((op, key))
    return True


_registered: set[tuple[str, str]] = set()
