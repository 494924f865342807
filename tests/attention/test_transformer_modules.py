"""The Transformer layers are torch.nn's: same parameters, outputs, strides, errors; in every mode, mask and layout."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import fused_ops
from fused_ops.attention import modules
from fused_ops.core.dispatch import record
from tests.support import assert_accurate, leaves, randn, value_and_gradients

CLASSES = (
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerDecoder",
    "Transformer",
)
WIDTH, HEADS, LONG = 8, 2, max(modules._FAST_PATH_LENGTH.values()) + 5
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")


def build(name, package, **options):
    """The module with parameters that depend on their places alone; `package` is torch.nn or fused_ops.nn."""
    options = {"dim_feedforward": 12, "dropout": 0.0, "batch_first": True, **options}
    if name in ("TransformerEncoder", "TransformerDecoder"):
        layer = getattr(nn, f"{name}Layer")(WIDTH, HEADS, **options)
        module = getattr(package, name)(layer, 2, nn.LayerNorm(WIDTH))
    elif name == "Transformer":
        module = package.Transformer(WIDTH, HEADS, 1, 1, **options)
    else:
        module = getattr(package, name)(WIDTH, HEADS, **options)
    for i, tensor in enumerate(module.parameters()):
        tensor.data = randn(*tensor.shape, seed=i) * 0.3
    return module


def inputs(name, length=5, batch_first=True, batched=True):
    def tensor(length, seed):
        shape = (3, length, WIDTH) if batch_first else (length, 3, WIDTH)
        return randn(*(shape if batched else (length, WIDTH)), seed=seed)

    return (tensor(length, 1),) if "Encoder" in name else (tensor(length, 1), tensor(length + 1, 2))


def masks(name, kind, source, target, batched=True):
    """Arguments; `source` and `target` are lengths of the first and the second input."""
    causal = torch.ones(source, source, dtype=torch.bool).triu(1)
    own = {"TransformerEncoder": "", "TransformerEncoderLayer": "src_", "Transformer": "src_"}.get(name, "tgt_")
    padding = torch.zeros(3, source, dtype=torch.bool)
    padding[1:, -2:] = True
    padding = padding if batched else padding[1]
    chosen = {}
    if "causal" in kind:
        chosen |= {
            f"{own}mask": causal,
            f"{own}is_causal" if own == "tgt_" or name == "Transformer" else "is_causal": True,
        }
    if "mask" in kind:
        chosen |= {f"{own}mask": (randn(source, source, seed=4) > 0.5) & ~torch.eye(source, dtype=torch.bool)}
    if "padding" in kind:
        chosen |= {f"{own or 'src_'}key_padding_mask": padding}
    if "memory" in kind and "Encoder" not in name:
        hidden = torch.zeros(3, source if name == "Transformer" else target, dtype=torch.bool)
        hidden[0, -1:] = True
        chosen |= {"memory_key_padding_mask": hidden if batched else hidden[0]}
    return chosen


def check(name, given, arguments, train, **options):
    """Values and every gradient, against torch's in float64."""
    theirs = build(name, nn, **options).train(train)
    ours = build(name, fused_ops.nn, **options).train(train)
    assert ours.load_state_dict(theirs.state_dict(), strict=True) and theirs.load_state_dict(ours.state_dict())

    def run(module):
        parameters = [p.requires_grad_() for p in module.parameters()]
        tensors = leaves(*(t.requires_grad_() for t in given), dtype=parameters[0].dtype)
        return value_and_gradients(lambda *_: module(*tensors, **arguments), [*tensors, *parameters])

    exact, found, peer = run(copy.deepcopy(theirs).double()), run(ours), run(theirs)
    assert found[0][0].stride() == peer[0][0].stride()
    for factor, *triple in (
        (2.0, *(group[0] for group in (found, exact, peer))),
        (3.0, *(group[1] for group in (found, exact, peer))),
    ):
        for value, wanted, torchs in zip(*triple, strict=True):
            assert_accurate(value, wanted, torchs, factor=factor, terms=100)


