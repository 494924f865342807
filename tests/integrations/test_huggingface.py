"""`attn_implementation="fused_ops"` against transformers' `eager`, on tiny models of every kind of attention."""

import math

import pytest
import torch

from tests.third_party import transformers  # first: it makes torchvision importable, which transformers wants

# isort: split
from transformers.models.llama.modeling_llama import eager_attention_forward

from fused_ops.core import dispatch
from fused_ops.integrations import huggingface
from tests.support import randn, threads

huggingface.register()

BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
LLAMA = TEXT | SIZES | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
MIXED = LLAMA | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
GPT2 = TEXT | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SMALL = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
WHISPER = TEXT | SMALL | {"decoder_attention_heads": 4, "num_mel_bins": 8, "max_source_positions": 10}
DECODERS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": 6}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", MIXED | {"attn_logit_softcapping": 1.0}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", MIXED),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", MIXED | {"num_local_experts": 2, "num_experts_per_tok": 1}),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Everything here is tiny: a second thread would only be waited for."""
    with threads(1):
        yield


def twins(model: str, config: str, settings: dict, **more):
    """The same model under `eager` and under `fused_ops`."""
    model, config = getattr(transformers, model), getattr(transformers, config)
    made = [model._from_config(config(**settings | more), attn_implementation=n) for n in ("eager", "fused_ops")]
    for name, parameter in made[0].named_parameters():
        if "norm" not in name and "ln_" not in name:  # wide, so that what a query sees decides what comes out
            torch.nn.init.normal_(parameter, std=0.4)
    made[1].load_state_dict(made[0].state_dict())
    assert [m.config._attn_implementation for m in made] == ["eager", "fused_ops"]
    return [m.eval() for m in made]


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 40, (batch, length))


def padding(side: str, batch: int, length: int) -> torch.Tensor:
    """(batch, length) ones; the second row has five zeros on that side."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if side != "none":
        mask[1, :5] = 0
    return mask.flip(1) if side == "right" else mask


def choices(call) -> tuple:
    """(what it returns, the ops and backends that ran)"""
    with dispatch.record() as made:
        result = call()
    return result, {(choice.op, choice.backend) for choice in made}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_of_decoders(name, side):
    eager, fused = twins(*DECODERS[name])
    ids, mask = tokens(2, 12), padding(side, 2, 12)
    with torch.no_grad():
        want, got = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (eager, fused))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_token_for_token(name, side, cache, monkeypatch):
    monkeypatch.setattr(huggingface, "_DECODE_KEYS", {torch.float32: (0, 0)})
    eager, fused = twins(*DECODERS[name])
    inputs = {"input_ids": tokens(2, 12), "attention_mask": padding(side, 2, 12)}
    options = {"do_sample": False, "max_new_tokens": 4, "cache_implementation": cache}
    want = eager.generate(**inputs, **options)
    got, ops = choices(lambda: fused.generate(**inputs, **options))
    assert got.tolist() == want.tolist()
    assert len(set(want[:, 12:].flatten().tolist())) > 2
    # A softcap, padding within sight and a static cache that is a window keep to the mask.
    decoded = name != "gemma2" and (cache == "dynamic" if name == "mistral" else side == "none")
    assert (("decode_attention", "cpu") in ops) == (decoded or (name in ("gemma3", "gpt-oss") and cache == "dynamic"))


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_in_training(name):
    quiet = {"attention_dropout": 0.0} if name != "gpt2" else {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    eager, fused = twins(*DECODERS[name], **quiet)
    ids, mask = tokens(2, 12), padding("right", 2, 12)
    labels = ids.masked_fill(mask == 0, -100)
    for model in (eager, fused):
        model.train()(ids, attention_mask=mask, labels=labels).loss.backward()
    for (path, want), got in zip(eager.named_parameters(), fused.parameters()):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5, msg=lambda text, path=path: path + text)


