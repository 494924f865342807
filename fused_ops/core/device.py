"""Facts about devices. Importing this touches neither CUDA nor Triton."""

import os
from importlib.util import find_spec

import torch

from fused_ops.core import extension
from fused_ops.core.library import traced_as_constant


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # an import hook refuses it, or a stand-in without a spec is in its place
        return False


TRITON_INSTALLED = _installed("triton")
# Triton itself reads this once, when it is imported.
TRITON_INTERPRETED = TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
TRITON_KEYS = ("CUDA", "CPU") if TRITON_INTERPRETED else ("CUDA",)


@traced_as_constant
def capability(index: int) -> tuple[int, int] | None:
    """Compute capability of GPU `index`; None where there is no GPU (a CUDA tensor there is a fake one)."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


@traced_as_constant
def chip(index: int) -> tuple[int, int, int]:
    """(multiprocessors, bytes of shared memory that a block may have, 90 for compute capability 9.0) of GPU `index`; an
    H200's where there is none, as the emulator has it."""
    if not torch.cuda.is_available():
        return 132, 227 * 1024, 90
    found = torch.cuda.get_device_properties(index)
    return found.multi_processor_count, found.shared_memory_per_block_optin, 10 * found.major + found.minor


@traced_as_constant
def architecture_missing(index: int) -> str | None:
    """Why `_C.so` holds no machine code for GPU `index`, or None."""
    found = capability(index)
    built = extension.host.arch_list if extension.host else ""
    if found is None or runs_on(found, built):
        return None
    return f"_C.so was built for {built or 'no GPU'}, this one is sm_{found[0]}{found[1]}"


def runs_on(found: tuple[int, int], arch_list: str) -> bool:
    """Whether code built for `arch_list` ("8.0;9.0a;12.0+PTX") runs on compute capability `found`.

    Machine code runs on its own major version from its own minor version up, "a" code on that exact chip alone,
    PTX on everything newer.
    """
    for arch in filter(None, arch_list.replace(";", " ").split()):
        number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
        if not number[0].isdigit():  # a name that torch's build knows ("Hopper"): the loader has the last word
            return True
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        if number.endswith("a"):
            if found == (major, minor):
                return True
        elif (found[0] == major and found[1] >= minor) or (ptx and found >= (major, minor)):
            return True
    return False
