"""The Transformer against the same written with torch.nn: values, every gradient, padding; and what is refused."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_ops
from fused_ops.core.dispatch import record
from fused_ops.models.transformer import Transformer, sinusoidal_positions
from tests.support import assert_accurate, randn, value_and_gradients

VOCABULARY, WIDTH, CLASSES = 17, 12, 5
KINDS = ("encoder", "encoder-decoder")
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


class Plain(nn.Module):
    """`Transformer` in torch.nn, on padded batches."""

    def __init__(self, kind, heads, feedforward, norm_first, activation="relu"):
        super().__init__()
        norm = nn.LayerNorm(WIDTH) if norm_first else None
        options = dict(dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, heads, feedforward, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
        if kind == "encoder":
            self.fc = nn.Linear(WIDTH, CLASSES)
        else:
            layer = nn.TransformerDecoderLayer(WIDTH, heads, feedforward, **options)
            self.decoder = nn.TransformerDecoder(layer, 2, copy.deepcopy(norm))

    def embedded(self, tokens):
        table = torch.zeros(tokens.size(1), WIDTH, dtype=torch.float64)
        for t in range(tokens.size(1)):
            for i in range(0, WIDTH, 2):
                table[t, i] = math.sin(t / 10000 ** (i / WIDTH))
                table[t, i + 1] = math.cos(t / 10000 ** (i / WIDTH))
        x = self.embedding(tokens)
        return x * math.sqrt(WIDTH) + table.to(x.dtype)

    def forward(self, src, tgt=None, lengths=None):
        hidden = None if lengths is None else torch.arange(src.size(1)) >= lengths[:, None]
        memory = self.encoder(self.embedded(src), src_key_padding_mask=hidden)
        if tgt is None:
            sums = [row[:n].mean(0) for row, n in zip(memory, lengths)] if lengths is not None else memory.mean(1)
            return self.fc(torch.stack(sums) if lengths is not None else sums)
        causal = nn.Transformer.generate_square_subsequent_mask(tgt.size(1), dtype=memory.dtype)
        padding = None if hidden is None else torch.zeros(hidden.shape, dtype=memory.dtype).masked_fill(hidden, -1e30)
        y = self.decoder(self.embedded(tgt), memory, causal, memory_key_padding_mask=padding)
        return F.linear(y, self.embedding.weight)


def pair(kind, norm_first=False, heads=None, **options):
    torch.manual_seed(0)
    classes = CLASSES if kind == "encoder" else None
    ours = Transformer(
        VOCABULARY, WIDTH, 2, classes, kind=kind, norm_first=norm_first, num_heads=heads, dropout=0.0, **options
    )
    theirs = Plain(kind, heads or 4, 4 * WIDTH, norm_first, options.get("activation", "relu"))
    for i, parameter in enumerate(ours.parameters()):
        if parameter.dim() == 1:
            parameter.data = parameter.data + randn(*parameter.shape, seed=i) * 0.2
    assert theirs.load_state_dict(ours.state_dict(), strict=True) and ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tokens(*shape, seed=0):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def arguments(kind, lengths=None):
    tgt = tokens(3, 4, seed=2) if kind == "encoder-decoder" else None
    return {"src": tokens(3, 7), "tgt": tgt, "lengths": None if lengths is None else torch.tensor(lengths)}


def assert_same_maths(theirs, ours, given):
    exact_model = copy.deepcopy(theirs).double()

    def run(model):
        return value_and_gradients(lambda *_: model(**given), list(model.parameters()))

    found, exact, peer = run(ours), run(exact_model), run(theirs)
    assert_accurate(found[0][0], exact[0][0], peer[0][0], terms=100)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for value, wanted, torchs in zip(found[1], exact[1], peer[1], strict=True):
        assert_accurate(value, wanted, torchs, factor=3.0, terms=100)


@pytest.mark.parametrize("lengths", (None, (7, 3, 1), (7, 7, 7)), ids=("whole", "ragged", "full"))
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, lengths):
    for norm_first, heads, activation in ((False, None, "relu"), (True, 3, "gelu")):
        theirs, ours = pair(kind, norm_first, heads, activation=activation)
        given = arguments(kind, lengths)
        for train in (True, False):
            assert_same_maths(theirs.train(train), ours.train(train), given)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_and_half_precision(kind):
    theirs, ours = (model.eval() for model in pair(kind))
    given = arguments(kind, (7, 3, 1))
    exact = copy.deepcopy(theirs).double()(**given)
    with torch.no_grad():
        assert_accurate(ours(**given), exact, theirs(**given), terms=100)
        with fused_ops.use_backend("reference"), record() as choices:
            assert_accurate(ours(**given), exact, theirs(**given), terms=100)
        of_decoder = [] if kind == "encoder" else ["scaled_dot_product_attention"] * 4
        assert [choice.op for choice in choices] == ["varlen_attention"] * 2 + of_decoder
        half = [model.bfloat16()(**given) for model in (ours, theirs)]
    assert half[0].dtype == torch.bfloat16
    assert_accurate(half[0], exact, half[1], terms=4)


@pytest.mark.parametrize("train", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_influence(kind, train):
    ours = pair(kind)[1].train(train)
    given = arguments(kind, (7, 3, 0))
    with torch.set_grad_enabled(train):
        wanted = ours(**given)
        other = {**given, "src": torch.where(torch.arange(7) < given["lengths"][:, None], given["src"], 0)}
        assert not torch.equal(other["src"], given["src"])
        torch.testing.assert_close(ours(**other), wanted)
        alone = {
            "src": given["src"][1:2, :3],
            "tgt": None if given["tgt"] is None else given["tgt"][1:2],
        }
        torch.testing.assert_close(ours(**alone), wanted[1:2], atol=1e-5, rtol=1e-5)
    assert wanted.isfinite().all()
    if train:
        wanted.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())


@pytest.mark.parametrize("grad", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_texts_without_a_token(kind, grad):
    ours = pair(kind)[1].eval()
    given = arguments(kind, (0, 0, 0))
    with torch.set_grad_enabled(grad):
        found = ours(**given)
        assert torch.equal(ours(**given | {"src": tokens(3, 7, seed=9)}), found) and found.isfinite().all()
        if kind == "encoder":
            assert torch.equal(found, ours.fc.bias.expand(3, CLASSES))


def test_a_decoder_sees_no_token_behind():
    ours = pair("encoder-decoder")[1].eval()
    given = arguments("encoder-decoder", (7, 3, 1))
    memory = ours.encode(given["src"], given["lengths"])
    wanted = ours(**given)
    torch.testing.assert_close(ours.decode(given["tgt"], memory, given["lengths"]), wanted)
    for length in (1, 3):
        shorter = ours.decode(given["tgt"][:, :length], memory, given["lengths"])
        torch.testing.assert_close(shorter, wanted[:, :length], atol=1e-5, rtol=1e-5)


def test_positions_are_sinusoids():
    assert sinusoidal_positions(5, 1).shape == (5, 1) and sinusoidal_positions(4, 7).shape == (4, 7)
    table = sinusoidal_positions(600, 8).double()
    for t in (0, 1, 17, 599):
        for i in range(4):
            angle = t / 10000 ** (2 * i / 8)
            assert abs(table[t, 2 * i] - math.sin(angle)) < 1e-6 and abs(table[t, 2 * i + 1] - math.cos(angle)) < 1e-6


def test_initial_weights():
    model = Transformer(500, 32, 2, kind="encoder-decoder")
    assert model.embedding.weight.std().item() == pytest.approx(32**-0.5, rel=0.05)
    for first, second in (model.encoder.layers, model.decoder.layers):
        for layer in (first, second):
            assert layer.linear2.weight.std().item() == pytest.approx((2 / (32 + 128)) ** 0.5, rel=0.1)
        assert not torch.equal(first.linear2.weight, second.linear2.weight)


def test_dropout_is_drawn_in_training_only():
    model = Transformer(VOCABULARY, WIDTH, 1, CLASSES, dropout=0.5)
    src = tokens(2, 5)
    assert not torch.equal(model(src), model(src)) and torch.equal(model.eval()(src), model(src))


def test_copies_pickles_and_compiles():
    ours = pair("encoder-decoder")[1]
    given = arguments("encoder-decoder", (7, 3, 1))
    wanted = ours(**given)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.config == ours.config and torch.equal(twin(**given), wanted)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "given, message",
    (
        (dict(src=tokens(2, 5) + VOCABULARY), r"src must be between 0 and 16, got"),
        (dict(src=tokens(2, 5) - VOCABULARY), r"src must be between 0 and 16, got -"),
        (dict(src=tokens(2, 9)), r"src must be at most 8 tokens long.*position table, got 9"),
        (dict(src=tokens(2, 0)), r"src must be at least one token long, got \(2, 0\)"),
        (dict(src=tokens(5)), r"src must be of shape \(batch, length\), got \(5,\)"),
        (dict(src=torch.rand(2, 5)), r"src must be int32 or int64, got torch.float32"),
        (dict(lengths=torch.tensor([5, 6])), r"lengths must be between 0 and 5, got 6"),
        (dict(lengths=torch.tensor([5, -1])), r"lengths must be between 0 and 5, got -1"),
        (dict(lengths=torch.tensor([5])), r"lengths must be of shape \(2,\), int32 or int64, got \(1,\), torch.int64"),
        (dict(lengths=torch.ones(2)), r"lengths must be of shape \(2,\), int32 or int64, got \(2,\), torch.float32"),
    ),
)
def test_inputs_that_are_refused(given, message):
    for kind in KINDS:
        classes, tgt = (CLASSES, None) if kind == "encoder" else (None, tokens(2, 3))
        model = Transformer(VOCABULARY, WIDTH, 1, classes, kind=kind, max_length=8)
        with pytest.raises(ValueError, match=message):
            model(**{"src": tokens(2, 5), "tgt": tgt, **given})
        with pytest.raises(ValueError, match=r"tgt must be"):
            model(tokens(2, 5), tokens(2, 3) if tgt is None else None)
    with pytest.raises(ValueError, match=r"tgt must be at most 8 tokens long"):
        model(tokens(2, 5), tokens(2, 9))
    with pytest.raises(ValueError, match=r"tgt must be of src's batch size 2, got 3"):
        model(tokens(2, 5), tokens(3, 4))
    with pytest.raises(ValueError, match=rf"memory must be of shape \(batch, length, {WIDTH}\), got \(2, 4, 7\)"):
        model.decode(tokens(2, 4), randn(2, 4, 7))
    with pytest.raises(TypeError, match=r"src must be a Tensor, got list"):
        model([[1, 2]], tokens(1, 2))
    with pytest.raises(TypeError, match=r"lengths must be a Tensor or None, got list"):
        model(tokens(2, 5), tokens(2, 4), [5, 5])


@pytest.mark.parametrize(
    "fields, message",
    (
        (dict(num_heads=5), r"num_heads must be a divisor of the hidden size 12, got 5"),
        (dict(kind="decoder"), r"kind must be one of encoder, encoder-decoder, got decoder"),
        (dict(activation="swish"), r"activation must be one of relu, gelu, got swish"),
        (dict(kind="encoder-decoder"), r"num_classes must be None: a decoder's classes are the vocabulary, got 5"),
        (dict(num_classes=None), r"num_classes must be a number"),
        (dict(num_layers=0), r"num_layers must be at least 1, got 0"),
        (dict(vocab_size=0), r"vocab_size must be at least 1, got 0"),
    ),
)
def test_configurations_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Transformer(
            **{"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": 1, "num_classes": CLASSES, **fields}
        )
