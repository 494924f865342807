"""`python -m fused_ops.train RECIPE [options]`; --help after a recipe lists its options."""

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fused_ops.core.errors import ArgumentError
from fused_ops.train import run
from fused_ops.train.config import parse

RECIPES = {
    "image": "ImageClassification",
    "language": "LanguageModel",
    "qa": "QuestionAnswering",
    "sequence": "SequenceClassification",
}


@contextmanager
def quiet_threads() -> Iterator[None]:
    """A thread that cannot write says nothing: TensorBoard's raises it again in the thread that logs."""

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, OSError):
            previous(failed)

    previous, threading.excepthook = threading.excepthook, hook
    try:
        yield
    finally:
        threading.excepthook = previous


def main(arguments: list[str]) -> None:
    name, *options = arguments or [""]
    if name not in RECIPES:
        sys.exit(f"usage: python -m fused_ops.train {{{','.join(RECIPES)}}} [options]")
    try:
        recipe = getattr(importlib.import_module(f"fused_ops.train.{name}"), RECIPES[name])
        config = parse(recipe.config_class, f"python -m fused_ops.train {name}", options)
        with quiet_threads():
            run(recipe, config)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed: pip install fused_ops[train]")
    except (ArgumentError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {str(error).strip().splitlines()[-1]}")  # a loader's process puts its traceback ahead


if __name__ == "__main__":
    main(sys.argv[1:])
