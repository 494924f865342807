"""What a recipe is: a task's data, model, loss and metrics, for the loop that all recipes share."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from fused_ops.train.config import Config

# A mean of many batches: what to add up, and over how many.
Sums = dict[str, tuple[Tensor | float, Tensor | int]]


class Recipe(ABC):
    """A task. Its constructor reads the data; a batch is a list, of which the loop moves tensors to the device.

    Attributes:
        name: on the command line and in checkpoints.
        config_class: its options.
        metric_for_best_model, greater_is_better: which model is kept, of those that were validated.
        reported: names of what `metrics` gives.
        train, valid, test: data, by index; `valid` chooses the model, `test` is read once, at the end.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[Config]]
    metric_for_best_model: ClassVar[str]
    greater_is_better: ClassVar[bool] = True
    reported: ClassVar[tuple[str, ...]]
    train: Dataset
    valid: Dataset
    test: Dataset

    def __init__(self, config: Config):
        self.config = config

    @abstractmethod
    def model(self) -> nn.Module:
        """The model, with its initial weights."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: list) -> Tensor:
        """Mean over a batch of `train`."""

    @abstractmethod
    def measure(self, model: nn.Module, batch: list) -> Sums:
        """Metrics of a batch of `valid` or `test`, each as a sum and a count."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the trained model as `from_pretrained` reads it, if it does."""
        return

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """What is reported, from the means of what `measure` gave."""
        return means

    collate = staticmethod(default_collate)
    collate_measured = staticmethod(default_collate)


class Classification(Recipe):
    """A batch is the model's arguments, then labels (batch,); the loss is cross entropy."""

    metric_for_best_model = "accuracy"
    reported = ("loss", "accuracy")

    def loss(self, model: nn.Module, batch: list) -> Tensor:
        *inputs, labels = batch
        return F.cross_entropy(model(*inputs), labels, label_smoothing=self.config.label_smoothing)

    def measure(self, model: nn.Module, batch: list) -> Sums:
        *inputs, labels = batch
        logits = model(*inputs).float()
        loss, right = F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()
        return {"loss": (loss, len(labels)), "accuracy": (right, len(labels))}
