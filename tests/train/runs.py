"""What tests do with a run: start it, stop it in the middle, compare what it left."""

import csv
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import torch

from fused_ops.train.loop import Trainer
from fused_ops.train.recipe import Recipe
from tests.train.material import tiny

CPU = torch.device("cpu")


class Killed(BaseException):
    """What ends a run where nothing expects it."""


@contextmanager
def killed_at(step: int | None):
    """Whatever trains ends when it comes to this step."""
    update = Trainer.update

    def update_or_die(trainer, batches):
        if trainer.step == step:
            raise Killed
        update(trainer, batches)

    with patch.object(Trainer, "update", update_or_die), suppress(Killed):
        yield


def train(recipe: Recipe, kill_at: int | None = None) -> Trainer:
    """A run to its end, or into its step `kill_at`."""
    trainer = Trainer(recipe, CPU)
    with killed_at(kill_at):
        trainer.train()
    return trainer


def saved(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def assert_same(a, b, where: str = "") -> None:
    """Equal bit for bit: tensors and what holds them, a list or a tuple."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def again(name: str, folder: Path, **options) -> Recipe:
    """A tiny recipe whose run has not begun."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    return tiny(name, folder, **options)
