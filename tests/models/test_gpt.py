"""GPT: logits, gradients and generated tokens against transformers, and what it refuses."""

import copy
import pickle
import string

import pytest
import tokenizers
import torch
from torch.nn.functional import linear, pad

from fused_ops.core.dispatch import record
from fused_ops.models import language
from fused_ops.models.gpt import GPT
from fused_ops.models.language import in_blocks
from fused_ops.models.sampling import restricted
from tests.models.twins import assert_twins, randomise
from tests.support import assert_accurate, randn
from tests.third_party import transformers

SIZES = {
    "vocab_size": 99,
    "n_positions": 40,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": 98,
    "eos_token_id": None,
}
LENGTHS = torch.tensor([7, 4, 1])
MASKS = {"right": torch.arange(7) < LENGTHS[:, None], "left": torch.arange(7) >= 7 - LENGTHS[:, None]}
IDS = torch.randint(0, 98, (3, 7), generator=torch.Generator().manual_seed(5))


def pair(**fields):
    fields = SIZES | fields
    ours = randomise(GPT(**fields), 0.7, 0.05).eval()  # what comes next depends on all that came before
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def logits(model, mask=None, **call):
    found = model(IDS, attention_mask=mask, **call)
    found = found if isinstance(found, torch.Tensor) else found.logits
    return [found if mask is None else found[mask]]


def generated(theirs, steps, mask=None, **call):
    """What transformers generates after IDS, (batch, 7 + steps)."""
    call = {"do_sample": False, "pad_token_id": 0} | call
    mask = torch.ones_like(IDS) if mask is None else mask.long()
    return theirs.generate(IDS, attention_mask=mask, max_new_tokens=steps, **call)


@pytest.mark.parametrize("masked", (None, *MASKS))
def test_values_and_gradients_are_transformers(masked):
    mask = MASKS.get(masked)
    assert_twins(*pair(), lambda model: logits(model, mask))


@pytest.mark.parametrize(
    "fields",
    (
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"n_inner": 31, "activation_function": "relu"},
        {"activation_function": "gelu", "tie_word_embeddings": False},
    ),
    ids=lambda fields: "-".join(fields),
)
def test_configurations(fields):
    ours, theirs = pair(**fields)
    assert_twins(ours, theirs, logits)
    assert torch.equal(ours.generate(IDS, 5, temperature=0), generated(theirs, 5))


def test_positions():
    own = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(2))
    for places in (own, own[:1]):
        assert_twins(*pair(), lambda model, own=places: logits(model, position_ids=own))


def test_bfloat16():
    ours, theirs = pair()
    with torch.no_grad():
        exact = logits(copy.deepcopy(theirs).bfloat16().double())[0]
        found, peer = logits(ours.bfloat16())[0], logits(theirs.bfloat16())[0]
    assert found.dtype == torch.bfloat16
    assert_accurate(found, exact, peer)


def test_dropout_drops_what_transformers_drops():
    ours, theirs = pair()
    found = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        found += logits(model)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], logits(ours.eval())[0])


@pytest.mark.parametrize("masked", (None, "left"))
def test_greedy_tokens_are_transformers(masked):
    ours, theirs = pair()
    mask = MASKS.get(masked)
    with record() as choices:
        found = ours.generate(IDS, 30, attention_mask=mask, temperature=0)
    assert torch.equal(found, generated(theirs, 30, mask))
    assert sum(choice.op == "decode_attention" for choice in choices) == 29 * 2
    assert len(found[:, 7:].unique()) > 10 and len(found[:, 7:].unique(dim=0)) == 3


@pytest.mark.parametrize("masked", MASKS)
def test_a_padded_row_goes_on_as_it_does_alone(masked):
    ours, _ = pair()
    found = ours.generate(IDS, 20, attention_mask=MASKS[masked], temperature=0)
    again = ours.generate(IDS.masked_fill(~MASKS[masked], 3), 20, attention_mask=MASKS[masked], temperature=0)
    assert torch.equal(found[:, :7], IDS) and torch.equal(found[:, 7:], again[:, 7:])
    for row, mask, tokens in zip(IDS, MASKS[masked], found, strict=True):
        assert torch.equal(ours.generate(row[mask][None], 20, temperature=0)[0, -20:], tokens[7:])


def test_every_step_is_the_forward_of_the_text_so_far():
    ours, _ = pair()
    found = ours.generate(IDS, 12, temperature=0)
    assert torch.equal(ours(found)[:, 6:-1].argmax(-1), found[:, 7:])


@pytest.mark.parametrize("masked", (None, "left"))
@pytest.mark.parametrize("how", ({}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.9, "temperature": 0.6}))
def test_draws_are_transformers(how, masked):
    ours, theirs = pair()
    torch.manual_seed(3)
    found = ours.generate(IDS, 20, attention_mask=MASKS.get(masked), **how)
    torch.manual_seed(3)
    wanted = generated(theirs, 20, MASKS.get(masked), do_sample=True, **{"top_k": 0, **how})
    assert torch.equal(found, wanted)
    own = [ours.generate(IDS, 20, generator=torch.Generator().manual_seed(seed), **how) for seed in (1, 1, 2)]
    assert torch.equal(own[0], own[1]) and not torch.equal(own[0], own[2])


