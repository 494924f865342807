"""The emulator's results are those committed, and (on a GPU) the GPU's are too. See calibrate.py."""

import pytest

from tests.emulation import calibrate
from tests.emulation.kernels import needs_kernels
from tests.gate import find_nvcc

CASES = pytest.mark.parametrize("case", calibrate.cases(), ids=lambda case: f"{case.library} {case.name}")


@needs_kernels
@CASES
def test_the_emulator_gives_what_is_committed(case):
    assert calibrate.difference(case) == ""


@pytest.mark.gpu
@CASES
def test_the_gpu_gives_what_is_committed(case):
    if not calibrate.runs_on_device(case):
        pytest.skip("needs sm_90")
    assert calibrate.difference(case, device=True) == ""


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("library", calibrate.libraries())
def test_the_same_kernels_compile_for_a_gpu(library):
    assert calibrate.compile_for_device(library, "sm_90a").stat().st_size > 0


@needs_kernels
@pytest.mark.parametrize("name, added", (("multiply_half integers", 1e-3), ("multiply_half random", 1e-4)))
def test_a_difference_is_seen(name, added, monkeypatch):
    case = next(case for case in calibrate.cases() if case.name == name)
    data = {when: calibrate.committed(case, when) for when in ("before", "after")}
    monkeypatch.setattr(calibrate, "committed", lambda case, when: data[when])
    assert calibrate.difference(case) == ""
    data["after"][-1][3, 4] += added
    assert "differ" in calibrate.difference(case)
