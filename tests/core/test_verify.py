"""tests.verify: a kernel is recorded when all of its GPU tests passed and at least one ran, and only then."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_ops
from fused_ops.core import verified
from fused_ops.core.dispatch import OPS
from tests import verify

GPU_TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.kernel("right")
@pytest.mark.parametrize("n", [1, 2])
def test_right(n): pass

@pytest.mark.gpu
@pytest.mark.kernel("wrong")
@pytest.mark.parametrize("n", [1, 2])
def test_wrong(n): assert n == 1

@pytest.mark.gpu
@pytest.mark.kernel("left behind")
def test_teardown(request): request.addfinalizer(lambda: 1 / 0)

@pytest.mark.gpu
@pytest.mark.kernel("skipped")
def test_skipped(): pytest.skip("not here")

@pytest.mark.gpu
@pytest.mark.kernel("expected to fail")
@pytest.mark.xfail
def test_xfail(): assert False

@pytest.mark.gpu
@pytest.mark.kernel("right")
@pytest.mark.kernel("both")
def test_both(): pass

@pytest.mark.gpu
def test_of_no_kernel(): assert False

@pytest.mark.kernel("without a GPU")
def test_without_gpu(): pass
"""


@pytest.fixture
def outcomes(tmp_path):
    def run(kernels=None):
        (tmp_path / "test_gpu.py").write_text(GPU_TESTS)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu\n  kernel(name)\n")
        found = verify.Outcomes(kernels)
        options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={tmp_path}"]
        pytest.main([*options, str(tmp_path)], plugins=[found])
        return found

    return run


def test_each_kernels_outcome_is_told_from_its_tests(outcomes):
    found = outcomes().found
    reasons = {name: verify.judge(tests) for name, tests in found.items()}
    assert reasons.pop("right") is reasons.pop("both") is None
    assert "1 of 2 tests failed" in reasons.pop("wrong")
    assert "1 of 1 tests failed" in reasons.pop("left behind")
    assert reasons.pop("skipped") == reasons.pop("expected to fail") == "none of its GPU tests ran"
    assert list(found[""].values()) == ["failed"]
    assert set(reasons) == {""}
    assert verify.judge({}) == "none of its GPU tests ran"


def test_chosen_kernels_run_alone_but_with_all_their_tests(outcomes):
    found = outcomes(["right"]).found
    assert set(found) == {"right", "both"}
    assert len(found["right"]) == 3


def test_a_file_that_cannot_be_collected_is_noticed(outcomes, tmp_path):
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    assert outcomes().broken


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Four kernels: named for what became of them."""
    made = {}
    for name in ("passed", "failed", "unrun", "unbuilt"):
        source = tmp_path / f"{name}.py"
        if name != "unbuilt":
            source.write_text(name)
        made[name] = verified.Kernel(name, (str(source),))
    monkeypatch.setattr(verified, "KERNELS", made)
    monkeypatch.setattr(verified, "_fingerprints", {})
    return made


def test_the_record_gains_what_passed_loses_what_failed_and_keeps_the_rest(kernels, monkeypatch):
    old = {"fingerprint": "0", "device": "NVIDIA Old", "date": "2000-01-01"}
    found = {
        "passed": {"a": "passed", "b": "skipped"},
        "failed": {"c": "passed", "d": "failed"},
        "unbuilt": {"e": "passed"},
    }
    record, lines = verify.updated({"failed": old, "unrun": old, "gone": old}, found, "NVIDIA New", "2001-01-01")
    fingerprint = verified.fingerprint(kernels["passed"])
    assert record == {
        "passed": {"fingerprint": fingerprint, "device": "NVIDIA New", "date": "2001-01-01"},
        "unrun": old,
    }
    assert lines["passed"] == "verified by 1 tests"
    assert "source" in lines["unbuilt"] and "failed" in lines["failed"] and "none" in lines["unrun"]
    monkeypatch.setattr(verified, "_record", record)
    assert not verified.experimental("passed")
    assert all(verified.experimental(name) for name in ("failed", "unrun", "unbuilt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_refuses_and_writes_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.verify", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 1
    assert "GPU" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_the_record_holds_whole_entries_of_kernels_that_exist():
    record = json.loads(verified.RECORD.read_text())
    assert record.keys() <= verified.KERNELS.keys()
    for entry in record.values():
        assert entry.keys() == {"fingerprint", "device", "date"}
        assert len(entry["fingerprint"]) == 64 and all(entry.values())


def test_every_kernel_of_the_record_has_sources_and_a_gpu_test():
    package = Path(fused_ops.__file__).parent
    tests = "".join(path.read_text() for path in verify.TESTS.glob("*/test_*gpu*.py"))
    for name, kernel in verified.KERNELS.items():
        for source in kernel.sources:
            root = package if source.endswith(".py") else package.parent / "csrc"
            assert (root / source).is_file() or not root.is_dir(), f"{name}: {source}"
        assert f'"{name}"' in tests, f"no GPU test is marked kernel({name!r})"


def test_every_gpu_backend_of_the_registry_names_its_kernel():
    lacking = [
        f"{op.name}: {backend.name}"
        for op in OPS.values()
        for backend in op.backends
        if backend.name in ("cuda", "triton") and backend.kernel is None
    ]
    assert lacking == [], "auto would take them unverified"


def test_a_kernels_sources_hold_every_header_it_includes():
    csrc = Path(fused_ops.__file__).parents[1] / "csrc"
    if not csrc.is_dir():
        pytest.skip("installed without its sources")
    for name, kernel in verified.KERNELS.items():
        for source in kernel.sources:
            if not source.endswith(".py"):
                lines = (csrc / source).read_text().splitlines()
                included = {line.split('"')[1] for line in lines if line.startswith('#include "')}
                assert included <= set(kernel.sources), f"{name}: {source} includes {included - set(kernel.sources)}"


def test_the_registry_is_ordered_and_ends_with_reference():
    for op in OPS.values():
        names = [backend.name for backend in op.backends]
        assert names[-1] == "reference"
        assert len(set(names)) == len(names)
        assert op.autocast in ("cast", "reference")