@pytest.mark.parametrize("temperature", (1.0, 0.3, 2.5))
@pytest.mark.parametrize("top_k", (None, 1, 7, 500))
@pytest.mark.parametrize("top_p", (None, 1e-9, 0.5, 0.95, 1.0))
def test_restrictions_are_transformers_processors(temperature, top_k, top_p):
    for scores in (3 * randn(4, 50), torch.zeros(1, 4)):  # of four equal tokens, two reach a half to the bit
        wanted = transformers.TemperatureLogitsWarper(temperature)(None, scores)
        if top_k is not None:
            wanted = transformers.TopKLogitsWarper(top_k)(None, wanted)
        if top_p is not None:
            wanted = transformers.TopPLogitsWarper(top_p)(None, wanted)
        assert torch.equal(restricted(scores, temperature, top_k, top_p), wanted)


@pytest.mark.parametrize("vocabulary", (14400, 14433, 20))
@pytest.mark.parametrize("rows", (0, 1, 2, 4, 5))
def test_a_head_in_blocks(vocabulary, rows, monkeypatch):
    counted = []
    monkeypatch.setattr(language, "in_blocks", lambda x, weight: counted.append(x) or in_blocks(x, weight))
    hidden = -(-4_000_000 // vocabulary)
    head, x = randomise(language.Head(hidden, vocabulary)), randn(rows, hidden)
    with torch.no_grad():
        found, peer = head(x), linear(x, head.weight)
        assert_accurate(found, linear(x.double(), head.weight.double()), peer, terms=hidden)
        assert len(counted) == (0 < rows <= 4)
        assert head(x[:, None]).shape == (rows, 1, vocabulary)
        with torch.autocast("cpu", torch.bfloat16):
            assert head(x).dtype == torch.bfloat16
    assert head(x).requires_grad and head.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert len(counted) == (0 < rows <= 4)


def test_texts_end():
    ours, theirs = pair()
    plain = ours.generate(IDS, 30, temperature=0)
    last = [10, 16, 14]  # where the three texts end
    ends = [row[place].item() for row, place in zip(plain, last, strict=True)]
    assert not any(token in row[7:place] for token in ends for row, place in zip(plain, last, strict=True))
    wanted = generated(theirs, 30, eos_token_id=ends, pad_token_id=ends[0])
    assert wanted.shape == (3, 17)
    assert torch.equal(ours.generate(IDS, 30, temperature=0, eos_token_id=ends), wanted)
    configured = GPT(ours.config, eos_token_id=ends, pad_token_id=1).eval()
    configured.load_state_dict(ours.state_dict())
    wanted = generated(theirs, 30, eos_token_id=ends, pad_token_id=1)
    assert torch.equal(configured.generate(IDS, 30, temperature=0), wanted) and (wanted[0, 11:] == 1).all()
    assert torch.equal(configured.generate(IDS, 30, temperature=0, eos_token_id=()), plain)
    alone = theirs.generate(IDS[:1], max_new_tokens=30, do_sample=False, eos_token_id=ends[0], pad_token_id=0)
    assert torch.equal(ours.generate(IDS[:1], 30, temperature=0, eos_token_id=ends[0]), alone)


@pytest.mark.parametrize("pad_token_id", (-100, 99))
def test_what_pads_an_ended_text_need_not_be_a_token(pad_token_id):
    ours, _ = pair()
    plain = ours.generate(IDS, 12, temperature=0)
    ends = [plain[0, 10].item(), 1000]
    padded = GPT(ours.config, pad_token_id=pad_token_id).eval()
    padded.load_state_dict(ours.state_dict())
    found, streamed = [], []
    for model, stream in ((ours, None), (padded, streamed.append)):
        found.append(model.generate(IDS, 12, temperature=0, eos_token_id=ends, stream=stream))
    assert torch.equal(found[1] == pad_token_id, found[1] != found[0]) and (found[1][0, 11:] == pad_token_id).all()
    assert torch.equal(torch.stack(streamed, 1), found[1][:, 7:])
    assert torch.equal(found[1][1:], plain[1:])


def test_texts_by_tokenizers():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.decoder = tokenizers.decoders.Fuse()
    letters = tokenizers.trainers.BpeTrainer(initial_alphabet=list(string.ascii_letters), show_progress=False)
    tokenizer.train_from_iterator([], letters)
    tokenizer.enable_padding(direction="left")
    ours, theirs = pair(vocab_size=tokenizer.get_vocab_size())
    batch = tokenizer.encode_batch(["Anna", "Bo"])
    ids, mask = (torch.tensor([getattr(row, what) for row in batch]) for what in ("ids", "attention_mask"))
    streams, told = [tokenizers.decoders.DecodeStream() for _ in batch], ["", ""]

    def tell(tokens):
        for row, token in enumerate(tokens.tolist()):
            told[row] += streams[row].step(tokenizer, token) or ""

    found = ours.generate(ids, 20, attention_mask=mask, temperature=0, stream=tell)
    wanted = theirs.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(found, wanted)
    assert told == tokenizer.decode_batch(found[:, 4:].tolist()) and [len(text) for text in told] == [20, 20]


def test_tokens_are_streamed():
    ours, _ = pair()
    tokens = []
    found = ours.generate(IDS, 9, stream=tokens.append)
    assert torch.equal(torch.stack(tokens, 1), found[:, 7:])


def test_generation_in_training_mode_drops_nothing():
    ours, theirs = pair()
    found = ours.train().generate(IDS.int(), 6, temperature=0)
    assert torch.equal(found, generated(theirs, 6).int()) and found.dtype == torch.int32 and ours.training


@pytest.mark.parametrize("autocast", (False, True))
def test_generation_in_bfloat16(autocast):
    ours, _ = pair()
    ours = ours if autocast else ours.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = ours.generate(IDS, 6, temperature=0)
    scores = ours.float()(found)[:, 6:-1]
    lost = scores.amax(-1) - scores.gather(-1, found[:, 7:, None])[..., 0]
    assert (lost < 0.03 * scores.std()).all()


def test_the_whole_table_is_used_and_sizes_0_and_1():
    ours, _ = pair()
    full = ours.generate(IDS, 34, temperature=0)
    assert full.shape == (3, 41)
    assert torch.equal(ours(full[:, :-1])[:, -1].argmax(-1), full[:, -1])
    assert torch.equal(ours.generate(IDS, 0), IDS)
    assert ours.generate(IDS[:0], 3).shape[0] == 0
    assert ours.generate(IDS[:, :1], 1).shape == (3, 2)
    assert ours(IDS[:0]).shape == (0, 7, 99)


@pytest.mark.parametrize("masked", (None, "left"))
def test_compiles_whole(masked):
    ours, _ = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    mask = MASKS.get(masked)
    torch.testing.assert_close(logits(compiled, mask), logits(ours, mask))


def test_copies_pickles_and_states():
    ours, theirs = pair()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert twin.config == ours.config and twin.lm_head.weight is twin.transformer["wte"].weight
    assert torch.equal(twin(IDS), ours(IDS))
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_initial_weights():
    model = GPT(**SIZES | {"n_embd": 96, "n_layer": 8})
    std = {name: weight.std().item() for name, weight in model.named_parameters()}
    assert std["transformer.wte.weight"] == pytest.approx(0.02, rel=0.1)
    assert std["transformer.h.3.attn.c_attn.weight"] == pytest.approx(0.02, rel=0.1)
    assert std["transformer.h.3.mlp.c_proj.weight"] == pytest.approx(0.005, rel=0.1)
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert (model.transformer["ln_f"].weight == 1).all() and (model.transformer["ln_f"].bias == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    (
        ({"ids": IDS + 98}, r"ids .*between 0 and 98"),
        ({"ids": IDS[:, :0]}, r"ids .*one token.*\(3, 0\)"),
        ({"ids": IDS[0]}, r"ids .*\(batch, length\).*\(7,\)"),
        ({"ids": IDS.repeat(1, 6)}, r"ids .*at most 40.*42"),
        ({"max_new_tokens": 35}, r"max_new_tokens .*at most 34 after 7 tokens.*40.*35"),
        ({"max_new_tokens": -1}, r"max_new_tokens .*0 or more.*-1"),
        ({"temperature": -0.5}, r"temperature .*0 or more.*-0\.5"),
        ({"temperature": float("nan")}, r"temperature .*nan"),
        ({"top_k": 0}, r"top_k .*at least 1.*0"),
        ({"top_p": 0.0}, r"top_p .*\(0, 1\].*0\.0"),
        ({"top_p": 1.5}, r"top_p .*1\.5"),
        ({"attention_mask": torch.ones(3, 6)}, r"attention_mask .*\(3, 7\).*\(3, 6\)"),
        ({"attention_mask": pad(torch.zeros(2, 7), (0, 0, 0, 1), value=1)}, r"attention_mask .*unbroken.*row 0"),
        ({"attention_mask": torch.tensor([[1] * 7, [1, 0, 1, 1, 1, 1, 1], [1] * 7])}, r"attention_mask .*row 1"),
    ),
)
def test_what_generate_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        GPT(**SIZES).generate(**{"ids": IDS, "max_new_tokens": 2, **call})


def test_what_forward_refuses():
    model = GPT(**SIZES)
    with pytest.raises(ValueError, match=r"input_ids .*between 0 and 98.*99"):
        model(IDS * 0 + 99)
    with pytest.raises(ValueError, match=r"input_ids .*at most 40.*42"):
        model(IDS.repeat(1, 6))
    with pytest.raises(ValueError, match=r"position_ids .*between 0 and 39.*"):
        model(IDS, position_ids=IDS * 0 + 40)
    with pytest.raises(ValueError, match=r"attention_mask .*\(3, 7\)"):
        model(IDS, torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"n_head .*divisor of the hidden size 24.*7"):
        GPT(**SIZES | {"n_head": 7})
    with pytest.raises(ValueError, match=r"activation_function .*gelu_new.*swoosh"):
        GPT(activation_function="swoosh")