PACKED = [
    *(
        (name, "position_ids") for name in ("llama", "mistral", "gemma2")
    ),  # of gpt-oss they make no mask, eager's neither
    *((name, "position_ids, cu_seq_lens") for name in ("llama", "mistral", "gpt-oss")),
    *((name, "cu_seq_lens, cache") for name in ("llama", "mistral", "gpt-oss")),  # with a cache, of no model
]


@pytest.mark.parametrize(("name", "given"), PACKED)
def test_packed_sequences_do_not_see_each_other(name, given, monkeypatch):
    monkeypatch.setattr(huggingface, "_PACKED_LENGTH", 0)
    eager, fused = twins(*DECODERS[name])
    sequences = [tokens(1, length) for length in (9, 1, 14)]
    packed = {"input_ids": torch.cat(sequences, 1), "use_cache": "cache" in given}
    packed["position_ids"] = torch.cat([torch.arange(s.size(1)) for s in sequences])[None]
    if "cu_seq_lens" in given:
        ends = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
        packed |= dict(zip(huggingface.PACKING, (ends, ends, 14, 14)))
    with torch.no_grad():
        want = torch.cat([eager(s).logits for s in sequences], 1)
        got, ops = choices(lambda: fused(**packed).logits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert ops == {("varlen_attention", "reference")}


def test_packed_sequences_train(monkeypatch):
    monkeypatch.setattr(huggingface, "_PACKED_LENGTH", 0)
    eager, fused = twins(*DECODERS["gemma2"], attention_dropout=0.0)
    ids, positions = tokens(1, 12), torch.cat([torch.arange(5), torch.arange(7)])[None]
    for model in (eager, fused):
        model.train()(ids, position_ids=positions, use_cache=False).logits.square().mean().backward()
    for want, got in zip(eager.parameters(), fused.parameters()):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-4)


BERT = SIZES | {"vocab_size": 40, "max_position_embeddings": 64}
T5 = TEXT | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
OTHERS = {
    "bert": ("BertModel", "BertConfig", BERT),
    "vit": ("ViTModel", "ViTConfig", SIZES | {"image_size": 16, "patch_size": 4}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER | {"decoder_start_token_id": 1}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
}


def inputs_of(name: str, side: str) -> dict:
    if name == "vit":
        return {"pixel_values": randn(2, 3, 16, 16)}
    if name == "whisper":
        return {"input_features": randn(2, 8, 20), "decoder_input_ids": tokens(2, 7)}
    inputs = {"input_ids": tokens(2, 12), "attention_mask": padding(side, 2, 12)}
    return inputs | ({"decoder_input_ids": tokens(2, 7)} if name == "t5" else {})


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("bert", "none"),
        ("bert", "left"),
        ("bert", "right"),
        ("vit", ""),
        ("whisper", ""),
        ("t5", "none"),
        ("t5", "left"),
    ],
)
def test_encoders_and_cross_attention(name, side):
    if BEFORE_5 and name in ("bert", "t5"):
        pytest.skip("transformers before 5 does not look this model's attention up")
    eager, fused = twins(*OTHERS[name])
    inputs = inputs_of(name, side)
    with torch.no_grad():
        want, (got, ops) = eager(**inputs)[0], choices(lambda: fused(**inputs)[0])
    seen = inputs["attention_mask"].bool() if name == "bert" else torch.ones(want.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-4)
    assert ops == {("scaled_dot_product_attention", "reference")}


@pytest.mark.parametrize("name", ["whisper", "t5"])
def test_generation_of_encoder_decoders(name):
    if BEFORE_5 and name == "t5":
        pytest.skip("transformers before 5 does not look this model's attention up")
    eager, fused = twins(*OTHERS[name])
    inputs = {k: v for k, v in inputs_of(name, "left").items() if k != "decoder_input_ids"}
    want, got = (
        transformers.GenerationMixin.generate(m, **inputs, do_sample=False, max_new_tokens=5) for m in (eager, fused)
    )
    assert got.tolist() == want.tolist()
    assert len(set(want.flatten().tolist())) > 2


class Layer(torch.nn.Module):
    """What a model passes as the calling layer."""

    def __init__(self, groups: int = 1, is_causal: bool = True):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, is_causal


