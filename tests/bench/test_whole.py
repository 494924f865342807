"""The whole models of the benchmark: ours give what PyTorch's give, or have no speed."""

import pytest
import torch

from bench import models, whole
from bench.pretrained import WeightsMissing
from fused_ops.models import GPT, BERTForMaskedLM

SMALL = {"vocab_size": 64}
GPT_SIZES = {"n_embd": 32, "n_head": 2, "n_layer": 2, "bos_token_id": 0, "eos_token_id": 0}
BERT_SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48}
BUILDS = {
    "minilm": whole.ragged_minilm,
    "lstm": whole.stacked_lstm,
    "cnn": whole.training_step(4),
    "gpt training": whole.language_training(GPT, "GPT2LMHeadModel", "GPT2Config", 2, 9, **GPT_SIZES, **SMALL),
    "bert training": whole.language_training(
        BERTForMaskedLM, "BertForMaskedLM", "BertConfig", 2, 9, **BERT_SIZES, **SMALL
    ),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_every_form_gives_what_pytorch_gives(build):
    try:
        with torch.no_grad():
            rivals = build("cpu")
            wanted, *others = (call() for call in rivals.eager.values())
            found = [call() for name, call in rivals.ours.items() if "compiled" not in name]
    except WeightsMissing as missing:
        pytest.skip(str(missing))
    for value in (*others, *found):
        assert models.verdict(value, wanted, [], rivals.tolerance)["correct"]


def contest(ours, eager):
    rivals = whole.Rivals({"ours": ours}, {"eager": eager, "other": eager}, {"compile": eager})

    def build(device):
        return rivals

    return models.contest(whole.Model("a model", build), "cpu", 0.01)


def test_the_best_forms_are_compared():
    row = contest(lambda: torch.ones(3), lambda: torch.ones(3))
    assert row["correct"] and row["PyTorch"]["form"] in ("eager", "other") and row["fused"]["form"] == "ours"
    assert row["speedup"] > 0.0 and row["against_compile"] > 0.0


def test_a_wrong_model_has_no_speed():
    row = contest(lambda: torch.ones(3) + 1e-2, lambda: torch.ones(3))
    assert not row["correct"] and "speedup" not in row
