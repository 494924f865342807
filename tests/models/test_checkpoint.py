"""Checkpoints: read as transformers writes them, written as transformers reads them, and nothing half-loaded."""

import copy
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fused_ops.models import CNN, RNN, Attention, Transformer
from fused_ops.models.bert import BERT, BERTForMaskedLM, BERTForQuestionAnswering, BERTForSequenceClassification
from fused_ops.models.checkpoint import load_into, read_state, write_state
from fused_ops.models.gpt import GPT
from tests.models.twins import randomise
from tests.support import randn
from tests.third_party import transformers

BERT_SIZES = {
    "vocab_size": 50,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 9,
}
GPT_SIZES = {"vocab_size": 50, "n_positions": 9, "n_embd": 12, "n_layer": 2, "n_head": 2}


def hugging_face_bert(head="BertModel", **fields):
    return randomise(getattr(transformers, head)(transformers.BertConfig(**BERT_SIZES | fields)))


def hugging_face_gpt():
    return randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT_SIZES)))


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def write_bin(model, folder, shards=1):
    """pytorch_model.bin as transformers wrote it before version 5, tied weights included."""
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if shards == 1:
        return torch.save(state, folder / "pytorch_model.bin")
    places = {key: f"pytorch_model-{i % shards}.bin" for i, key in enumerate(state)}
    for name in set(places.values()):
        torch.save({key: state[key] for key in state if places[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("form", ("safetensors", "safetensors shards", "bin", "bin shards"))
@pytest.mark.parametrize("family", ("bert", "gpt"))
def test_what_transformers_writes_is_read(family, form, tmp_path):
    theirs = hugging_face_bert("BertForMaskedLM") if family == "bert" else hugging_face_gpt()
    if form.startswith("safetensors"):
        theirs.save_pretrained(tmp_path, max_shard_size="8KB" if "shards" in form else "1GB")
    else:
        write_bin(theirs, tmp_path, 3 if "shards" in form else 1)
    assert (len(list(tmp_path.glob("*.index.json"))) == 1) == ("shards" in form)
    ours = (BERTForMaskedLM if family == "bert" else GPT).from_pretrained(tmp_path)
    assert same(ours.state_dict(), theirs.state_dict()) and not ours.training


@pytest.mark.parametrize("family", ("bert", "bert untied", "gpt", "gpt untied", "labels"))
def test_what_is_written_transformers_reads(family, tmp_path):
    tied = "untied" not in family
    if "gpt" in family:
        ours = GPT(**GPT_SIZES, eos_token_id=None, pad_token_id=3, tie_word_embeddings=tied)
        theirs = transformers.GPT2LMHeadModel
    elif "bert" in family:
        ours = BERTForMaskedLM(**BERT_SIZES, pad_token_id=7, tie_word_embeddings=tied)
        theirs = transformers.BertForMaskedLM
    else:
        names = {"0": "bad", "1": "fair", "2": "good"}
        ours = BERTForSequenceClassification(**BERT_SIZES, num_labels=3, id2label=names)
        theirs = transformers.BertForSequenceClassification
    folder = tmp_path / "new" / "folder"
    randomise(ours).save_pretrained(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    read, report = theirs.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()) and same(read.state_dict(), ours.state_dict())
    again = type(ours).from_pretrained(folder)
    assert again.config == ours.config and same(again.state_dict(), ours.state_dict())
    if family == "labels":
        assert read.config.id2label == {0: "bad", 1: "fair", 2: "good"} and read.config.num_labels == 3
    for name, value in json.loads((folder / "config.json").read_text()).items():
        if name not in ("id2label", "num_labels", "architectures"):
            assert getattr(read.config, name) == value


def test_labels_by_their_number(tmp_path):
    theirs = hugging_face_bert("BertForSequenceClassification", num_labels=5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BERTForSequenceClassification.from_pretrained(tmp_path / "theirs")
    assert ours.config.num_labels == 5 and same(ours.state_dict(), theirs.state_dict())
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | {"id2label": None, "num_labels": 5}))
    assert same(BERTForSequenceClassification.from_pretrained(tmp_path / "theirs").state_dict(), theirs.state_dict())
    plain = BERTForSequenceClassification(**BERT_SIZES, num_labels=4)
    plain.save_pretrained(tmp_path / "ours")
    read = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert read.config.num_labels == 4 and same(read.state_dict(), plain.state_dict())


def test_an_encoder_under_a_head_and_a_head_over_an_encoder(tmp_path):
    masked = hugging_face_bert("BertForPreTraining")
    masked.save_pretrained(tmp_path / "head")
    encoder = BERT.from_pretrained(tmp_path / "head")
    assert same(encoder.state_dict(), masked.bert.state_dict())
    assert same(BERTForMaskedLM.from_pretrained(tmp_path / "head").bert.state_dict(), _without(masked.bert, "pooler."))
    for head, fresh in ((BERTForSequenceClassification, "classifier.*"), (BERTForQuestionAnswering, "qa_outputs.*")):
        tuned = head.from_pretrained(tmp_path / "head", fresh=(fresh,)).bert
        assert same(tuned.state_dict(), masked.bert.state_dict() if tuned.pooler else _without(masked.bert, "pooler."))
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"2 missing: classifier\.bias, classifier\.weight$"):
        BERTForSequenceClassification.from_pretrained(tmp_path / "encoder")
    head = BERTForSequenceClassification.from_pretrained(tmp_path / "encoder", fresh=("classifier.*",), num_labels=7)
    assert head.classifier.weight.shape == (7, 12) and same(head.bert.state_dict(), encoder.state_dict())
    without = BERT.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
    assert same(without.state_dict(), _without(encoder, "pooler."))


def _without(model, part):
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(part)}


