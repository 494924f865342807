"""Every test runs on poisoned memory and from the same seed; `-m gpu` tests need a GPU."""

import pytest
import torch

from tests import emulation
from tests.support import poisoned_memory


@pytest.fixture(autouse=True)
def _surroundings():
    torch.manual_seed(0)
    with poisoned_memory():
        yield


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
