"""Which GPU kernels a real GPU has run and found right, in the very source that is installed.

`verified.json` maps a kernel's name to the fingerprint of its source when its GPU tests last passed, the device and the
date. A kernel whose fingerprint differs, or that is absent, is experimental. `python -m tests.verify` writes the file.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fused_ops.core import extension
from fused_ops.core.library import traced_as_constant

_PACKAGE = Path(__file__).parent.parent
RECORD = Path(__file__).with_name("verified.json")
# What every CUDA kernel's files include.
CUDA_COMMON = ("common/check.h", "common/convert.cuh", "common/dtype.h", "common/launch.h", "common/tensor.h")
# Headers whose instructions the emulator models and no GPU has confirmed.
UNCALIBRATED = {"common/bulk_copy.cuh", "common/cluster.cuh", "common/mbarrier.cuh", "common/wgmma.cuh"}
_fingerprints: dict[str, str | None] = {}


@dataclass(frozen=True)
class Kernel:
    """A GPU kernel: its name ("attention.fwd.triton") and the files that decide what it computes.

    Files ending in .py are relative to the package, the others to csrc/ (their hashes were taken at build time): the
    kernel's own and every header that they include.
    """

    name: str
    sources: tuple[str, ...]


KERNELS: dict[str, Kernel] = {}


def kernel(name: str, *sources: str) -> Kernel:
    KERNELS[name] = Kernel(name, sources)
    return KERNELS[name]


def fingerprint(kernel: Kernel) -> str | None:
    """sha256 over the kernel's sources; None if one is not part of this installation."""
    parts = []
    for source in kernel.sources:
        path = _PACKAGE / source
        if source.endswith(".py"):
            parts.append(sha256(path.read_bytes()).hexdigest() if path.is_file() else None)
        else:
            parts.append(extension.sources.get(source))
    return None if None in parts else sha256("".join(parts).encode()).hexdigest()


@traced_as_constant
def experimental(name: str) -> bool:
    """Whether no GPU run has verified kernel `name` since its source last changed."""
    if name not in _fingerprints:
        _fingerprints[name] = fingerprint(KERNELS[name])
    found = _fingerprints[name]
    return found is None or record().get(name, {}).get("fingerprint") != found


def record() -> dict[str, dict[str, str]]:
    global _record
    if _record is None:
        _record = json.loads(RECORD.read_text())
    return _record


_record: dict | None = None