@pytest.mark.parametrize(
    "model, extra",
    (
        (BERT, "encoder.layer.2.output.dense.bias"),
        (BERTForMaskedLM, "cls.predictions.transform.dense.wieght"),
        (BERTForSequenceClassification, "classifier.dense.weight"),
        (BERTForQuestionAnswering, "qa_outputs.scale"),
    ),
)
def test_a_model_knows_all_that_its_own_parts_hold(model, extra, tmp_path):
    model(**BERT_SIZES).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {extra: torch.ones(3)}, tmp_path / "model.safetensors")
    refused(tmp_path, f"1 unexpected: (bert.)?{extra}", model)


def test_names_of_the_oldest_checkpoints(tmp_path):
    theirs = hugging_face_bert()
    old = {
        "bert." + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in theirs.state_dict().items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(9)[None]
    theirs.config.save_pretrained(tmp_path)
    torch.save(old, tmp_path / "pytorch_model.bin")
    assert same(BERT.from_pretrained(tmp_path).state_dict(), theirs.state_dict())

    theirs = hugging_face_gpt()
    old = {key.removeprefix("transformer."): tensor for key, tensor in theirs.state_dict().items() if "lm_h" not in key}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 9, 9).tril().bool() for i in range(2)}
    old |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    theirs.config.save_pretrained(tmp_path)
    torch.save(old, tmp_path / "pytorch_model.bin")
    assert same(GPT.from_pretrained(tmp_path).state_dict(), theirs.state_dict())


def test_half_weights_are_read_into_float32_and_written_as_they_are(tmp_path):
    theirs = hugging_face_gpt().bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.lm_head.weight.dtype == torch.float32
    assert same(ours.state_dict(), copy.deepcopy(theirs).float().state_dict())
    ours.bfloat16().save_pretrained(tmp_path / "ours")
    read = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    assert read.dtype == torch.bfloat16 and same(read.state_dict(), theirs.state_dict())


def test_links_as_in_a_cache_and_files_from_before(tmp_path):
    theirs = hugging_face_gpt()
    theirs.save_pretrained(tmp_path / "blobs", max_shard_size="8KB")
    (tmp_path / "snapshot").mkdir()
    for i, file in enumerate((tmp_path / "blobs").iterdir()):
        (tmp_path / "snapshot" / file.name).symlink_to(file.rename(tmp_path / f"{i}"))
    ours = GPT.from_pretrained(tmp_path / "snapshot")
    assert same(ours.state_dict(), theirs.state_dict())
    randomise(ours, 0.5).save_pretrained(tmp_path / "snapshot")
    for model in (GPT, transformers.GPT2LMHeadModel):
        assert same(model.from_pretrained(tmp_path / "snapshot").state_dict(), ours.state_dict())


SMALL = pytest.mark.parametrize(
    "model",
    (
        lambda: CNN(8),
        lambda: RNN(3, 4, 2, 2),
        lambda: Attention(4, 2, 2),
        lambda: Transformer(9, 8, 1, 3),
        lambda: Transformer(9, 8, 1, kind="encoder-decoder"),
    ),
    ids=("CNN", "RNN", "Attention", "Transformer encoder", "Transformer"),
)


