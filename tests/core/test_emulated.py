"""Who takes a CPU tensor under FUSED_OPS_EMULATE=1, and what the emulator was built from."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_ops
from fused_ops.core import dispatch, extension, verified
from fused_ops.core.dispatch import OPS, use_backend
from tests.emulation import ROOT, needs_emulator
from tests.emulation.build import stale
from tests.rnn.test_cells import inputs
from tests.support import randn

pytestmark = needs_emulator
CELL = inputs("gru_cell", 3, 4, 5, dtype=torch.float32)


def test_it_was_built_from_the_sources_that_are_here():
    assert stale() == [], "build again: make emulate"


def test_every_cuda_kernel_is_emulated():
    needs = {backend.needs for op in OPS.values() for backend in op.backends if backend.name == "cuda"}
    assert needs and None not in needs
    assert [name for name in sorted(needs) if not extension.has_kernel(name, "CPU")] == []


def test_explain_names_it_and_auto_never_takes_it():
    found = fused_ops.explain(fused_ops.gru_cell, *CELL)
    assert found.chosen in ("cpu", "reference")
    assert found.rows[0] == ("cuda (emulated)", "refused", "is taken by name only")
    with dispatch.record() as choices:
        fused_ops.gru_cell(*CELL)
    assert [choice.backend for choice in choices] == [found.chosen]


def test_a_kernel_on_instructions_that_no_gpu_has_confirmed_says_so():
    kernel = verified.Kernel("x.cuda", ("x/x.cuh", "common/wgmma.cuh"))
    backend = dispatch.Backend("cuda", lambda x: x, kernel=kernel)
    assert backend.label(torch.ones(1)) == "cuda (emulated, uncalibrated)"
    assert all((ROOT / "csrc" / name).is_file() for name in verified.UNCALIBRATED)


@pytest.mark.parametrize("how", ["backend=", "use_backend", "FUSED_OPS_BACKEND"])
def test_a_request_by_name_runs_it(how, monkeypatch):
    if how == "FUSED_OPS_BACKEND":
        monkeypatch.setenv(how, "cuda")
    request = {"backend": "cuda"} if how == "backend=" else {}
    with use_backend("cuda") if how == "use_backend" else nullcontext():
        with dispatch.record() as choices:
            fused_ops.gru_cell(*CELL, **request)
        found = fused_ops.explain(fused_ops.gru_cell, *CELL, **request)
    assert [(choice.backend, choice.reason) for choice in choices] == [("cuda (emulated)", f"asked for by {how}")]
    assert found.chosen == "cuda (emulated)"
    assert found.rows[0] == ("cuda (emulated)", "chosen", f"asked for by {how}")
    assert str(found).splitlines()[:2] == [
        "gru_cell: cuda (emulated)", f"  cuda (emulated) chosen   asked for by {how}"
    ]  # fmt: skip
    assert found.rows[-1] == ("reference", "passed", "cuda comes first")


def test_what_the_kernel_cannot_serve_is_refused_as_on_a_gpu():
    with pytest.raises(fused_ops.BackendUnavailable, match="cuda, which takes float32, float16 and bfloat16"):
        fused_ops.gru_cell(*(t.double() for t in CELL), backend="cuda")
    found = fused_ops.explain(fused_ops.gru_cell, *(t.double() for t in CELL), backend="cuda")
    assert found.chosen is None and found.rows[0][:2] == ("cuda (emulated)", "refused")


def test_tensors_on_a_gpu_and_fake_ones_are_served_as_ever():
    with FakeTensorMode():
        on_gpu = [torch.empty(t.shape, device="cuda") for t in CELL]
        on_cpu = [torch.empty(t.shape) for t in CELL]
    assert fused_ops.gru_cell(*on_cpu, backend="cuda").shape == (3, 5)
    assert fused_ops.explain(fused_ops.gru_cell, *on_gpu, backend="cuda").rows[0][0] == "cuda"
    with pytest.raises(fused_ops.BackendUnavailable, match="needs a tensor on a GPU"):
        fused_ops.gru_cell(*(t.to("meta") for t in CELL), backend="cuda")


def test_a_launcher_checks_its_tensors_types_and_devices():
    op = torch.ops.fused_ops.conv2d_cuda
    x, w = randn(1, 8, 3, 3).contiguous(memory_format=torch.channels_last), randn(8, 1, 3, 3)
    place = ((1, 1), (1, 1), (1, 1), 8, 0)
    with pytest.raises(RuntimeError, match="scale must be float32"):
        op(x, w, randn(8).double(), None, None, *place)
    with pytest.raises(RuntimeError, match="takes float32, float16 or bfloat16"):
        op(x.double(), w.double(), None, None, None, *place)


def test_info_says_that_it_is_loaded():
    done = subprocess.run([sys.executable, "-m", "fused_ops.info"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert 'loaded: backend="cuda" takes CPU tensors, emulated' in done.stdout
    assert "FUSED_OPS_EMULATE" in done.stdout
