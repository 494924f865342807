"""A causal language model on text: Python's own reference, WikiText, or any text file."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset

from fused_ops.core.errors import ArgumentError
from fused_ops.models import GPT
from fused_ops.train import parallel
from fused_ops.train.config import Config
from fused_ops.train.data import read_tokenizer
from fused_ops.train.recipe import Recipe, Sums

IGNORED = -100  # cross entropy's own mark for what is no target


@dataclass(frozen=True)
class LanguageConfig(Config):
    """Train a GPT.

    Attributes:
        data_path: a text file; or a folder of text (*.tokens, *.raw, *.txt) or parquet files with train, valid and test
            in their names, as WikiText-103 comes; default: the language reference that Python ships.
        val_split: share of a single text's lines that validation takes, and as many the held-out data, at its end.
        tokenizer: a tokenizer.json file; default: byte-pair encoding trained on the training text.
        vocab_size: tokens of that encoding, 256 of which are bytes.
        block_size: length of the sequences that the model sees, in tokens.
        n_layer, n_head, n_embd: sizes of the GPT.
        dropout: probability, throughout the GPT.
    """

    data_path: Path | None = None
    val_split: float = 0.05
    tokenizer: Path | None = None
    vocab_size: int = 512
    block_size: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.1
    batch_size: int = 16
    epochs: int = 12
    lr: float = 2e-3
    min_lr: float = 2e-4
    weight_decay: float = 0.1
    adam_beta2: float = 0.99
    patience: int | None = 3

    free = Config.free | {"data_path", "tokenizer"}
    least = Config.least | {"vocab_size": 256, "block_size": 1, "n_layer": 1, "n_head": 1, "n_embd": 1}
    shares = Config.shares | {"val_split", "dropout"}


class Blocks(Dataset):
    """Sequences of a text and what follows each of their tokens, (length,) each.

    Args:
        tokens: (tokens,), the text.
        length: of a sequence.
        shifted: each starts at a random token of its place in the text (training). Otherwise they tile it: every
            token but the first is a target once, and the last sequence is filled up with what is ignored.
    """

    def __init__(self, tokens: Tensor, length: int, shifted: bool):
        self.tokens, self.length, self.shifted = tokens, length, shifted
        if len(tokens) < 2:
            raise ArgumentError("data_path", "text of two tokens or more in each split", f"{len(tokens)}")

    def __len__(self) -> int:
        targets = len(self.tokens) - 1
        return max(1, targets // self.length) if self.shifted else -(-targets // self.length)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.length
        if self.shifted:
            start = min(start + int(torch.randint(self.length, ())), max(0, len(self.tokens) - self.length - 1))
        piece = self.tokens[start : start + self.length + 1]
        lack = self.length + 1 - len(piece)
        piece = piece.long()
        return F.pad(piece[:-1], (0, lack)), F.pad(piece[1:], (0, lack), value=IGNORED)


def read_lines(files: list[Path]) -> datasets.Dataset:
    """The lines ("text") of text files, or the rows of parquet files."""
    empty = [file for file in files if file.is_file() and file.stat().st_size == 0]
    if empty:
        raise ArgumentError("data_path", "text", f"{empty[0]}, which is empty")
    kind = {"keep_linebreaks": True, "path": "text"} if files[0].suffix != ".parquet" else {"path": "parquet"}
    try:
        lines = datasets.load_dataset(**kind, data_files=[str(file) for file in files], split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = error.__cause__ or error
        names = ", ".join(str(file) for file in files)
        raise ArgumentError("data_path", "readable text in UTF-8", f"{names}: {reason}") from error
    if "text" not in lines.column_names:
        raise ArgumentError("data_path", 'parquet files with a column "text"', f"{files[0]} with {lines.column_names}")
    return lines.select_columns("text")


def read_folder(folder: Path) -> list[datasets.Dataset]:
    """The three splits of a folder, by the names of its files."""
    names = sorted(file for file in folder.iterdir() if file.suffix in (".tokens", ".raw", ".txt", ".parquet"))
    splits = [[file for file in names if split in file.name] for split in ("train", "valid", "test")]
    if not all(splits):
        found = ", ".join(file.name for file in names) or "none"
        raise ArgumentError("data_path", "a folder of train, valid and test text", f"{folder} with {found}")
    return [read_lines(files) for files in splits]


def read_splits(config: LanguageConfig) -> list[datasets.Dataset]:
    """Lines to train on, to validate on, and held out."""
    path = config.data_path
    if path is not None and path.is_dir():
        return read_folder(path)
    if path is not None:
        lines = read_lines([path])
    else:
        from pydoc_data.topics import topics  # a Python may come without it

        lines = datasets.Dataset.from_dict({"text": "\n\n".join(topics.values()).splitlines(keepends=True)})
    count = round(config.val_split * len(lines))
    if not 0 < 2 * count < len(lines):
        got = f"{config.val_split} of {len(lines)} lines"
        raise ArgumentError("val_split", "a share that can be held out twice, of some lines but not all", got)
    ends = (0, len(lines) - 2 * count, len(lines) - count, len(lines))
    return [lines.select(range(start, end)) for start, end in pairwise(ends)]


def trained_tokenizer(lines: datasets.Dataset, vocab_size: int) -> Tokenizer:
    """Byte-pair encoding: every text has tokens (Radford et al. 2019, section 2.2)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines["text"], trainer, len(lines))
    return tokenizer


