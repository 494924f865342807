"""BERT and its heads: against transformers, with and without padding, and what they refuse."""

import copy
import pickle

import pytest
import torch

import fused_ops
from fused_ops.core.dispatch import record
from fused_ops.models import bert
from fused_ops.models.bert import BERT, BERTForMaskedLM, BERTForQuestionAnswering, BERTForSequenceClassification
from tests.models.twins import assert_twins, randomise
from tests.support import assert_accurate, value_and_gradients
from tests.third_party import transformers

SIZES = {
    "vocab_size": 99,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "max_position_embeddings": 20,
    "num_labels": 3,
}
TWINS = {
    BERT: "BertModel",
    BERTForMaskedLM: "BertForMaskedLM",
    BERTForSequenceClassification: "BertForSequenceClassification",
    BERTForQuestionAnswering: "BertForQuestionAnswering",
}
HEADS = pytest.mark.parametrize("head", TWINS, ids=lambda head: head.__name__)
MASKS = {
    "right": torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None],
    "left": torch.arange(7) >= torch.tensor([0, 3, 6, 2])[:, None],
    "holes": torch.tensor([[1, 0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1], [1] * 7]).bool(),
}


def pair(head, **fields):
    fields = SIZES | fields
    ours = randomise(head(**fields)).eval()
    labels = fields.pop("num_labels")
    if head is BERTForSequenceClassification:
        fields["num_labels"] = labels
    theirs = getattr(transformers, TWINS[head])(transformers.BertConfig(**fields)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def inputs(mask=None):
    ids = torch.randint(1, 99, (4, 7), generator=torch.Generator().manual_seed(5))
    types = torch.randint(0, 2, (4, 7), generator=torch.Generator().manual_seed(6))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def outputs(model, mask=None, **call):
    """Every output of a model, ours or theirs, 0 at padding."""
    found = model(**(inputs(mask) | call))
    found = found.to_tuple() if hasattr(found, "to_tuple") else found if isinstance(found, tuple) else (found,)
    keep = torch.ones(4, 7, dtype=torch.bool) if mask is None else mask
    return [t * keep.view(4, 7, *[1] * (t.dim() - 2)) if t.shape[:2] == (4, 7) else t for t in found]


@HEADS
@pytest.mark.parametrize("masked", (None, *MASKS))
def test_values_and_gradients_are_transformers(head, masked):
    mask = MASKS.get(masked)
    assert_twins(*pair(head), lambda model: outputs(model, mask))


@HEADS
@pytest.mark.parametrize("masked", MASKS)
def test_values_without_gradients_are_transformers(head, masked):
    mask = MASKS[masked]
    ours, theirs = pair(head)
    with torch.no_grad(), record() as choices:
        found = outputs(ours, mask)
    assert ("varlen_attention" in {choice.op for choice in choices}) == (masked != "left")
    with torch.no_grad():
        peers, exact = outputs(theirs, mask), outputs(copy.deepcopy(theirs).double(), mask)
    for value, wanted, peer in zip(found, exact, peers, strict=True):
        assert_accurate(value, wanted, peer, terms=200)


@pytest.mark.parametrize("act", ("gelu_new", "gelu_tanh", "relu", "silu", "tanh"))
def test_activations(act):
    ours, theirs = pair(BERTForMaskedLM, hidden_act="gelu_pytorch_tanh" if act == "gelu_tanh" else act)
    ours = BERTForMaskedLM(ours.config, hidden_act=act).eval()
    ours.load_state_dict(theirs.state_dict())
    assert_twins(ours, theirs, outputs)


def test_positions_and_default_segments():
    ours, theirs = pair(BERT)
    own = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(2))
    for places in (own, own[:1]):
        assert_twins(ours, theirs, lambda model, own=places: outputs(model, position_ids=own, token_type_ids=None))


@HEADS
def test_padding_is_not_computed(head):
    ours, _ = pair(head)
    mask, call = MASKS["right"], inputs(MASKS["right"])
    with torch.no_grad():
        found = ours(**call)
        call["input_ids"] = call["input_ids"].masked_fill(~mask, 98)
        again = ours(**call)
    for value, other in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, again)), strict=True):
        assert torch.equal(value, other)
        if value.shape[:2] == mask.shape:
            assert (value[~mask] == 0).all() and (value[mask] != 0).all()


