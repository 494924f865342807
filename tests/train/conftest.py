"""Recipes need the extra `train`. What `datasets` keeps of the tests' files goes with them."""

from importlib.util import find_spec

import pytest

from tests.support import threads

EXTRA = ("datasets", "optuna", "sklearn", "tensorboard", "tokenizers", "torchvision", "tqdm")
collect_ignore_glob = [] if all(map(find_spec, EXTRA)) else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """What is trained here is tiny: a second thread would only be waited for."""
    with threads(1):
        yield
