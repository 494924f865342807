"""fuse(): what it swaps, what it leaves alone, and that everything about the model stays as it was."""

import copy
import io

import pytest
import torch
from torch import nn

import fused_ops
from tests.support import randn


class Tagger(nn.Module):
    """A model as users write them: a convolution chain, a lone convolution, an RNN, a cell, attention."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.lone = nn.Conv1d(8, 8, 3, padding=1)
        self.rnn = nn.GRU(8, 16, batch_first=True)
        self.cell = nn.LSTMCell(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        features = self.lone(self.stem(x).mean(2)).transpose(1, 2)
        states, _ = self.rnn(features)
        mixed, _ = self.attention(states, states, states, need_weights=False)
        return self.head(self.cell(mixed[:, -1])[0])


@pytest.fixture
def model():
    model = Tagger()
    model(randn(4, 3, 8, 8))  # running statistics that are not the identity
    return model.eval()


def _clone(model):
    return copy.deepcopy(model), randn(2, 3, 8, 8, seed=5)


def test_every_known_type_is_swapped_and_reported(model):
    report = fused_ops.fuse(model)
    changed = {row.fqn: row.new for row in report if row.new}
    nn_ = fused_ops.nn
    assert {name: changed[name] for name in ("lone", "rnn", "cell", "attention")} == {
        "lone": nn_.Conv1d,
        "rnn": nn_.GRU,
        "cell": nn_.LSTMCell,
        "attention": nn_.MultiheadAttention,
    }
    assert "stem" in changed and not any(name.startswith("stem.") for name in changed)
    assert all(row.backend for row in report) and "stem" in str(report)


def test_the_numbers_stay(model):
    plain, x = _clone(model)
    fused_ops.fuse(model)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-6)


def test_training_gives_the_same_gradients(model):
    plain, x = _clone(model)
    fused_ops.fuse(model)
    model.train(), plain.train()
    model(x).square().sum().backward(), plain(x).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    for ours, theirs in zip(model.buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs)


def test_eval_follows_an_optimizer_step(model):
    plain, x = _clone(model)
    fused_ops.fuse(model)
    model(x)
    for module in (model, plain):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module.train()(x).square().sum().backward()
        optimizer.step()
        module.eval()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("write", ["data", "numpy", "copy_"])
def test_eval_follows_writes_that_bump_no_version(model, write):
    plain, x = _clone(model)
    fused_ops.fuse(model)
    with torch.no_grad():
        model(x)
        for module in (model, plain):
            for weight in (module.stem[0].weight, module.rnn.weight_hh_l0, module.stem[1].running_mean):
                if write == "data":
                    weight.data.mul_(1.5)
                elif write == "numpy":
                    weight.detach().numpy()[...] *= 1.5
                else:
                    weight.copy_(weight * 1.5)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-6)


def test_unfuse_restores_it(model):
    plain, x = _clone(model)
    before = [(name, type(module), dict(vars(module))) for name, module in model.named_modules()]
    fused_ops.fuse(model)
    with torch.no_grad():
        model(x)
    assert fused_ops.unfuse(model) is model
    for (name, kind, attributes), (_, module) in zip(before, model.named_modules()):
        assert type(module) is kind and vars(module).keys() == attributes.keys(), name
    assert torch.equal(model(x), plain(x))


def test_state_dict_deepcopy_and_pickle(model):
    plain, x = _clone(model)
    fused_ops.fuse(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(copy.deepcopy(model)(x), wanted)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), wanted)


def test_hooks_added_before_and_after_still_run(model):
    seen = []
    model.stem[1].register_forward_hook(lambda *_: seen.append("inside a chain"))
    fused_ops.fuse(model)
    model.rnn.register_forward_hook(lambda *_: seen.append("rnn"))
    model.stem.register_forward_pre_hook(lambda *_: seen.append("stem"))
    with torch.no_grad():
        model(randn(2, 3, 8, 8))
    assert set(seen) == {"inside a chain", "rnn", "stem"}


def test_filter_and_subclasses_are_left_alone():
    class Mine(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Mine(3, 3, 1), nn.Conv2d(3, 3, 1))
    report = fused_ops.fuse(model, lambda module, fqn: fqn != "2")
    assert type(model[2]) is nn.Conv2d and type(model[1]) is Mine
    assert [(row.fqn, row.new) for row in report] == [("1", None)]


def test_a_parametrized_module_is_left_alone():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)))
    (row,) = fused_ops.fuse(model)
    assert row.new is None and "Conv2d" in row.reason


def test_fusing_twice_changes_nothing_more(model):
    fused_ops.fuse(model)
    kinds = [type(module) for module in model.modules()]
    assert not [row for row in fused_ops.fuse(model) if row.new]
    assert kinds == [type(module) for module in model.modules()]


def test_a_bad_model_is_named():
    with pytest.raises(TypeError, match="model must be"):
        fused_ops.fuse(3)
