"""Recipes need the extra `train`. What `datasets` keeps of the tests' files goes with them."""

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("datasets") and find_spec("optuna") else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield
