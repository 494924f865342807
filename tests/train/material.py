"""Small data in the layouts that recipes read, and recipes small enough to train on it in a second."""

import builtins
import importlib
import json
import math
import operator
import statistics
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import BertWordPieceTokenizer
from tokenizers.processors import BertProcessing

from bench.pretrained.text import ESSAY, ZEN
from fused_ops.models import BERT
from fused_ops.train.__main__ import RECIPES
from fused_ops.train.recipe import Recipe

FUNCTIONS = [
    (name, " ".join(function.__doc__.strip().split("\n\n")[0].split()))
    for module in (builtins, math, operator, statistics)
    for name, function in sorted(vars(module).items())
    if not name.startswith("_") and callable(function) and (function.__doc__ or "").strip().startswith("Return ")
]


def squad_content(functions=FUNCTIONS, per_passage: int = 4, unanswerable: bool = False) -> dict:
    """What does F return?, asked on passages that describe a few functions; or of one that the passage leaves out."""
    paragraphs = []
    for start in range(0, len(functions) - per_passage + 1, per_passage):
        described = functions[start : start + per_passage]
        context = " ".join(f"{name}: {text}" for name, text in described)
        questions = []
        for name, text in described:
            answer = text.removeprefix("Return ").rstrip(".")
            place = context.index(f"{name}: {text}") + len(f"{name}: Return ")
            answers = [{"text": answer, "answer_start": place}]
            questions.append({"id": f"{start}-{name}", "question": f"What does {name} return?", "answers": answers})
        if unanswerable:
            name = functions[start - 1][0]
            question = {"id": f"{start}-no", "question": f"What does {name} return?", "answers": []}
            questions.append(question | {"is_impossible": True})
        paragraphs.append({"context": context, "qas": questions})
    return {"version": "v2.0", "data": [{"title": "Functions", "paragraphs": paragraphs}]}


def write_squad(file: Path, **options) -> Path:
    file.write_text(json.dumps(squad_content(**options)), encoding="utf-8")
    return file


def write_bert(folder: Path) -> Path:
    """A tiny BERT with random weights, and a tokenizer for what `squad_content` asks."""
    tokenizer = BertWordPieceTokenizer()
    lines = [f"What does {name} return? {text}" for name, text in FUNCTIONS]
    tokenizer.train_from_iterator(lines, 400, show_progress=False)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer._tokenizer.post_processor = BertProcessing(*ends)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BERT(vocab_size=tokenizer.get_vocab_size(), **sizes).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_images(folder: Path, splits=("train", "val"), classes=("cat", "dog"), count: int = 3) -> Path:
    """Images of random colours in ImageNet's layout."""
    for split in splits:
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng((number, i)).integers(0, 256, (40, 48, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def write_series(folder: Path, count: int = 24) -> Path:
    """Sines and cosines of several lengths, as the UCR archive lays them out."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for split in ("TRAIN", "TEST"):
        rows = np.full((count, 11), np.nan)
        for i, row in enumerate(rows):
            length = 4 + i % 7
            row[0] = (-1, 1)[i % 2]
            row[1 : 1 + length] = (np.sin, np.cos)[i % 2](np.arange(length)) + 0.1 * draw.standard_normal(length)
        np.savetxt(folder / f"Waves_{split}.tsv", rows, delimiter="\t")
    return folder


TINY = {
    "image": {"batch_size": 16},
    "language": {"vocab_size": 300, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "batch_size": 8},
    "qa": {"max_seq_length": 48, "doc_stride": 8, "batch_size": 6, "lr": 1e-3},
    "sequence": {"hidden_size": 12, "batch_size": 16},
}


def write_data(name: str, folder: Path) -> dict:
    """Options that name a recipe's data, which are written into `folder` if the package ships none."""
    if name == "language":
        (folder / "text.txt").write_text(f"{ZEN}\n{ESSAY}")
        return {"data_path": folder / "text.txt", "val_split": 0.1}
    if name == "qa":
        if not (folder / "bert").exists():
            write_bert(folder / "bert")
        return {"model_path": folder / "bert", "train_file": write_squad(folder / "squad.json")}
    return {}


def tiny(name: str, folder: Path, **options) -> Recipe:
    """A recipe that trains in a second, on data in `folder`; output_dir is `folder`/run."""
    recipe = getattr(importlib.import_module(f"fused_ops.train.{name}"), RECIPES[name])
    given = {"output_dir": folder / "run", "log_steps": 1} | TINY[name] | write_data(name, folder) | options
    return recipe(recipe.config_class(**given))


def command_line(name: str, **options) -> list[str]:
    """As `tiny`, for `main`; the data and output_dir have to be among the options."""
    given = {"log_steps": 1} | TINY[name] | options
    return [name, *(f"--{key}={value}" for key, value in given.items())]