@pytest.mark.parametrize("dtype", (torch.bool, torch.int64, torch.float32))
def test_a_mask_of_any_dtype_and_none_where_all_are_tokens(dtype):
    ours, _ = pair(BERT)
    with torch.no_grad():
        wanted = ours(**inputs(MASKS["right"]))[0]
        assert torch.equal(ours(**inputs(MASKS["right"].to(dtype)))[0], wanted)
        assert torch.equal(ours(**inputs(torch.ones(4, 7, dtype=dtype)))[0], ours(**inputs())[0])


@HEADS
@pytest.mark.parametrize("masked", (None, "right"))
def test_bfloat16(head, masked):
    ours, theirs = pair(head)
    mask = MASKS.get(masked)
    with torch.no_grad():
        exact = outputs(copy.deepcopy(theirs).bfloat16().double(), mask)
        peers, found = outputs(theirs.bfloat16(), mask), outputs(ours.bfloat16(), mask)
    for value, wanted, peer in zip(found, exact, peers, strict=True):
        assert value.dtype == torch.bfloat16
        assert_accurate(value, wanted, peer)


@HEADS
def test_dropout_drops_what_transformers_drops(head):
    ours, theirs = pair(head)
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        model.last = outputs(model)
    for value, wanted in zip(ours.last, theirs.last, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours.last[0], outputs(ours.eval())[0])


def test_autocast():
    ours, theirs = pair(BERT)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, peer = outputs(ours, MASKS["right"])[0], outputs(theirs, MASKS["right"])[0]
    with torch.no_grad():
        exact = outputs(theirs.double(), MASKS["right"])[0]
    assert_accurate(found, exact, peer, ulps=0.0, factor=2.0)


@pytest.mark.parametrize("head", (BERTForMaskedLM, BERTForSequenceClassification))
def test_compiles_whole(head):
    ours, _ = pair(head)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for mask in (None, MASKS["right"]):
        for value, wanted in zip(outputs(compiled, mask), outputs(ours, mask), strict=True):
            torch.testing.assert_close(value, wanted)


@HEADS
def test_copies_pickles_and_states(head):
    ours, theirs = pair(head)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert twin.config == ours.config
    assert torch.equal(outputs(twin)[0], outputs(ours)[0])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if head is BERTForMaskedLM:
        assert twin.cls["predictions"].decoder.weight is twin.bert.embeddings.word_embeddings.weight
        assert twin.cls["predictions"].decoder.bias is twin.cls["predictions"].bias


def test_an_untied_head_scores_with_weights_of_its_own():
    ours, theirs = pair(BERTForMaskedLM, tie_word_embeddings=False)
    assert_twins(ours, theirs, outputs)
    assert ours.cls["predictions"].decoder.weight is not ours.bert.embeddings.word_embeddings.weight


def test_initial_weights():
    model = BERTForMaskedLM(**SIZES | {"vocab_size": 999, "pad_token_id": 4})
    assert model.bert.embeddings.word_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (model.bert.embeddings.word_embeddings.weight[4] == 0).all()
    untied = BERTForMaskedLM(**SIZES | {"tie_word_embeddings": False})
    assert untied.cls["predictions"].decoder.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for part in (model, untied):
        assert all(weight.isfinite().all() for weight in part.parameters())


def test_no_pooler():
    ours, _ = pair(BERT)
    without = BERT(ours.config, add_pooling_layer=False).eval()
    without.load_state_dict({key: value for key, value in ours.state_dict().items() if "pooler" not in key})
    hidden, pooled = without(**inputs())
    assert torch.equal(hidden, ours(**inputs()).last_hidden_state) and pooled is None