def tokenised(lines: datasets.Dataset, tokenizer: Tokenizer) -> Tensor:
    """(tokens,) int32. What comes of files is kept in the cache of `datasets`."""

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer.encode_batch_fast(rows["text"], add_special_tokens=False)
        return {"ids": [[token for line in encoded for token in line.ids]]}

    rows = lines.map(encode, batched=True, remove_columns="text")
    return torch.cat(
        [torch.empty(0, dtype=torch.int32), *(torch.tensor(ids, dtype=torch.int32) for ids in rows["ids"])]
    )


class LanguageModel(Recipe):
    """A GPT that predicts each token from those before it; perplexity = exp(mean of −log p)."""

    name = "language"
    config_class = LanguageConfig
    metric_for_best_model = "perplexity"
    greater_is_better = False
    reported = ("loss", "perplexity")

    def __init__(self, config: LanguageConfig):
        super().__init__(config)
        datasets.disable_progress_bars()
        splits = read_splits(config)
        if config.tokenizer is None:
            tokenizer = trained_tokenizer(splits[0], config.vocab_size)
        else:
            tokenizer = read_tokenizer(config.tokenizer, "tokenizer")
        self.tokenizer = Tokenizer.from_str(parallel.from_first(tokenizer.to_str))
        tokens = [tokenised(lines, self.tokenizer) for lines in splits]
        self.train, self.valid, self.test = (
            Blocks(text, config.block_size, shifted=place == 0) for place, text in enumerate(tokens)
        )

    def model(self) -> nn.Module:
        """Weights are drawn as in Radford et al. 2019, section 2.3."""
        config, p = self.config, self.config.dropout
        sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
        drops = {"resid_pdrop": p, "embd_pdrop": p, "attn_pdrop": p}
        vocab_size, ends = self.tokenizer.get_vocab_size(), {"bos_token_id": None, "eos_token_id": None}
        return GPT(vocab_size=vocab_size, n_positions=config.block_size, **sizes, **drops, **ends)

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def loss(self, model: nn.Module, batch: list) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    def measure(self, model: nn.Module, batch: list) -> Sums:
        tokens, targets = batch
        loss = F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten(), reduction="sum")
        return {"loss": (loss, (targets != IGNORED).sum())}

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        return means | {"perplexity": float(np.exp(means["loss"]))}
