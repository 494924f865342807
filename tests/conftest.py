"""Every test runs on poisoned memory and from the same seed; `-m gpu` tests need a GPU."""

import pytest
import torch

from tests.support import poisoned_memory


@pytest.fixture(autouse=True)
def _surroundings():
    torch.manual_seed(0)
    with poisoned_memory():
        yield


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