def test_no_rows_and_one_token():
    model = BERTForQuestionAnswering(**SIZES).eval()
    assert [t.shape for t in model(torch.empty(0, 5, dtype=torch.int64))] == [(0, 5)] * 2
    assert model(torch.empty(0, 5, dtype=torch.int64), torch.empty(0, 5)).start_logits.shape == (0, 5)
    assert model(torch.tensor([[3]], dtype=torch.int32), torch.ones(1, 1)).end_logits.shape == (1, 1)


IDS = torch.full((2, 5), 7)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        ({"input_ids": IDS + 92}, r"input_ids .*between 0 and 98.*99"),
        ({"input_ids": IDS - 8}, r"input_ids .*between 0 and 98.*-1"),
        ({"input_ids": IDS.float()}, r"input_ids .*int64.*float32"),
        ({"input_ids": IDS[0]}, r"input_ids .*\(batch, length\).*\(5,\)"),
        ({"input_ids": IDS[:, :0]}, r"input_ids .*one token.*\(2, 0\)"),
        ({"input_ids": IDS.repeat(1, 5)}, r"input_ids .*at most 20.*25"),
        ({"input_ids": IDS, "token_type_ids": IDS}, r"token_type_ids .*between 0 and 1.*7"),
        ({"input_ids": IDS, "token_type_ids": IDS[:1]}, r"token_type_ids .*\(2, 5\).*\(1, 5\)"),
        ({"input_ids": IDS, "position_ids": IDS + 13}, r"position_ids .*between 0 and 19.*20"),
        ({"input_ids": IDS, "position_ids": IDS[:, :4]}, r"position_ids .*\(2, 5\).*\(2, 4\)"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :4]}, r"attention_mask .*\(2, 5\).*\(2, 4\)"),
    ),
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        BERT(**SIZES)(**call)


def test_what_a_configuration_refuses():
    with pytest.raises(ValueError, match=r"num_attention_heads .*divisor of the hidden size 24.*5"):
        BERT(**SIZES | {"num_attention_heads": 5})
    with pytest.raises(ValueError, match=r"hidden_act .*gelu.*relu.*swoosh"):
        BERT(hidden_act="swoosh")
    with pytest.raises(TypeError, match="width"):
        BERT(width=3)
    with pytest.raises(TypeError, match=r"input_ids must be a Tensor.*list"):
        BERT(**SIZES)([[1, 2]])
    with pytest.raises(ValueError, match=r"pad_token_id .*vocabulary of 99.*99"):
        BERT(**SIZES | {"pad_token_id": 99})
    with pytest.raises(ValueError, match="add_pooling_layer"):
        BERTForSequenceClassification(add_pooling_layer=False)


def test_a_backend_asked_for_binds():
    model = BERT(**SIZES).eval()
    with torch.no_grad(), fused_ops.use_backend("reference"), record() as choices:
        model(**inputs(MASKS["right"]))
    assert {choice.reason for choice in choices} == {"asked for by use_backend"}


def test_minilm():
    from bench.pretrained import minilm, text
    from bench.pretrained.weights import WeightsMissing, locate

    try:
        folder = locate(minilm.DISTRIBUTION, "model.safetensors").parent
        ids, tokens = minilm.tokenise(text.sentences(6))
    except WeightsMissing as missing:
        pytest.skip(str(missing))
    ours, theirs = bert.BERT.from_pretrained(folder), transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found, peers = ours(ids, tokens), theirs(ids, tokens.long())
        exact = theirs.double()(ids, tokens.long())
    assert_accurate(found.last_hidden_state[tokens], exact.last_hidden_state[tokens], peers.last_hidden_state[tokens])
    assert_accurate(found.pooler_output, exact.pooler_output, peers.pooler_output)
    few, seen = ids[:2, :12], tokens[:2, :12]

    def gradients(model):
        weights = [weight for name, weight in model.named_parameters() if ".0.attention" in name or ".5.out" in name]
        return value_and_gradients(lambda *_: model(few, seen.long())[0][seen], weights)[1]

    exact, peers = gradients(theirs), gradients(copy.deepcopy(theirs).float())
    for grad, wanted, peer in zip(gradients(ours), exact, peers, strict=True):
        assert_accurate(grad, wanted, peer, factor=3.0, terms=384)
