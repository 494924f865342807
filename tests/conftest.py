"""Every test runs on poisoned memory and from the same seed; `-m gpu` tests need a GPU."""

import pytest
import torch

from fused_ops.conv import rules
from fused_ops.core.device import TRITON_INTERPRETED
from fused_ops.core.dispatch import OPS
from tests import emulation
from tests.support import poisoned_memory

_patched: set[str] = set()  # modules


@pytest.fixture(autouse=True)
def _surroundings():
    torch.manual_seed(0)
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def _every_size_meets_the_kernels(request, monkeypatch):
    """`auto` leaves to PyTorch what is too small to pay for a call, and so are most tests' sizes."""
    for op in OPS.values():
        op._chosen.clear()
    if "as_measured" not in request.keywords:
        for name in ("CHAIN", "CHAIN_OUTPUT", "CHAIN_WEIGHT"):
            monkeypatch.setattr(rules, name, 0)


@pytest.fixture(autouse=TRITON_INTERPRETED)
def _patched_once(monkeypatch):
    """A device function patches triton.language in every call, half of the interpreter's time: here in the first of its
    module. What a kernel's launch restores, the next launch patches."""
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in _patched:
            interpreter._patch_lang(self.fn)
            _patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture(params=(0, 1, 2), ids="seed {}".format)
def schedule(request):
    """Each of three orders in which emulated CUDA threads run."""
    emulation.set_seed(request.param)
    yield
    emulation.set_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
