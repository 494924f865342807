"""convert(): what becomes what, around the same tensors, with the same numbers, and what is left alone."""

import copy
import io
import types
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

import fused_ops
from tests.support import assert_accurate, randn, value_and_gradients


class Block(nn.Module):
    """A residual block as users write it: branches in nn.Sequential, the sum in forward."""

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, groups=2, bias=False),
            nn.BatchNorm2d(out_channels, eps=1e-3, momentum=None),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x):
        return torch.relu(self.branch(x) + self.shortcut(x))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 12, 2, bidirectional=True, proj_size=4, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        output, (h, c) = self.rnn(x)
        return self.head(output), h, c


def conv_stack() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2),
        nn.BatchNorm2d(8, affine=False), nn.GELU("tanh"), nn.Conv2d(8, 6, 3, 2, 1), nn.LeakyReLU(),
        nn.Flatten(), nn.Linear(54, 4),
    )  # fmt: skip


def transformer() -> nn.Transformer:
    return nn.Transformer(16, 4, 2, 2, 24, dropout=0.0, activation="gelu", batch_first=True)


MODELS = {
    "conv stack": (conv_stack, [(4, 3, 12, 12)]),
    "residual": (lambda: nn.Sequential(Block(4, 6, 1), Block(6, 8, 2)), [(4, 4, 9, 9)]),
    "bidirectional LSTM": (Tagger, [(3, 7, 5)]),
    "Transformer": (transformer, [(2, 6, 16), (2, 5, 16)]),
}
MODULES = {
    "RNN": lambda: nn.RNN(3, 4, 2, nonlinearity="relu", batch_first=True),
    "GRU": lambda: nn.GRU(3, 4, bias=False, bidirectional=True),
    "LSTM": lambda: nn.LSTM(3, 4, 2, dropout=0.5, proj_size=2),
    "RNNCell": lambda: nn.RNNCell(3, 4, nonlinearity="relu"),
    "GRUCell": lambda: nn.GRUCell(3, 4, bias=False),
    "LSTMCell": lambda: nn.LSTMCell(3, 4),
    "MultiheadAttention": lambda: nn.MultiheadAttention(8, 2, bias=False, kdim=3, add_bias_kv=True),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(8, 2, 12, activation=nn.Mish(), norm_first=True),
    "TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(8, 2, 12, 0.3, "gelu", 1e-3, True, bias=False),
    "TransformerEncoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 1), 3, nn.LayerNorm(8)),
    "TransformerDecoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2), 2),
    "Transformer": lambda: nn.Transformer(8, 2, 1, 2, 12),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3, 2, 1, 2, 2, bias=False),
    "Conv2d": lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect"),
}


def trained(name: str) -> nn.Module:
    """With running statistics that are neither 0 nor 1."""
    make, shapes = MODELS[name]
    model = make()
    model(*(randn(*shape, seed=9) for shape in shapes))
    return model


