"""Ops made for a test: they are not in the registry afterwards, and every one starts with nothing logged."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest

from fused_ops.core import dispatch, verified

FACTORS = {"cuda": 2.0, "triton": 3.0, "cpu": 5.0, "reference": 7.0}


@pytest.fixture
def make_op(monkeypatch):
    """make_op("cpu", "reference", ...) -> the public function `scaled(input, backend=None)`, whose backends multiply by
    their FACTORS; a keyword gives a backend's settings: make_op("cpu", "reference", cpu={"supports": ...})."""
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(dispatch, "_context", None)
    monkeypatch.delenv("FUSED_OPS_BACKEND", raising=False)

    def make(*names, op="scaled", autocast="reference", **settings):
        def backend(name):
            def run(x):
                calls.append(name)
                return x * FACTORS[name]

            return dispatch.Backend(name, **{"run": run, **settings.get(name, {})})

        calls = []
        made = dispatch.Op(op, *(backend(name) for name in names), autocast=autocast)

        def scaled(input, backend=None):
            return made(backend, (input,), input)

        scaled.calls, scaled.op = calls, made
        return scaled

    with patch.dict(dispatch.OPS):
        yield make


@pytest.fixture
def served():
    """served(scaled, input, ...) -> the backend that ran, told from the result and from what was called."""

    def which(scaled, input, backend=None):
        scaled.calls.clear()
        factor = (scaled(input, backend=backend) / input).flatten()[0].item()
        assert len(scaled.calls) == 1
        assert FACTORS[scaled.calls[0]] == pytest.approx(factor)
        return scaled.calls[0]

    return which


@pytest.fixture
def gpu_kernel(monkeypatch, tmp_path):
    """A kernel whose one source file the test may rewrite; `.verify()` records it as verified, `.edit()` changes it."""
    monkeypatch.setattr(verified, "KERNELS", dict(verified.KERNELS))
    monkeypatch.setattr(verified, "_fingerprints", {})
    monkeypatch.setattr(verified, "_record", {})
    source = tmp_path / "kernels.py"
    source.write_text("x * 3")
    kernel = verified.kernel("test.kernel", str(source))

    def verify():
        entry = {"fingerprint": verified.fingerprint(kernel), "device": "NVIDIA Test", "date": "2000-01-01"}
        monkeypatch.setattr(verified, "_record", {"test.kernel": entry})

    def edit():
        source.write_text("x * 4")
        monkeypatch.setattr(verified, "_fingerprints", {})

    return SimpleNamespace(kernel=kernel, verify=verify, edit=edit, source=source)
