"""Data that recipes share: shares held out, and the digits that scikit-learn ships."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.utils.data import Subset, TensorDataset, random_split

from fused_ops.core.errors import ArgumentError


def held_out(data: Sequence, share: float) -> tuple[Subset, Subset]:
    """`data` without a random `share` of it, and that share: the same for every seed of a run."""
    count = round(share * len(data))
    if not 0 < count < len(data):
        raise ArgumentError("val_split", "a share that is some of the data but not all", f"{share} of {len(data)}")
    return tuple(random_split(data, (len(data) - count, count), torch.Generator().manual_seed(0)))


def digits() -> tuple[Subset, Subset]:
    """Handwritten digits, 8×8 pixels in [0, 1], and their labels: (1, 8, 8) float32 and (), to train on and to test.

    A fifth of the 1797 is for testing. Source: Alpaydin and Kaynak 1998, as scikit-learn ships it.
    """
    from sklearn.datasets import load_digits  # slow to import, and other data does not need it

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return held_out(TensorDataset(images, torch.tensor(labels)), 0.2)


def read_tokenizer(file: Path, argument: str) -> Tokenizer:
    """A tokenizer.json; errors name `argument`."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise ArgumentError(argument, "a tokenizer.json or a folder with one", f"{file}: {error}") from error
