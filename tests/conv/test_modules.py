"""Conv1d, Conv2d, BatchNormAct2d, ConvBNAct2d, CausalConv1d and chains of them in a Sequential."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import fused_ops
from fused_ops.conv import modules
from fused_ops.core.dispatch import record
from tests.support import assert_accurate, randn

CONVOLUTIONS = {
    "plain": (6, 8, 3),
    "strided": (6, 8, 3, 2, 1),
    "same": (6, 8, 4, 1, "same"),
    "depthwise": (6, 6, 5, 2, 2, 1, 6, False),
    "reflect": (6, 8, 3, 1, 1, 1, 1, True, "reflect"),
    "circular-same": (6, 8, 3, 1, "same", 2, 2, True, "circular"),
    "replicate": (6, 8, 3, 2, 2, 1, 2, False, "replicate"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dims", [1, 2])
def test_a_convolution_is_its_torch_twin(name, dims):
    call, x = CONVOLUTIONS[name], randn(2, 6, *(11, 9)[:dims])
    twin, mine = (getattr(place, f"Conv{dims}d")(*call) for place in (nn, modules))
    mine.load_state_dict(twin.state_dict())
    twin.load_state_dict(mine.state_dict())
    assert isinstance(mine, type(twin)) and repr(mine) == repr(twin)
    got, want = mine(x), twin(x)
    assert torch.equal(got, want) and got.stride() == want.stride()
    got.sin().sum().backward(), want.sin().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine.parameters(), twin.parameters()))
    with pytest.raises(RuntimeError) as theirs:
        twin(x[:, :5])
    with pytest.raises(RuntimeError) as ours:
        mine(x[:, :5])
    assert str(theirs.value).rpartition("] ")[2] in str(ours.value)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_batch_norm_act_counts_and_normalises_as_batch_norm(options):
    mine, twin = modules.BatchNormAct2d(3, **options, activation="silu"), nn.BatchNorm2d(3, **options)
    mine.load_state_dict(twin.state_dict())
    for step in range(4):
        if step == 3:
            mine.eval(), twin.eval()
        x, residual = randn(4, 3, 5, 5, seed=step), randn(4, 3, 5, 5, seed=step + 9)
        assert torch.equal(mine(x, residual), nn.functional.silu(twin(x) + residual))
    for key, value in twin.state_dict().items():
        assert torch.equal(mine.state_dict()[key], value)
    with pytest.raises(ValueError, match="expected 4D input"):
        mine(randn(2, 3))


def test_batch_norm_act_counts_nothing_when_it_raises():
    mine = modules.BatchNormAct2d(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        mine(randn(1, 3, 1, 1))
    assert mine.num_batches_tracked == 0 and torch.equal(mine.running_mean, torch.zeros(3))


def trained(module: nn.Module, x) -> nn.Module:
    """With running statistics that are neither 0 nor 1."""
    for step in range(3):
        module(x + step)
    return module


@pytest.mark.parametrize("groups", [1, 6])
def test_conv_bn_act_is_its_three_modules(groups):
    x = randn(3, 6, 9, 8)
    mine = trained(modules.ConvBNAct2d(6, 6, 3, 2, 1, groups=groups, activation="relu6"), x)
    plain = nn.Sequential(OrderedDict(conv=nn.Conv2d(6, 6, 3, 2, 1, groups=groups, bias=False), bn=nn.BatchNorm2d(6)))
    assert mine.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(mine.state_dict())
    residual = randn(*plain(x).shape)
    plain.load_state_dict(mine.state_dict())

    def eager(x, residual):
        y = plain(x)
        return nn.functional.relu6(y if residual is None else y + residual)

    for training in (True, False):
        mine.train(training), plain.train(training)
        for other in (None, residual):
            assert_accurate(mine(x, other), eager(x, other).double(), terms=54)
            with torch.no_grad():
                assert_accurate(mine(x, other), eager(x, other).double(), terms=54)
        assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), plain.state_dict().values()))
    mine(x, residual).sum().backward()
    assert all(p.grad is not None for p in mine.parameters())


def test_conv_bn_act_hooks_fire_and_replaced_children_run():
    x, seen = randn(2, 3, 6, 6), []
    mine = trained(modules.ConvBNAct2d(3, 4, 3), x).eval()
    want = mine(x)
    handle = mine.conv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert_accurate(mine(x), want.double(), terms=27)
    assert seen == [(2, 4, 4, 4)]
    handle.remove()
    mine.bn = nn.Identity()
    assert_accurate(mine(x), mine.conv(x).relu().double())


def test_causal_conv1d_module():
    mine = modules.CausalConv1d(5, 4, activation="silu")
    twin = nn.Conv1d(5, 5, 4, padding=3, groups=5)
    assert mine.weight.shape == (5, 4) and list(mine.state_dict()) == ["weight", "bias"]
    mine.load_state_dict({"weight": twin.weight[:, 0], "bias": twin.bias})
    x = randn(2, 5, 9)
    assert_accurate(mine(x), nn.functional.silu(twin(x)[..., :9]).double(), terms=4)
    y, state = mine(x[..., :4], return_final_state=True)
    assert_accurate(torch.cat([y, mine(x[..., 4:], state)], -1), mine(x).double(), terms=4)
    assert modules.CausalConv1d(5, 4, bias=False).bias is None


def network() -> nn.Sequential:
    """Two chains, and other children before, between and after them."""
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(
        pad=nn.ZeroPad2d(1), stem=nn.Conv2d(3, 8, 1, bias=False), norm=nn.BatchNorm2d(8), act=nn.ReLU6(inplace=True),
        pool=nn.MaxPool2d(2), depthwise=nn.Conv2d(8, 8, 3, 1, 1, groups=8), last=nn.BatchNorm2d(8), flat=nn.Flatten(),
    ))  # fmt: skip


def swapped(module: nn.Sequential) -> nn.Sequential:
    fused_ops.fuse(module)
    return module


def test_a_swapped_sequential_runs_its_children_whenever_it_must():
    x = randn(2, 3, 10, 10)
    plain = trained(network(), x)
    mine = swapped(copy.deepcopy(plain))

    def fused(x) -> int:
        with record() as choices:
            mine(x)
        return len(choices)

    assert fused(x) == 0  # training
    plain(x)
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), plain.state_dict().values()))
    mine.eval(), plain.eval()
    assert fused(x) == 0  # the parameters want gradients
    mine(x).sum().backward()
    assert all(p.grad is not None for p in mine.parameters())
    with torch.no_grad():
        assert fused(x) == 2
        seen = []
        handle = mine.norm.register_forward_hook(lambda *call: seen.append(1))
        assert fused(x) == 1 and seen == [1]
        handle.remove()
        mine.norm.train()
        assert fused(x) == 0  # a norm left in training normalises with the batch
        mine.norm.eval()
        mine.act = nn.Hardtanh(-1, 1)
        plain.act = nn.Hardtanh(-1, 1)
        mine.norm.load_state_dict(plain.norm.state_dict())
        assert_accurate(mine(x), plain(x).double(), terms=72)
        mine.norm = nn.Identity()
        plain.norm = nn.Identity()
        assert_accurate(mine(x), plain(x).double(), terms=72)


@pytest.mark.parametrize("write", ["data", "numpy", "fused-sgd", "buffers"])
def test_no_write_to_parameters_or_statistics_is_missed(write):
    x = randn(2, 3, 10, 10)
    plain = trained(network(), x).eval()
    mine = swapped(copy.deepcopy(plain))
    with torch.no_grad():
        mine(x)
    for model in (plain, mine):
        if write == "data":
            model.stem.weight.data.mul_(1.5)
        elif write == "numpy":
            model.stem.weight.detach().numpy()[:] *= 1.5
        elif write == "fused-sgd":
            optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
            model(x).sum().backward()
            optimizer.step()
        else:
            model.norm.running_var.data.mul_(2)
    with torch.no_grad():
        assert_accurate(mine(x), plain(x).double(), terms=72)


def test_explain_names_the_backend_of_a_chain():
    mine = swapped(trained(network(), randn(2, 3, 10, 10))).eval()
    with torch.no_grad():
        assert fused_ops.explain(mine, randn(2, 3, 10, 10)).op == "conv_bn_act2d"


@pytest.mark.parametrize("sides", [(0, 1, 0, 1), (1, 2, 1, 2), (3, 0, 0, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_depthwise_chain_takes_the_padding_ahead_of_it(stride, sides):
    conv = nn.Conv2d(6, 6, 3, stride, groups=6, bias=False)
    plain = nn.Sequential(nn.ZeroPad2d(sides), conv, nn.BatchNorm2d(6), nn.ReLU6())
    plain(randn(4, 6, 11, 14))
    fused = copy.deepcopy(plain.eval())
    fused_ops.fuse(fused)
    x = randn(2, 6, 11, 14, seed=3)
    with torch.no_grad(), record() as choices:
        value = fused(x)
    assert_accurate(value, copy.deepcopy(plain).double()(x.double()), plain(x), terms=9)
    assert [choice.op for choice in choices] == ["conv_bn_act2d"]
    with torch.no_grad(), fused_ops.use_backend("reference"):
        torch.testing.assert_close(fused(x), value)
    wide = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(fused(wide), value)
