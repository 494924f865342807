"""fuse(): what it swaps, what it leaves alone, and that everything about the model stays as it was."""

import abc
import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fused_ops
from tests.support import randn
from tests.test_chains import Block, ops_of, sequential, trained
from tests.test_plans import FAST, agree, fused


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


@pytest.mark.parametrize("make", (Block, sequential))
def test_copies_and_pickles(make):
    module = trained(make())
    x = randn(2, 4 if make is Block else 3, 8, 8)
    plain = copy.deepcopy(module)
    fused_ops.fuse(module)
    value, ops = ops_of(module, x)
    for twin in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        found, again = ops_of(twin, x)
        assert torch.equal(found, value) and again == ops
        fused_ops.unfuse(twin)
        assert type(twin) is type(plain) and vars(twin).keys() == vars(plain).keys()


def test_traced_and_exported_graphs_have_only_torchs_operators():
    module, plain = fused(trained(Block(shortcut=True)))
    x, larger = randn(2, 4, 6, 6), randn(3, 4, 9, 7)
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        scripted = torch.jit.script(module)
        exported = torch.export.export(module, (x,))
        for run in (traced, scripted, exported.module(), torch.fx.symbolic_trace(module)):
            agree(run(x), plain(x))
        agree(traced(larger), plain(larger))
    assert "fused_ops::" not in str(traced.inlined_graph) + str(exported.graph)


def test_nothing_keeps_a_module_alive():
    module, _ = fused(trained(Block()))
    module.to(memory_format=torch.channels_last)
    with torch.no_grad():
        module(randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last))
    alive = weakref.ref(module), weakref.ref(module.conv1.weight)
    gc.disable()
    try:
        del module
        assert alive[0]() is None and alive[1]() is None
    finally:
        gc.enable()


class Reduces(Block):
    def __reduce__(self):
        return Reduces, ()


class KeepsState(Block):
    def __getstate__(self):
        return "mine", self.__dict__.copy()

    def __setstate__(self, state):
        self.__dict__.update(state[1])


class CopiesItself(Block):
    def __deepcopy__(self, memo):
        twin = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin


class Registers(Block):
    known = ()

    def __init_subclass__(cls, *, tag):
        Registers.known += (tag,)


class Abstract(Block, abc.ABC):
    __slots__ = ("extra",)


class Delegates(Block):
    def __getattr__(self, name):
        return 2.0 if name == "gain" else super().__getattr__(name)

    def forward(self, x):
        return super().forward(x) * self.gain


@pytest.mark.parametrize("kind", (Reduces, KeepsState, CopiesItself, Registers, Abstract, Delegates))
def test_classes_with_ways_of_their_own(kind):
    module, plain = fused(trained(kind()))
    x = randn(2, 4, 6, 6)
    value, ops = ops_of(module, x)
    assert ops == FAST and not Registers.known
    if kind is not Reduces:
        agree(value, plain(x).detach())
    for make in (copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m, 1))):
        twin = make(module)
        if kind is not Reduces:
            agree(ops_of(twin, x)[0], value)
    assert type(fused_ops.unfuse(module)) is kind and vars(module).keys() == vars(plain).keys()


def test_unfuse_under_a_parametrization():
    class Half(nn.Module):
        def forward(self, value):
            return value / 2

    class Scaled(Block):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(4, 1, 1))
            self.last = nn.Conv1d(4, 4, 1)

        def forward(self, x):
            return self.last((super().forward(x) * self.gamma).flatten(2))

    module, plain = fused(trained(Scaled()))
    x = randn(2, 4, 6, 6)
    for each in (module, plain):
        parametrize.register_parametrization(each, "gamma", Half())
        parametrize.register_parametrization(each.last, "weight", Half())
    with torch.no_grad():
        agree(module(x), plain(x))
        fused_ops.unfuse(module)
        agree(module(x), plain(x))
        for each in (module, plain):
            parametrize.remove_parametrizations(each, "gamma")
            parametrize.remove_parametrizations(each.last, "weight")
        agree(module(x), plain(x))
    assert type(module) is Scaled and type(module.last) is nn.Conv1d
