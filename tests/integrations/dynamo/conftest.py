import pytest
import torch

from tests.integrations.dynamo.models import any_length


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def whatever_the_length():
    with any_length():
        yield
