"""Classification of sequences by a recurrent network: rows of digits, or a time series of the UCR archive."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fused_ops.core.errors import ArgumentError
from fused_ops.models import RNN
from fused_ops.train.config import Config
from fused_ops.train.data import digits, held_out
from fused_ops.train.recipe import Classification


@dataclass(frozen=True)
class SequenceConfig(Config):
    """Train a classifier of sequences.

    Attributes:
        data_path: a folder with NAME_TRAIN.tsv and NAME_TEST.tsv, a series a line, its label first, shorter ones ending
            in NaN, as the UCR archive has them; default: scikit-learn's digits, a row of pixels a step.
        val_split: share of the training data that validation takes.
        kind: the recurrent network.
        hidden_size, num_layers, dropout: its sizes, and the dropout between its layers.
        noise: in training, series are scaled by 1 + noise·z, and noise·z is added to every value, z normal.
        label_smoothing: share of a label that all classes have in common.
    """

    data_path: Path | None = None
    val_split: float = 0.1
    kind: Literal["lstm", "gru", "rnn"] = "lstm"
    hidden_size: int = 128
    num_layers: int = 2
    dropout: float = 0.2
    noise: float = 0.1
    label_smoothing: float = 0.1
    epochs: int = 60
    lr: float = 3e-3

    free = Config.free | {"data_path"}
    least = Config.least | {"hidden_size": 1, "num_layers": 1, "noise": 0}
    shares = Config.shares | {"val_split", "dropout", "label_smoothing"}


class Noisy(Dataset):
    """(series (time, features), length, label) with noise on the series."""

    def __init__(self, data: Dataset, noise: float):
        self.data, self.noise = data, noise

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        series, length, label = self.data[index]
        scale = 1 + self.noise * torch.randn(())
        return series * scale + self.noise * torch.randn_like(series), length, label


def read_series(file: Path) -> tuple[Tensor, Tensor, np.ndarray]:
    """The series (series, time, 1), 0 behind their ends, their lengths (series,) and labels."""
    try:
        rows = np.loadtxt(file, delimiter="\t", dtype=np.float32, ndmin=2)
    except (OSError, ValueError) as error:
        raise ArgumentError("data_path", "a folder of series, a line each", f"{file}: {error}") from error
    if rows.shape[1] < 2:
        raise ArgumentError("data_path", "a folder of series, a label and values each", f"{file} of shape {rows.shape}")
    values = torch.from_numpy(rows[:, 1:])
    known = ~values.isnan()
    lengths = known.sum(1)
    gaps = (known != (torch.arange(values.size(1)) < lengths[:, None])).any(1) | (lengths == 0)
    if gaps.any():
        line = int(gaps.nonzero()[0]) + 1
        raise ArgumentError("data_path", "a folder of series without gaps", f"{file} with one in line {line}")
    return values.nan_to_num()[..., None], lengths, rows[:, 0]


def read_archive(folder: Path) -> tuple[Dataset, Dataset, int]:
    """Data to train on and to test, and how many classes there are."""
    found = [sorted(folder.glob(f"*_{split}.tsv")) for split in ("TRAIN", "TEST")]
    if not all(len(files) == 1 for files in found):
        got = f"{folder} with {', '.join(file.name for files in found for file in files) or 'neither'}"
        raise ArgumentError("data_path", "a folder with one *_TRAIN.tsv and one *_TEST.tsv", got)
    (*train, train_labels), (*test, test_labels) = (read_series(files[0]) for files in found)
    classes = np.unique(train_labels)
    unknown = sorted(set(test_labels) - set(classes))
    if unknown:
        raise ArgumentError("data_path", "a folder whose TRAIN has all labels of TEST", f"{folder}: {unknown} are new")
    values = torch.cat([series[:length] for series, length in zip(*train)])
    mean, std = values.mean(), values.std()
    sets = []
    for (series, lengths), labels in ((train, train_labels), (test, test_labels)):
        numbers = torch.from_numpy(np.searchsorted(classes, labels))
        sets.append(TensorDataset((series - mean) / std, lengths, numbers))
    return *sets, len(classes)


def digit_rows() -> tuple[Dataset, Dataset, int]:
    """As `read_archive`: digits, each a series of 8 rows of 8 pixels."""
    sets = []
    for split in digits():
        images, labels = (torch.stack(column) for column in zip(*split))
        sets.append(TensorDataset((images[:, 0] - 0.3) / 0.38, torch.full((len(images),), 8), labels))
    return *sets, 10


class SequenceClassification(Classification):
    """An LSTM, GRU or tanh network on series of any length."""

    name = "sequence"
    config_class = SequenceConfig

    def __init__(self, config: SequenceConfig):
        super().__init__(config)
        train, self.test, self.num_classes = read_archive(config.data_path) if config.data_path else digit_rows()
        train, self.valid = held_out(train, config.val_split)
        self.train = Noisy(train, config.noise)

    def model(self) -> nn.Module:
        """Gates start orthogonal in the state, and an LSTM's open to it (Jozefowicz et al. 2015, section 2.2)."""
        config, (series, _, _) = self.config, self.valid[0]
        sizes = (series.size(1), config.hidden_size, config.num_layers, self.num_classes)
        model = RNN(*sizes, kind=config.kind, dropout=config.dropout if config.num_layers > 1 else 0.0)
        for name, weight in model.rnn.named_parameters():
            if name.startswith("weight"):
                for gate in weight.detach().split(config.hidden_size):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.zeros_(weight)
            if name.startswith("bias_ih") and config.kind == "lstm":
                nn.init.ones_(weight.detach()[config.hidden_size : 2 * config.hidden_size])
        return model