@pytest.mark.parametrize("kind", ("none", "causal", "padding and memory", "mask and padding"))
@pytest.mark.parametrize("name", CLASSES)
def test_values_and_gradients_are_torchs(name, kind):
    for train, batch_first, norm_first, batched in (
        (True, True, False, True),
        (False, True, True, True),
        (True, False, True, True),
        (False, False, False, False),
    ):
        given = inputs(name, batch_first=batch_first, batched=batched)
        arguments = masks(name, kind, 5, 6, batched)
        options = dict(
            batch_first=batch_first, norm_first=norm_first, bias=train, activation="gelu" if train else "relu"
        )
        check(name, given, arguments, train, **options)


def served(module, *given, **arguments) -> tuple[torch.Tensor, int]:
    """The result, and how often this package's attention ran."""
    with torch.no_grad(), record() as choices:
        result = module(*given, **arguments)
    assert {choice.op for choice in choices} <= {"scaled_dot_product_attention", "varlen_attention"}
    return result, len(choices)


@pytest.mark.parametrize("kind", ("none", "causal", "mask", "padding"))
@pytest.mark.parametrize("norm_first", (False, True), ids=("post", "pre"))
def test_inference_takes_torchs_fast_path_for_short_sequences_only(norm_first, kind):
    name = "TransformerEncoderLayer"
    theirs, ours = (build(name, package, norm_first=norm_first).eval() for package in (nn, fused_ops.nn))
    for length, calls in ((5, 0), (LONG, 1)):
        given, arguments = inputs(name, length), masks(name, kind, length, None)
        wanted, none = served(theirs, *given, **arguments)
        got, count = served(ours, *given, **arguments)
        assert none == 0 and count == calls and got.stride() == wanted.stride()
        assert_accurate(got, copy.deepcopy(theirs).double()(given[0].double(), **arguments), wanted, terms=100)
        with fused_ops.use_backend("reference"):
            bound, count = served(ours, *given, **arguments)
        assert count == 1
        torch.testing.assert_close(bound, wanted, atol=2e-6, rtol=1e-5)


def test_a_causal_hint_without_a_mask_is_torchs():
    theirs, ours = (build("TransformerEncoderLayer", package) for package in (nn, fused_ops.nn))
    for length in (5, LONG):
        x = inputs("TransformerEncoderLayer", length)[0]
        for module in (theirs, ours):
            with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
                module.train()(x, is_causal=True)
            with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
                module.eval()(x, is_causal=True)
        with torch.no_grad():
            got, wanted = (module.eval()(x, is_causal=True) for module in (ours, theirs))
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("length", (6, LONG))
def test_padding_is_skipped_as_torch_skips_it(length):
    theirs, ours = (build("TransformerEncoder", package).eval() for package in (nn, fused_ops.nn))
    x, padding = inputs("TransformerEncoder", length)[0], torch.zeros(3, length, dtype=torch.bool)
    padding[1, 2:], padding[2, -1:] = True, True
    wanted, _ = served(theirs, x, src_key_padding_mask=padding)
    got, count = served(ours, x, src_key_padding_mask=padding)
    assert count == (2 if length == LONG else 0)
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)
    assert torch.equal(got[padding], theirs.norm.bias.expand(int(padding.sum()), -1))


@pytest.mark.parametrize("norm_first", (False, True), ids=("post", "pre"))
@pytest.mark.parametrize("length", (6, LONG))
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors(length, norm_first):
    theirs, ours = (build("TransformerEncoderLayer", p, norm_first=norm_first).eval() for p in (nn, fused_ops.nn))
    with torch.no_grad():
        nested = torch.nested.as_nested_tensor([randn(n, WIDTH, seed=n) for n in (length, 1, 3)])
        got, count = served(ours, nested)
        assert count == (1 if length == LONG else 0)
        with fused_ops.use_backend("reference"):
            bound, count = served(ours, nested)
        assert count == 1
        wanted = theirs(nested)
        for result in (got, bound):
            assert result.is_nested and torch.equal(result._nested_tensor_size(), nested._nested_tensor_size())
            for mine, other in zip(result.unbind(), wanted.unbind(), strict=True):
                torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-5)
        for module in (theirs, ours):
            with pytest.raises(AssertionError, match="MultiheadAttention does not support NestedTensor outside"):
                module.train()(nested)


