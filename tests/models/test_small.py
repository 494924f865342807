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
    check(CNN(8, in_channels=1, num_classes=3), plain_cnn, randn(1, 1, 8, 8))


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


@pytest.mark.parametrize("model", (lambda: CNN(8), lambda: RNN(3, 4, 1, 2), lambda: Attention(4, 2, 2)))
def test_copies_pickles_and_states(model):
    model = model()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict(), strict=True)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"image_size .*multiple of 4.* 30"):
        CNN(30)
    with pytest.raises(ValueError, match=r"images .*\(batch, 3, 28, 28\).*\(2, 3, 32, 32\)"):
        CNN()(randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"kind .*lstm, gru, rnn.*tree"):
        RNN(3, 4, 1, 2, kind="tree")
    with pytest.raises(ValueError, match=r"x .*\(batch, length, 4\).*\(2, 3, 5\)"):
        Attention(4, 2, 2)(randn(2, 3, 5))
