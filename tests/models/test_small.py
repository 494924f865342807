"""CNN, RNN classifier and attention block: against the same maths in plain torch, and what they refuse."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fused_ops.models import CNN, RNN, Attention
from tests.support import assert_accurate, randn, value_and_gradients


def check(model, plain, *inputs):
    """Values and every gradient, against `plain(model, *inputs)` in float64."""

    def ours(*tensors):
        return torch.func.functional_call(model, dict(zip(names, tensors[len(inputs) :])), tensors[: len(inputs)])

    def theirs(twin):
        def run(*tensors):
            for name, tensor in zip(names, tensors[len(inputs) :]):
                _set(twin, name, tensor)
            return plain(twin, *tensors[: len(inputs)])

        return run

    names = [name for name, _ in model.named_parameters()]
    leaves = [t.detach().requires_grad_() for t in (*inputs, *model.parameters())]
    values, grads = value_and_gradients(ours, leaves)
    peers, peer_grads = value_and_gradients(theirs(copy.deepcopy(model)), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact, exact_grads = value_and_gradients(theirs(copy.deepcopy(model).double()), wide)
    for found, wanted, peer in zip(values, exact, peers, strict=True):
        assert_accurate(found, wanted, peer, terms=1000)
    for found, wanted, peer in zip(grads, exact_grads, peer_grads, strict=True):
        assert_accurate(found, wanted, peer, factor=3.0, terms=1000)


def _set(module, name, tensor):
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    delattr(module, last)
    setattr(module, last, tensor)


def plain_cnn(m, x):
    x = F.max_pool2d(F.relu(F.conv2d(x, m.conv1.weight, m.conv1.bias, padding=1)), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, m.conv2.weight, m.conv2.bias, padding=1)), 2)
    return F.linear(F.relu(F.linear(x.flatten(1), m.fc1.weight, m.fc1.bias)), m.fc2.weight, m.fc2.bias)


def test_cnn():
    torch.manual_seed(0)
    model = CNN()
    assert model.fc1.in_features == 64 * 7 * 7 and model.fc1.out_features == 128 and model.fc2.out_features == 10
    check(model, plain_cnn, randn(3, 3, 28, 28))
    for size in (4, 9, 30):  # a row and a column over are dropped, as max_pool2d does
        check(CNN(size, in_channels=1, num_classes=3), plain_cnn, randn(1, 1, size, size))


@pytest.mark.parametrize("kind", ("lstm", "gru", "rnn"))
def test_rnn(kind):
    torch.manual_seed(0)
    model = RNN(5, 7, 2, 3, kind=kind)

    def plain(m, x):
        params = [getattr(m.rnn, name) for name in m.rnn._flat_weights_names]
        h = x.new_zeros(2, x.size(0), 7)
        op = {"lstm": torch.lstm, "gru": torch.gru, "rnn": torch.rnn_tanh}[kind]
        output = op(x, (h, h) if kind == "lstm" else h, params, True, 2, 0.0, False, False, True)[0]
        return F.linear(output[:, -1], m.fc.weight, m.fc.bias)

    check(model, plain, randn(4, 9, 5))
    lengths, x = torch.tensor([9, 4, 1, 6]), randn(4, 9, 5)
    alone = [model(x[i : i + 1, :length]) for i, length in enumerate(lengths.tolist())]
    torch.testing.assert_close(model(x, lengths), torch.cat(alone))


@pytest.mark.parametrize("concat_input", (False, True))
@pytest.mark.parametrize("masked", ("", "causal", "mask"))
def test_attention(masked, concat_input):
    torch.manual_seed(0)
    model = Attention(12, 5, 3, concat_input=concat_input)
    mask = torch.rand(2, 1, 6, 6) < 0.5
    mask[..., 0] = True
    arguments = {"": {}, "causal": {"is_causal": True}, "mask": {"mask": mask}}[masked]
    seen = {"": torch.ones(6, 6, dtype=torch.bool), "causal": torch.ones(6, 6).tril().bool(), "mask": mask}[masked]

    def plain(m, x):
        q, k, v = (F.linear(x, w.weight, w.bias).view(2, 6, 3, 5).transpose(1, 2) for w in (m.w_q, m.w_k, m.w_v))
        weights = (q @ k.mT / 5**0.5).masked_fill(~seen, float("-inf")).softmax(-1)
        found = (weights @ v).transpose(1, 2).flatten(2)
        return F.linear(torch.cat((found, x), -1) if concat_input else found, m.w_o.weight, m.w_o.bias), weights

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, need_weights=True, **arguments)

    check(Call(), lambda m, x: plain(m.model, x), randn(2, 6, 12))
    assert model(randn(2, 6, 12), **arguments)[1] is None


def test_a_query_that_sees_nothing_is_zero():
    mask = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    mask[..., 1, :] = False
    model = Attention(4, 2, 2, bias=False)
    output, weights = model(randn(1, 2, 4), randn(1, 3, 4), mask, need_weights=True)
    assert (output[0, 1] == 0).all() and (weights[0, :, 1] == 0).all() and (weights[0, :, 0] > 0).all()


def cnn():
    return CNN(8), [randn(2, 3, 8, 8)]


def rnn():
    return RNN(3, 4, 2, 2), [randn(2, 5, 3), torch.tensor([5, 2])]


def attention():
    return Attention(4, 2, 2, concat_input=True), [randn(2, 5, 4), randn(2, 3, 4), None, False, True]


MODELS = pytest.mark.parametrize("build", (cnn, rnn, attention), ids=lambda build: build.__name__)


def outputs(model, inputs):
    found = model(*inputs)
    return (found,) if isinstance(found, torch.Tensor) else found


@MODELS
def test_copies_pickles_states_and_compiles(build):
    model, inputs = build()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict(), strict=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for other in (twin, compiled):
        torch.testing.assert_close(outputs(other, inputs), outputs(model, inputs), atol=1e-5, rtol=1e-5)


@MODELS
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_and_no_rows(build, dtype):
    model, inputs = build()

    def cast(to):
        return [x.to(dtype).to(to) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]

    with torch.no_grad():
        exact = outputs(copy.deepcopy(model).to(dtype).double(), cast(torch.float64))
        for found, wanted in zip(outputs(copy.deepcopy(model).to(dtype), cast(dtype)), exact, strict=True):
            assert found.dtype == dtype
            assert_accurate(found, wanted, terms=100)
        none = [x[:0] if isinstance(x, torch.Tensor) else x for x in inputs]
        assert [x.shape for x in outputs(model, none)] == [(0, *x.shape[1:]) for x in exact]


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda: CNN(3), r"image_size must be at least 4 .*got 3"),
        (lambda: CNN()(randn(2, 3, 32, 32)), r"images must be of shape \(batch, 3, 28, 28\), got \(2, 3, 32, 32\)"),
        (lambda: CNN()(randn(3, 28, 28)), r"images must be of shape \(batch, 3, 28, 28\), got \(3, 28, 28\)"),
        (lambda: CNN()([1.0]), r"images must be a Tensor, got list"),
        (lambda: RNN(3, 4, 1, 2, kind="tree"), r"kind must be one of lstm, gru, rnn, got tree"),
        (lambda: RNN(3, 4, 1, 2)(randn(2, 5, 4)), r"input must be of shape \(batch, time, 3\), got \(2, 5, 4\)"),
        (lambda: RNN(3, 4, 1, 2)(randn(2, 0, 3)), r"input must be of at least one step .*got 0"),
        (lambda: RNN(3, 4, 1, 2)(randn(2, 5, 3), torch.tensor([6, 1])), r"lengths must be between 0 and .*6, 1"),
        (lambda: RNN(3, 4, 1, 2)(randn(2, 5, 3), torch.tensor([5])), r"lengths must be of shape \(2,\).*got \(1,\)"),
        (lambda: Attention(4, 2, 0), r"num_heads must be at least 1, got 0"),
        (lambda: Attention(4, 0, 2), r"d_k must be at least 1, got 0"),
        (lambda: Attention(4, 2, 2)(randn(2, 3, 5)), r"x must be of shape \(batch, length, 4\), got \(2, 3, 5\)"),
        (
            lambda: Attention(4, 2, 2)(randn(2, 3, 4), randn(1, 3, 4)),
            r"context must be of shape \(2, length, 4\), got \(1, 3, 4\)",
        ),
        (
            lambda: Attention(4, 2, 2)(randn(2, 3, 4), mask=torch.ones(3, 2, dtype=torch.bool)),
            r"mask must be broadcastable to \(2, 2, 3, 3\), got shape \(3, 2\)",
        ),
        (
            lambda: Attention(4, 2, 2)(randn(2, 3, 4), mask=torch.ones(3, 3), is_causal=True),
            r"mask must be None when is_causal",
        ),
    ),
)
def test_what_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