def test_padding_is_skipped_where_a_row_is_all_padding_and_not_where_somebody_watches():
    stack = build("TransformerEncoder", fused_ops.nn).eval()
    x, padding = inputs("TransformerEncoder", LONG)[0], torch.zeros(3, LONG, dtype=torch.bool)
    padding[0], padding[1, 5:] = True, True
    got, count = served(stack, x, src_key_padding_mask=padding)
    assert count == 2 and got.isfinite().all()
    alone = stack(x[1:2, :5])
    torch.testing.assert_close(got[1:2, :5], alone, atol=2e-6, rtol=1e-5)
    seen = []
    stack.layers[1].self_attn.register_forward_hook(lambda *_: seen.append(1))
    watched, _ = served(stack, x, src_key_padding_mask=padding)
    assert seen == [1]
    torch.testing.assert_close(watched[1:2, :5], alone, atol=2e-6, rtol=1e-5)


def test_torchs_own_module_cases():
    from torch.testing._internal.common_modules import module_db

    count = 0
    for name in CLASSES:
        info = next((info for info in module_db if info.module_cls is getattr(nn, name)), None)
        if info is None:
            assert name == "TransformerDecoder"
            continue
        for train in (True, False):
            for case in info.module_inputs_func(info, "cpu", torch.float32, requires_grad=True, training=train):
                built, given = case.constructor_input, case.forward_input
                theirs = getattr(nn, name)(*built.args, **built.kwargs).train(train)
                ours = getattr(fused_ops.nn, name)(*built.args, **built.kwargs).train(train)
                ours.load_state_dict(theirs.state_dict())
                for fast in (False,) if train else (False, True):
                    with torch.set_grad_enabled(not fast):
                        got, wanted = (module(*given.args, **given.kwargs) for module in (ours, theirs))
                    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5, equal_nan=True)
                    assert got.stride() == wanted.stride()
                    count += 1
    assert count >= 400


@pytest.mark.parametrize("name", CLASSES)
def test_the_constructor_is_torchs(name):
    ours, theirs = getattr(fused_ops.nn, name), getattr(nn, name)
    assert issubclass(ours, theirs) and inspect.signature(ours) == inspect.signature(theirs)
    torch.manual_seed(3)
    options = (WIDTH, HEADS) if "Layer" in name or name == "Transformer" else (nn.TransformerEncoderLayer(8, 2), 2)
    if name == "TransformerDecoder":
        options = (nn.TransformerDecoderLayer(8, 2), 2)
    torch.manual_seed(4)
    mine = ours(*options)
    torch.manual_seed(4)
    for (key, got), (other, wanted) in zip(
        mine.state_dict().items(), theirs(*options).state_dict().items(), strict=True
    ):
        assert key == other and torch.equal(got, wanted)
    for child in mine.modules():
        assert type(child) not in (nn.MultiheadAttention, *(getattr(nn, other) for other in CLASSES))
    if "Layer" in name:
        for bad in (dict(activation="swish"), dict(nhead=3)):
            with pytest.raises((RuntimeError, AssertionError)) as wanted:
                theirs(**{"d_model": 8, "nhead": 2, **bad})
            with pytest.raises(wanted.type) as got:
                ours(**{"d_model": 8, "nhead": 2, **bad})
            assert str(got.value) == str(wanted.value)