@SMALL
def test_a_file_is_read_whole_or_not_at_all(model, tmp_path):
    ours, other, file = randomise(model()), model(), tmp_path / "model.safetensors"
    write_state(file, ours.state_dict())
    load_into(other, read_state(file))
    assert same(other.state_dict(), ours.state_dict())
    randomise(other, 0.3)
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    foreign = ours.state_dict() | {"head.weight": torch.ones(2)}
    key = next(iter(foreign))
    with pytest.raises(
        ValueError, match=rf"(?s)weights of a {type(ours).__name__}, got 1 missing: {key}; .*head.weight"
    ):
        load_into(other, {name: tensor for name, tensor in foreign.items() if name != key})
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"path must be a whole safetensors file"):
        load_into(other, read_state(file))
    assert same(other.state_dict(), before)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.tensor(5))


def test_tied_weights():
    model = Tied()
    bias, weight, count = randn(4), randn(4, 3), torch.tensor(9)
    for names in (("first", "second"), ("first",), ("second",)):
        load_into(model, {"first.bias": bias, "count": count} | {f"{name}.weight": weight for name in names})
        assert torch.equal(model.second.weight, weight) and model.count == 9
        randomise(model)
    with pytest.raises(ValueError, match=r"1 one tensor .*first\.weight and second\.weight"):
        load_into(model, {"first.bias": bias, "count": count, "first.weight": weight, "second.weight": weight + 1})
    with pytest.raises(ValueError, match=r"2 missing: first\.weight, second\.weight"):
        load_into(model, {"first.bias": bias, "count": count})


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"first.bias": None}, r"1 missing: first\.bias$"),
        ({"third.weight": torch.ones(2), "fourth": torch.ones(2)}, r"2 unexpected: fourth, third\.weight$"),
        ({"first.bias": torch.ones(5)}, r"1 of another shape or kind: first\.bias \(5,\) instead of \(4,\)$"),
        ({"first.bias": torch.ones(4).int()}, r"first\.bias \(4,\) torch\.int32 instead of \(4,\)$"),
        ({"count": torch.tensor(2.0)}, r"count \(\) instead of \(\) torch\.int64$"),
        ({"first.bias": torch.ones(4).to_sparse()}, r"first\.bias \(4,\) torch\.sparse_coo instead of \(4,\)$"),
        ({"first.bias": torch.ones(4, device="meta")}, r"first\.bias \(4,\) without values instead of \(4,\)$"),
        ({"first.bias": None, "bias": torch.ones(4)}, r"missing: first\.bias; 1 unexpected: bias$"),
    ),
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model = Tied()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = {"count": torch.tensor(2), "first.weight": randn(4, 3), "first.bias": randn(4)} | change
    with pytest.raises(ValueError, match=r"state must be the weights of a Tied, got .*" + message):
        load_into(model, {key: tensor for key, tensor in state.items() if tensor is not None})
    assert same(model.state_dict(), before)


def test_keys_that_may_be_there_and_keys_that_may_not():
    model = Tied()
    count, bias = model.count.clone(), randn(4)
    state = {"first.weight": randn(4, 3), "first.bias": bias, "extra.mask": bias, "first.mask": bias}
    load_into(model, state, ignore=("*.mask",), fresh=("count",))
    assert torch.equal(model.first.bias, bias) and model.count == count
    with pytest.raises(ValueError, match=r"extra\.mask, first\.mask"):
        load_into(model, state, ignore=("mask",), fresh=("count",))
    with pytest.raises(ValueError, match="missing: count"):
        load_into(model, state, ignore=("*.mask",), fresh=("coun",))


def test_more_keys_than_an_error_lists():
    with pytest.raises(ValueError, match=r"30 unexpected: k00, .*k19 and 10 more$"):
        load_into(Tied(), Tied().state_dict() | {f"k{i:02}": torch.ones(1) for i in range(30)})


def test_a_written_state_is_the_first_of_tied_weights(tmp_path):
    state = Tied().state_dict() | {"none": torch.empty(0), "nothing": torch.empty(0), "turned": randn(3, 2).T}
    write_state(tmp_path / "state.safetensors", state)
    read = load_file(tmp_path / "state.safetensors")
    assert read.keys() == state.keys() - {"second.weight"}
    assert all(torch.equal(read[key], state[key]) for key in read)
    assert same(read_state(tmp_path / "state.safetensors"), read)
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.fixture
def folder(tmp_path):
    hugging_face_gpt().save_pretrained(tmp_path)
    return tmp_path


