"""Language models: texts and their splits, sequences that tile them, perplexity, and a bigram model to beat."""

import math

import datasets
import pytest
import torch
from tokenizers import Tokenizer

from bench.pretrained.text import ESSAY, ZEN
from fused_ops.models import GPT
from fused_ops.train import run
from fused_ops.train.language import IGNORED, Blocks, LanguageConfig, LanguageModel
from fused_ops.train.loop import Trainer
from tests.train.bigram import KneserNey, best_perplexity
from tests.train.material import tiny
from tests.train.runs import CPU, assert_same


@pytest.mark.parametrize("count", (2, 10, 11, 12, 101))
def test_every_token_but_the_first_is_a_target_once(count):
    tokens = torch.arange(count, dtype=torch.int32)
    blocks = Blocks(tokens, 5, shifted=False)
    pairs = [blocks[i] for i in range(len(blocks))]
    targets = torch.cat([target for _, target in pairs])
    assert targets[targets != IGNORED].tolist() == list(range(1, count))
    for before, after in pairs:
        known = after != IGNORED
        assert torch.equal(before[known] + 1, after[known]) and before.shape == after.shape == (5,)


@pytest.mark.parametrize("count", (4, 6, 7, 101))
def test_in_training_sequences_start_anywhere(count):
    blocks = Blocks(torch.arange(count, dtype=torch.int32), 5, shifted=True)
    starts = set()
    for _ in range(60):
        for i in range(len(blocks)):
            before, after = blocks[i]
            known = after != IGNORED
            assert torch.equal(before[known] + 1, after[known]) and known.sum() == min(5, count - 1)
            starts.add(int(before[0]))
    assert starts == set(range(max(1, count - 5)))


def lines(split: str) -> str:
    return "".join(f"{split} line {i}: {line}\n" for i, line in enumerate(ZEN.splitlines()))


def test_wikitexts_layout_is_read(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(lines(split), encoding="utf-8")
    recipe = tiny("language", tmp_path, data_path=tmp_path)
    texts = [recipe.tokenizer.decode(data.tokens.tolist()) for data in (recipe.train, recipe.valid, recipe.test)]
    assert texts == [lines("train"), lines("valid"), lines("test")]


def test_parquet_files_are_read(tmp_path):
    for split in ("train", "validation", "test"):
        table = datasets.Dataset.from_dict({"text": lines(split).splitlines(keepends=True), "number": [0] * 21})
        table.to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    recipe = tiny("language", tmp_path, data_path=tmp_path)
    assert recipe.tokenizer.decode(recipe.valid.tokens.tolist()) == lines("validation")


def test_one_text_is_cut_in_three(tmp_path):
    recipe = tiny("language", tmp_path, val_split=0.1)
    parts = [recipe.tokenizer.decode(data.tokens.tolist()) for data in (recipe.train, recipe.valid, recipe.test)]
    assert "".join(parts) == f"{ZEN}\n{ESSAY}"
    assert [len(part.splitlines()) for part in parts[1:]] == [round(0.1 * len("".join(parts).splitlines()))] * 2


def test_a_run_leaves_a_folder_that_from_pretrained_reads(tmp_path):
    recipe = tiny("language", tmp_path, max_steps=4, eval_steps=2)
    run(LanguageModel, recipe.config)
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)["model"]
    assert_same(dict(GPT.from_pretrained(tmp_path / "run").state_dict()), best)
    kept = tmp_path / "run/tokenizer.json"
    assert Tokenizer.from_file(str(kept)).to_str() == recipe.tokenizer.to_str()
    other = tiny("language", tmp_path, tokenizer=kept, vocab_size=9999)
    assert other.model().config.vocab_size == 300 and torch.equal(other.test.tokens, recipe.test.tokens)


def test_perplexity_is_that_of_every_held_out_token(tmp_path):
    recipe = tiny("language", tmp_path, block_size=16, batch_size=3)
    trainer = Trainer(recipe, CPU)
    found = trainer.evaluate(recipe.test)
    tokens, total = recipe.test.tokens.long(), 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            piece = tokens[start : start + 17]
            scores = trainer.model(piece[None, :-1])[0].log_softmax(-1)
            total -= scores[torch.arange(len(piece) - 1), piece[1:]].sum().item()
    assert found["perplexity"] == pytest.approx(math.exp(total / (len(tokens) - 1)), rel=1e-5)


def test_what_is_no_text_is_refused(tmp_path):
    def refused(match: str, path) -> None:
        with pytest.raises(ValueError, match=match):
            tiny("language", tmp_path, data_path=path)

    (tmp_path / "empty").mkdir()
    refused(r"data_path must be a folder of train, valid and test text, got .*empty with none", tmp_path / "empty")
    refused(r"data_path must be readable text in UTF-8, got", tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").touch()
    refused(r"data_path must be text, got .*empty.txt, which is empty", tmp_path / "empty.txt")
    (tmp_path / "photo.txt").write_bytes(bytes(range(128, 256)) * 10)
    refused(r"data_path must be readable text in UTF-8, got .*can't decode", tmp_path / "photo.txt")
    for split in ("train", "valid", "test"):
        (tmp_path / "empty" / f"{split}.parquet").write_bytes(b"PAR1 and no more")
    refused(r"data_path must be readable text in UTF-8, got", tmp_path / "empty")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer must be a tokenizer.json"):
        tiny("language", tmp_path, tokenizer=tmp_path / "tokenizer.json")


def test_the_bigram_model_is_a_distribution():
    tokens = torch.randint(0, 7, (200,), generator=torch.Generator().manual_seed(0))
    model = KneserNey(tokens[tokens != 3], 9, 0.6)
    for v in range(9):
        assert sum(1 / model.perplexity(torch.tensor([v, w])) for w in range(9)) == pytest.approx(1)
    alternating = torch.tensor([0, 1] * 50)
    assert KneserNey(alternating, 2, 0.5).perplexity(alternating) < 1.05


@pytest.mark.slow
def test_a_tiny_gpt_beats_a_bigram_model(tmp_path):
    """By 30 % of its perplexity and more, on the same held-out tokens of Python's language reference."""
    recipe = LanguageModel(LanguageConfig(output_dir=tmp_path))
    trainer = Trainer(recipe, CPU)
    trainer.train()
    found = trainer.test(tmp_path / "best.pt")["perplexity"]
    tokens = [data.tokens for data in (recipe.train, recipe.valid, recipe.test)]
    bigram = best_perplexity(*tokens, recipe.tokenizer.get_vocab_size())
    assert found <= 0.7 * bigram, f"GPT {found:.1f}, bigram {bigram:.1f}"