def outcome(model: nn.Module, inputs: list) -> tuple[list, list]:
    return value_and_gradients(lambda *_: model(*inputs), [*inputs, *model.parameters()])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_statistics_are_those_of_torch(name, training):
    plain = trained(name).train(training)
    exact, mine = copy.deepcopy(plain).double(), fused_ops.convert(copy.deepcopy(plain))
    inputs = [randn(*shape, requires_grad=True) for shape in MODELS[name][1]]
    ours, theirs = outcome(mine, inputs), outcome(plain, inputs)
    truth = outcome(exact, [x.detach().double().requires_grad_() for x in inputs])
    for factor, kind in (2.0, 0), (3.0, 1):
        for value, exact_value, torch_value in zip(ours[kind], truth[kind], theirs[kind], strict=True):
            assert_accurate(value, exact_value, torch_value, factor=factor, terms=64)
    for ours, theirs in zip(mine.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", MODULES)
def test_a_twin_is_constructed_around_the_same_tensors(name):
    module = MODULES[name]().eval().requires_grad_(False)
    reference, random = copy.deepcopy(module), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = fused_ops.convert(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert mine is not module and type(mine) is getattr(fused_ops.nn, name) and repr(mine) == repr(reference)
    for (key, ours), (name_, theirs) in zip(mine.named_parameters(), module.named_parameters(), strict=True):
        assert key == name_ and ours is theirs
    assert not any(part.training for part in mine.modules())
    known = {getattr(nn, kind) for kind in MODULES}
    assert not known & {type(part) for part in mine.modules()}
    assert list(mine.state_dict()) == list(reference.state_dict())
    mine.load_state_dict(reference.state_dict(), strict=True)
    reference.load_state_dict(mine.state_dict(), strict=True)


def test_a_sequential_keeps_its_length_indices_and_names():
    model = conv_stack()
    before = dict(model.named_parameters())
    assert fused_ops.convert(model) is model
    kinds = [type(child) for child in model]
    assert kinds == [
        fused_ops.nn.ConvBNAct2d, nn.Identity, nn.Identity, nn.MaxPool2d, fused_ops.nn.BatchNormAct2d, nn.Identity,
        fused_ops.nn.Conv2d, nn.LeakyReLU, nn.Flatten, nn.Linear,
    ]  # fmt: skip
    assert [name for name, _ in model.named_children()] == [str(i) for i in range(10)]
    assert (model[0].activation, model[4].activation) == ("silu", "gelu_tanh")
    moved = {"0.weight": "0.conv.weight", "1.weight": "0.bn.weight", "1.bias": "0.bn.bias"}
    after = dict(model.named_parameters())
    assert list(after) == [moved.get(name, name) for name in before]
    assert all(after[moved.get(name, name)] is param for name, param in before.items())


def test_a_block_built_by_hand_has_the_same_state_and_mode():
    model = trained("conv stack")
    model[1].eval(), model[2].eval()
    mine, *emptied = fused_ops.convert(model)[:3]
    by_hand = fused_ops.nn.ConvBNAct2d(3, 8, 3, padding="same", activation="silu")
    by_hand.load_state_dict(mine.state_dict(), strict=True)
    x = randn(2, 3, 6, 6)
    assert repr(mine) == repr(by_hand) and torch.equal(mine(x), by_hand.eval()(x))
    assert [type(part) for part in mine.modules()] == [type(part) for part in by_hand.modules()]
    assert (mine.training, mine.conv.training, mine.bn.training) == (False, True, False)
    assert not any(part.training for part in emptied)


def conv(**changes) -> nn.Conv2d:
    return nn.Conv2d(**({"in_channels": 3, "out_channels": 4, "kernel_size": 3, "bias": False} | changes))


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(print)
    return module


ConvBNAct, BatchNormAct = fused_ops.nn.ConvBNAct2d, fused_ops.nn.BatchNormAct2d
SEQUENCES = {
    "no activation": ([conv(), nn.BatchNorm2d(4)], [ConvBNAct, nn.Identity]),
    "another activation": ([conv(), nn.BatchNorm2d(4), nn.LeakyReLU(0.2)], [ConvBNAct, nn.Identity, nn.LeakyReLU]),
    "activation with a hook": ([conv(), nn.BatchNorm2d(4), hooked(nn.ReLU())], [ConvBNAct, nn.Identity, nn.ReLU]),
    "bias": ([conv(bias=True), nn.BatchNorm2d(4), nn.ReLU()], [fused_ops.nn.Conv2d, BatchNormAct, nn.Identity]),
    "padding mode": ([conv(padding=1, padding_mode="circular"), nn.BatchNorm2d(4)], None),
    "no weights": ([conv(), nn.BatchNorm2d(4, affine=False)], None),
    "no statistics": ([conv(), nn.BatchNorm2d(4, track_running_stats=False)], None),
    "other channels": ([conv(), nn.BatchNorm2d(5)], None),
    "convolution with a hook": ([hooked(conv()), nn.BatchNorm2d(4)], None),
    "batch norm with a hook": ([conv(), hooked(nn.BatchNorm2d(4))], None),
    "activation first": ([conv(), nn.ReLU(), nn.BatchNorm2d(4)], [fused_ops.nn.Conv2d, nn.ReLU, nn.BatchNorm2d]),
    "synchronised": ([conv(), nn.SyncBatchNorm(4)], [fused_ops.nn.Conv2d, nn.SyncBatchNorm]),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_only_what_the_constructors_can_say_is_put_together(name):
    modules, kinds = SEQUENCES[name]
    model = fused_ops.convert(nn.Sequential(*copy.deepcopy(modules)))
    assert [type(child) for child in model] == (kinds or [fused_ops.nn.Conv2d, nn.BatchNorm2d])


def test_a_module_in_two_places_stays_one():
    norm, relu, unit = nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1, bias=False)
    model = nn.ModuleDict({"body": nn.Sequential(unit, norm, relu, nn.Conv2d(3, 3, 1), norm, relu), "again": unit})
    model["tied"] = nn.Conv2d(3, 3, 1, bias=False)
    model["tied"].weight = unit.weight
    fused_ops.convert(model)
    body = model["body"]
    assert type(body[0]) is fused_ops.nn.Conv2d and body[0] is model["again"]
    assert body[1] is body[4] is norm and body[2] is body[5] is relu
    assert model["tied"].weight is body[0].weight is unit.weight


class Mine(nn.Conv2d):
    pass


def with_own_forward(module: nn.Module) -> nn.Module:
    module.forward = types.MethodType(nn.Conv2d.forward, module)
    return module


def with_load_hook(module: nn.Module) -> nn.Module:
    module.register_load_state_dict_pre_hook(print)
    return module


def with_fewer_channels(module: nn.Module) -> nn.Module:
    module.weight = nn.Parameter(module.weight[:, :1])
    return module


def with_stale_groups(module: nn.Module) -> nn.Module:
    module.groups = 2
    return module


def with_compiled_call(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


LEFT_ALONE = {
    "subclass": lambda: Mine(3, 3, 1),
    "parametrized": lambda: parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),
    "spectral norm by hooks": lambda: nn.utils.spectral_norm(nn.Conv2d(3, 3, 1)),
    "pruned": lambda: prune.l1_unstructured(nn.GRU(3, 3), "weight_hh_l0", 0.5),
    "lazy": lambda: nn.LazyConv2d(3, 1),
    "own forward": lambda: with_own_forward(nn.Conv2d(3, 3, 1)),
    "hook bound to the module": lambda: with_load_hook(nn.Conv2d(3, 3, 1)),
    "other weights": lambda: with_fewer_channels(nn.Conv2d(3, 3, 1)),
    "refused settings": lambda: with_stale_groups(nn.Conv2d(3, 3, 1)),
    "compiled call": lambda: with_compiled_call(nn.Conv2d(3, 3, 1)),
    "linear": lambda: nn.Linear(3, 3),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name):
    module = LEFT_ALONE[name]()
    model = nn.ModuleList([module, nn.Sequential(module, nn.ReLU())])
    assert fused_ops.convert(module) is module and fused_ops.convert(model)[0] is module and model[1][0] is module


def test_layers_of_a_stack_that_are_not_torchs_leave_it_alone():
    class Layer(nn.TransformerEncoderLayer):
        pass

    model = fused_ops.convert(nn.TransformerEncoder(Layer(8, 2, batch_first=True), 2))
    assert type(model) is nn.TransformerEncoder and type(model.layers[0]) is Layer
    assert type(model.layers[0].self_attn) is fused_ops.nn.MultiheadAttention


def test_sharded_is_left_alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = nn.Sequential(conv_stack(), nn.GRU(3, 4))
        fully_shard(model)
        kinds = [type(part) for part in model.modules()]
        assert [type(part) for part in fused_ops.convert(model).modules()] == kinds
    finally:
        dist.destroy_process_group()


def test_a_compiled_module_follows_its_wrapper():
    compiled = torch.compile(nn.LSTM(3, 4, 2, dropout=0.5), backend="eager")
    inside = compiled._orig_mod
    assert fused_ops.convert(compiled) is compiled and compiled.eval()._orig_mod is inside and not inside.training


def test_hooks_and_attributes_come_along():
    model, seen = nn.ModuleDict({"rnn": nn.GRU(3, 4)}), []
    old = model["rnn"]
    old.note = "mine"
    handle = old.register_forward_hook(lambda module, *_: seen.append(module))
    before = old.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    new = fused_ops.convert(model)["rnn"]
    new(randn(2, 1, 3), hx=None)
    assert seen == [{"hx": None}, new] and new.note == "mine"
    handle.remove(), before.remove()
    new(randn(2, 1, 3))
    assert len(seen) == 2
    new.weight_hh_l0 = nn.Parameter(torch.zeros(12, 4))
    assert old.weight_hh_l0 is not new.weight_hh_l0 and old._flat_weights[1] is old.weight_hh_l0


@pytest.mark.parametrize("name", MODELS)
def test_converting_twice_changes_nothing_more(name):
    model = fused_ops.convert(trained(name))
    parts = list(model.named_modules())
    assert fused_ops.convert(model) is model and list(model.named_modules()) == parts


@pytest.mark.parametrize("name", MODELS)
def test_copies_pickles_and_checkpoints(name):
    plain = trained(name).eval()
    model = fused_ops.convert(copy.deepcopy(plain))
    inputs = [randn(*shape) for shape in MODELS[name][1]]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    fresh = fused_ops.convert(MODELS[name][0]()).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        for other in copy.deepcopy(model), torch.load(buffer, weights_only=False), fresh:
            for ours, theirs in zip(other(*inputs), model(*inputs), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_an_optimizer_made_before_trains_the_converted_model(name):
    plain = trained(name).train()
    mine, inputs = copy.deepcopy(plain), [randn(*shape) for shape in MODELS[name][1]]
    models = []
    for model, change in (plain, nn.Module.train), (mine, fused_ops.convert):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model = change(model)
        models.append(model)
        for _ in range(2):
            optimizer.zero_grad()
            output = model(*inputs)
            (output if isinstance(output, torch.Tensor) else output[0]).square().mean().backward()
            optimizer.step()
    plain, mine = models
    for ours, theirs in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_fuse_takes_a_converted_model():
    x, model = randn(4, 4, 9, 9), fused_ops.convert(trained("residual")).eval()
    with torch.no_grad():
        want = model(x)
        fused_ops.fuse(model)
        torch.testing.assert_close(model(x), want)
        fused_ops.unfuse(model)
        assert torch.equal(model(x), want)


def test_a_bad_model_is_named():
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got int"):
        fused_ops.convert(3)