def test_other_peoples_layers_stay_what_they_are():
    class Layer(nn.TransformerEncoderLayer):
        pass

    stack = fused_ops.nn.TransformerEncoder(Layer(WIDTH, HEADS), 2)
    assert all(type(layer) is Layer and type(layer.self_attn) is nn.MultiheadAttention for layer in stack.layers)
    custom = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS), 1)
    whole = fused_ops.nn.Transformer(WIDTH, HEADS, 1, 1, custom_encoder=custom)
    assert whole.encoder is custom and type(custom.layers[0]) is nn.TransformerEncoderLayer
    assert type(whole.decoder) is fused_ops.nn.TransformerDecoder
    given = nn.TransformerEncoderLayer(WIDTH, HEADS)
    fused_ops.nn.TransformerEncoder(given, 1)
    assert type(given) is nn.TransformerEncoderLayer and type(given.self_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("length", (5, LONG))
@pytest.mark.parametrize(
    "arguments",
    (
        lambda n: dict(src=randn(3, n, WIDTH + 1)),
        lambda n: dict(src=randn(WIDTH)),
        lambda n: dict(src_mask=torch.ones(n, n, dtype=torch.int32)),
        lambda n: dict(src_mask=torch.ones(n, n + 1, dtype=torch.bool)),
        lambda n: dict(src_key_padding_mask=torch.ones(3, n, dtype=torch.int64)),
        lambda n: dict(src_key_padding_mask=torch.ones(2, n, dtype=torch.bool)),
    ),
)
def test_errors_are_torchs(arguments, length):
    theirs, ours = (build("TransformerEncoderLayer", package) for package in (nn, fused_ops.nn))
    given = {"src": inputs("TransformerEncoderLayer", length)[0], **arguments(length)}
    with pytest.raises(Exception) as wanted:
        theirs(**given)
    with pytest.raises(wanted.type) as got:
        ours(**given)
    assert str(got.value) == str(wanted.value)
    with torch.no_grad(), pytest.raises((RuntimeError, AssertionError, IndexError)):
        ours.eval()(**given)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_swap_a_copy_and_a_pickle(name):
    theirs = build(name, nn).eval()
    given = inputs(name, LONG)
    with torch.no_grad():
        wanted = theirs(*given)
        ours = copy.deepcopy(theirs)
        ours.__class__ = getattr(fused_ops.nn, name)
        for module in (ours, build(name, fused_ops.nn).eval()):
            for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert type(twin) is getattr(fused_ops.nn, name)
                torch.testing.assert_close(twin(*given), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ("TransformerEncoder", "TransformerDecoder"))
def test_compiles_to_one_graph(name):
    ours, theirs = build(name, fused_ops.nn), build(name, nn)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for train, length in ((True, 5), (False, LONG)):
        ours.train(train), theirs.train(train)
        given, arguments = inputs(name, length), masks(name, "mask", length, length + 1)
        with torch.set_grad_enabled(train):
            torch.testing.assert_close(compiled(*given, **arguments), theirs(*given, **arguments), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_dropout_draws_what_torchs_draws(name):
    results = []
    for package in (nn, fused_ops.nn):
        module = build(name, package, dropout=0.4).train()
        torch.manual_seed(5)
        results.append(module(*inputs(name)))
    torch.testing.assert_close(*results, atol=2e-6, rtol=1e-5)
    assert not torch.equal(results[1], module(*inputs(name)))


@pytest.mark.parametrize("name", CLASSES)
def test_half_and_mixed_precision_are_torchs(name):
    theirs, ours = build(name, nn).eval(), build(name, fused_ops.nn).eval()
    for length in (5, LONG):
        given = inputs(name, length)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got, wanted = ours(*given), theirs(*given)
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, atol=3e-2, rtol=3e-2)
        exact = copy.deepcopy(theirs).double()(*(t.bfloat16().double() for t in given))
        half = [copy.deepcopy(module).bfloat16() for module in (ours, theirs)]
        with torch.no_grad():
            got, peer = (module(*(t.bfloat16() for t in given)) for module in half)
        assert got.dtype == torch.bfloat16
        assert_accurate(got, exact, peer, terms=4)


def test_size_0_and_1():
    for name in CLASSES:
        theirs, ours = build(name, nn), build(name, fused_ops.nn)
        for given in ([t[:1, :1] for t in inputs(name)], [t[:0] for t in inputs(name)]):
            got, wanted = ours(*given), theirs(*given)
            torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)