def masks(batch: int, heads: int, rows: int, columns: int) -> dict[str, torch.Tensor | None]:
    seen = torch.rand(batch, 1, rows, columns) > 0.4
    seen[..., 0] = True
    return {
        "none": None,
        "bool": seen,
        "float": randn(batch, 1, rows, columns),
        "heads": randn(1, heads, rows, columns),
    }


@pytest.mark.parametrize("mask", ["none", "bool", "float", "heads"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rows", [1, 5])
def test_attention_of_one_layer(rows, kv_heads, mask):
    """Values narrower than keys, grouped heads, masks of every kind, one query and several."""
    query, key, value = randn(2, 4, rows, 8), randn(2, kv_heads, 5, 8, seed=1), randn(2, kv_heads, 5, 6, seed=2)
    mask = masks(2, 4, rows, 5)[mask]
    layer = Layer(4 // kv_heads)
    got, weights = huggingface.attention(layer, query, key, value, mask, scaling=0.3)
    if mask is None or mask.dtype == torch.bool:
        seen = torch.ones(1, 1, rows, 5, dtype=torch.bool).tril(5 - rows) if mask is None else mask
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    want, _ = eager_attention_forward(layer.eval(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(got, want)
    assert weights is None and got.is_contiguous() and got.shape == (2, rows, 4, 6)


@pytest.mark.parametrize("flaw", ["none", "sees across", "sees ahead", "misses one", "too wide a window"])
def test_a_mask_is_packed_only_if_it_shows_nothing_else(flaw, monkeypatch):
    monkeypatch.setattr(huggingface, "_PACKED_LENGTH", 0)
    sequence = torch.tensor([0] * 5 + [1] * 6)
    seen = (sequence[:, None] == sequence) & torch.ones(11, 11, dtype=torch.bool).tril()
    window = {"sliding_window": 3} if flaw == "too wide a window" else {}
    for name, row, column in (("sees across", 8, 1), ("sees ahead", 6, 7), ("misses one", 9, 6)):
        if name == flaw:
            seen[row, column] = ~seen[row, column]
    q, k, v = (randn(1, 2, 11, 8, seed=i) for i in range(3))
    (got, _), ops = choices(lambda: huggingface.attention(Layer(), q, k, v, seen[None, None], scaling=0.3, **window))
    mask = torch.zeros(1, 1, 11, 11).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(got, eager_attention_forward(Layer().eval(), q, k, v, mask, scaling=0.3)[0])
    assert (("varlen_attention", "reference") in ops) == (flaw == "none")


@pytest.mark.parametrize("seen", [[1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1]], ids=str)
def test_a_decode_step_reads_a_static_cache_as_far_as_it_is_filled(seen, monkeypatch):
    monkeypatch.setattr(huggingface, "_DECODE_KEYS", {torch.float32: (0, 0)})
    seen = torch.tensor([[1, 0, 0, 0, 0], seen]).bool()
    q, k, v = randn(2, 4, 1, 8), randn(2, 2, 5, 8, seed=1), randn(2, 2, 5, 8, seed=2)
    (got, _), ops = choices(lambda: huggingface.attention(Layer(2), q, k, v, seen[:, None, None], scaling=0.3))
    mask = torch.zeros(2, 1, 1, 5).masked_fill(~seen[:, None, None], -torch.inf)
    torch.testing.assert_close(got, eager_attention_forward(Layer(2).eval(), q, k, v, mask, scaling=0.3)[0])
    prefix = seen[1].tolist() in ([True] * 3 + [False] * 2, [True] * 5)
    assert ops == {("decode_attention", "cpu") if prefix else ("scaled_dot_product_attention", "reference")}


@pytest.mark.parametrize("extra", ["plain", "softcap", "s_aux", "packed"])
@pytest.mark.parametrize("rows", [1, 6])
def test_dropout_drops_and_rescales_weights(rows, extra):
    query, key, value = randn(1, 2, rows, 8), randn(1, 2, 6, 8, seed=1), torch.eye(6).expand(1, 2, 6, 6)
    ends = torch.tensor([0, 6], dtype=torch.int32)
    given = {
        "plain": {},
        "softcap": {"softcap": 2.0},
        "s_aux": {"s_aux": randn(2)},
        "packed": dict(zip(huggingface.PACKING, (torch.tensor([0, rows], dtype=torch.int32), ends, rows, 6))),
    }[extra]
    weights, dropped = (
        huggingface.attention(Layer(is_causal=False), query, key, value, None, dropout=p, **given)[0] for p in (0, 0.5)
    )
    kept = dropped != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped[kept], 2 * weights[kept])


def made_mask(rows: int, columns: int, **described):
    """`make_mask` called as this version's models call it: `columns` keys, the last of them the last query's own."""
    old = {"cache_position": torch.arange(columns - rows, columns)}
    new = {"q_length": rows, "q_offset": columns - rows, "device": "cpu"}
    config = transformers.LlamaConfig(**described.pop("config", {}))
    return huggingface.make_mask(
        batch_size=1, kv_length=columns, config=config, **(old if BEFORE_5 else new), **described
    )


@pytest.mark.parametrize(
    ("rows", "columns", "window", "config", "needed"),
    [
        (5, 5, None, {}, False),
        (1, 5, None, {}, False),
        (3, 5, None, {}, True),
        (5, 5, 6, {}, False),
        (5, 5, 3, {}, True),
        (1, 5, 5, {}, False),
        (1, 5, 4, {}, True),
        (1, 5, 5, {"attention_chunk_size": 5}, True),
    ],
    ids=[
        "causal",
        "decode",
        "prefill in chunks",
        "wide window",
        "window",
        "decode, full window",
        "decode, less",
        "chunk",
    ],
)
def test_a_mask_is_made_only_where_is_causal_does_not_say_it_all(rows, columns, window, config, needed):
    overlay = transformers.masking_utils.sliding_window_causal_mask_function(window or columns)
    mask = made_mask(rows, columns, local_size=window, mask_function=overlay, config=config)
    assert (mask is not None) == needed
    if needed:
        distance = torch.arange(columns - rows, columns)[:, None] - torch.arange(columns)
        assert torch.equal(mask[0, 0], (distance >= 0) & (distance < (window or columns)))


def test_padding_needs_a_mask():
    assert made_mask(5, 5, attention_mask=padding("none", 1, 5).bool()) is None
    assert made_mask(5, 5, attention_mask=torch.tensor([[False, True, True, True, True]])) is not None


def test_attention_weights_are_refused_as_sdpa_refuses_them(caplog):
    _, fused = twins(*DECODERS["llama"])
    with pytest.raises(ValueError, match="Please set it to 'eager' instead"):
        fused.config.output_attentions = True
    q = randn(1, 2, 3, 8)
    expected, _ = huggingface.attention(Layer(), q, q, q, None)
    huggingface._logger.warning_once.cache_clear()
    huggingface._logger.addHandler(caplog.handler)
    try:
        got, weights = huggingface.attention(Layer(), q, q, q, None, head_mask=torch.zeros(2), output_attentions=True)
    finally:
        huggingface._logger.removeHandler(caplog.handler)
    assert weights is None and torch.equal(got, expected)
    assert "Please set your attention to `eager`" in caplog.text


def test_register_adds_one_entry_to_each_registry_and_nothing_twice():
    registries = transformers.AttentionInterface, transformers.AttentionMaskInterface
    before = [dict(registry._global_mapping) for registry in registries]
    huggingface.register()
    assert [dict(registry._global_mapping) for registry in registries] == before
    assert [mapping["fused_ops"] for mapping in before] == [huggingface.attention, huggingface.make_mask]


def test_scaling_defaults_to_the_root_of_the_head_dim():
    q = randn(1, 2, 3, 8)
    got, want = (huggingface.attention(Layer(), q, q, q, None, scaling=s)[0] for s in (None, 1 / math.sqrt(8)))
    torch.testing.assert_close(got, want)
