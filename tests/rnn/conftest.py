"""The instruction sets of the CPU's kernels."""

import re
from pathlib import Path

import pytest

FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
HAS = {"avx512": "avx512vl" in FLAGS and "avx512dq" in FLAGS, "avx2": re.search(r"\bavx2\b", FLAGS), "portable": True}


@pytest.fixture(params=HAS)
def isa(request, monkeypatch):
    if not HAS[request.param]:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("FUSED_OPS_CPU_ISA", request.param)
    return request.param
