"""What the numbers were measured on."""

import platform
import re
from pathlib import Path

import torch

import fused_ops.core.extension as extension

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def instruction_set() -> str:
    return torch.backends.cpu.get_cpu_capability()


def device_folder() -> Path:
    """bench/results/<device>: "cpu", or the GPU's name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return RESULTS / re.sub(r"\W+", "-", name.lower()).strip("-")


def facts() -> dict[str, str | int]:
    """The machine line as data."""
    return {
        "processor": f"{processor()} ({instruction_set()})",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": extension.host.compiler if extension.host else "none",
    }


def line() -> str:
    found = facts()
    return (
        f"{found['processor']}, {found['threads']} threads, GPU: {found['gpu']}, "
        f"torch {found['torch']}, Python {found['python']}, {found['compiler']}"
    )