def refused(folder, message, model=GPT):
    with pytest.raises(ValueError, match=rf"(?s)^path must be .*{message}"):
        model.from_pretrained(folder)


@pytest.mark.parametrize("kept", (0, 5, 200, 0.5, 0.999))
@pytest.mark.parametrize("form", ("safetensors", "bin", "old bin"))
def test_truncated_weights(form, kept, folder):
    file = folder / "model.safetensors"
    if form != "safetensors":
        state = load_file(file)
        file.unlink()
        file = folder / "pytorch_model.bin"
        torch.save(state, file, _use_new_zipfile_serialization=form == "bin")
    content = file.read_bytes()
    GPT.from_pretrained(folder)
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    refused(folder, rf"a whole .*{file.name}")


def test_shards_that_are_not_whole(tmp_path):
    hugging_face_gpt().save_pretrained(tmp_path, max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    first = sorted(set(places["weight_map"].values()))[0]

    def with_map(weight_map):
        index.write_text(json.dumps(places | {"weight_map": weight_map}))

    with_map(places["weight_map"] | {"more.weight": first})
    refused(tmp_path, "every tensor of model.safetensors.index.json.*without more.weight")
    shutil.copy(tmp_path / first, tmp_path.parent / "outside.safetensors")
    with_map(places["weight_map"] | {"more.weight": "../outside.safetensors"})
    refused(tmp_path, r"every shard of .*without \.\./outside.safetensors")
    with_map({key: 3 for key in places["weight_map"]})
    refused(tmp_path, "every shard of .*without 3")
    with_map(places["weight_map"])
    GPT.from_pretrained(tmp_path)
    (tmp_path / first).unlink()
    refused(tmp_path, f"every shard of model.safetensors.index.json.*without {first}")
    index.write_text("{}")
    refused(tmp_path, "a folder whose index has a weight_map")


def test_code_in_a_checkpoint_is_not_run(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Spy()}, folder / "pytorch_model.bin")
    Spy.ran = False
    refused(folder, r"nothing but tensors.*pytorch_model.bin: it asks for tests\.models\.test_checkpoint\.Spy$")
    assert not Spy.ran
    torch.save({"transformer.wte.weight": randn(2), "epoch": 3}, folder / "pytorch_model.bin")
    refused(folder, "state dict.*pytorch_model.bin with epoch: int")
    torch.save([randn(2)], folder / "pytorch_model.bin")
    refused(folder, "state dict.*list")


class Spy:
    ran = False

    def __setstate__(self, state):
        Spy.ran = True

    def __getstate__(self):
        return {"a": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"model_type": "llama"}, r"a GPT checkpoint \(model_type 'gpt2'\).*'llama'"),
        ({"model_type": None}, r"a GPT checkpoint.*None"),
        ({"add_cross_attention": True}, "with add_cross_attention False.*True"),
        ({"n_layer": 3}, r"missing: transformer\.h\.2\."),
        ({"n_layer": 1}, r"unexpected: transformer\.h\.1\."),
        ({"vocab_size": 51}, r"\(50, 12\) instead of \(51, 12\)"),
    ),
)
def test_a_checkpoint_of_something_else(change, message, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    refused(folder, message)


def test_folders_without_a_checkpoint(folder):
    refused(folder, "a BERT checkpoint.*'gpt2'", BERT)
    refused(folder / "nowhere", "a folder with config.json.*nowhere")
    refused(folder / "config.json", "a folder with config.json")
    (folder / "config.json").write_text("{")
    refused(folder, "a readable config.json")
    (folder / "config.json").write_text("[]")
    refused(folder, "an object")
    (folder / "config.json").unlink()
    refused(folder, "a folder with config.json")
    with pytest.raises(ValueError, match=r"path .*nowhere, which does not exist"):
        read_state(folder / "nowhere")
    (folder / "model.safetensors").unlink()
    (folder / "flax_model.msgpack").touch()
    with pytest.raises(ValueError, match=r"path .*model.safetensors or pytorch_model.bin.*flax_model\.msgpack"):
        read_state(folder)
    save_file({"a": randn(2)}, folder / "one.safetensors")
    assert same(read_state(str(folder / "one.safetensors")), {"a": randn(2)})


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"path must be a folder, got .*file"):
        GPT(**GPT_SIZES).save_pretrained(tmp_path / "file")
