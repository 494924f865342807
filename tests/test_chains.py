"""Chains: what is one, where they are found, and what is left alone and named."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_ops
from fused_ops import plans
from fused_ops.core.dispatch import record
from tests.support import assert_accurate, randn


class Block(nn.Module):
    """As residual networks are written: one ReLU used twice, an addition in place, a branch on a constant."""

    def __init__(self, channels=4, shortcut=False):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = (nn.BatchNorm2d(channels) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if shortcut else None
        self.scale = 1.0

    def forward(self, x):
        identity = x
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.shortcut is not None:
            identity = self.shortcut(x)
        y += identity
        return self.relu(y) * self.scale


def of(forward, **children):
    """A module with `forward`, and conv, bn and relu unless it is given others."""
    kind = type("Written", (nn.Module,), {"forward": forward})
    torch.manual_seed(0)
    module = kind()
    for name, child in {"conv": nn.Conv2d(3, 3, 3, padding=1), "bn": nn.BatchNorm2d(3), **children}.items():
        setattr(module, name, child)
    return trained(module)


def trained(module):
    """In evaluation, with running statistics that are not the identity."""
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.running_mean.copy_(randn(bn.num_features, seed=1))
            bn.running_var.copy_(randn(bn.num_features, seed=2).square() + 0.5)
    return module.eval()


def names(module):
    found = plans.plan(module)[0]
    return None if found is None else found.names


def ops_of(module, *inputs):
    with torch.no_grad(), record() as choices:
        value = module(*inputs)
    return value, [choice.op for choice in choices]


def check(module, *inputs):
    """Fused and plain agree, in value and, where gradients are wanted, in those."""
    plain = copy.deepcopy(module)
    report = fused_ops.fuse(module)
    value, ops = ops_of(module, *(t.clone() for t in inputs))
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(*(t.double() for t in inputs))
        assert_accurate(value, exact, plain(*(t.clone() for t in inputs)), terms=64)
    return report, ops


@pytest.mark.parametrize("shortcut", (False, True))
def test_a_residual_block_is_one_op_per_convolution(shortcut):
    module = trained(Block(shortcut=shortcut))
    _, ops = check(module, randn(2, 4, 6, 6))
    assert ops == ["conv_bn_act2d"] * (3 if shortcut else 2)
    wanted = ("conv1+bn1+relu", "conv2+bn2+iadd+relu")
    assert names(module) == wanted + ("shortcut.0+shortcut.1",) * shortcut


@pytest.mark.parametrize(
    "forward, links",
    (
        (lambda self, x: F.relu(self.bn(self.conv(x)), inplace=True), "conv+bn+relu"),
        (lambda self, x: torch.relu_(self.bn(self.conv(x))), "conv+bn+relu_"),
        (lambda self, x: self.bn(self.conv(x)).relu(), "conv+bn+relu"),
        (lambda self, x: x + self.bn(self.conv(x)), "conv+bn+add"),
        (lambda self, x: torch.add(self.conv(x), x), "conv+add"),
        (lambda self, x: self.conv(x).add_(x).sigmoid(), "conv+add_+sigmoid"),
        (lambda self, x: F.gelu(self.conv(x), approximate="tanh"), "conv+gelu"),
        (lambda self, x: F.leaky_relu(self.conv(x)), "conv+leaky_relu"),
        (lambda self, x: F.silu(self.bn(self.conv(x) + 0)), None),
        (lambda self, x: F.leaky_relu(self.conv(x), 0.3), None),
        (lambda self, x: torch.add(self.conv(x), x, alpha=2), None),
        (lambda self, x: self.conv(x) + self.conv(x).square(), "conv+add"),
    ),
)
def test_what_is_a_chain(forward, links):
    module = of(forward)
    assert names(module) == (links and (links,))
    _, ops = check(module, randn(2, 3, 5, 5))
    assert len(ops) >= 1


def _second_reader(self, x):
    y = self.conv(x)
    return self.bn(y) + y


def _branches(self, x):
    return self.bn(self.conv(x)) if x.sum() > 0 else x


def _asks(self, x):
    y = self.conv(x)
    return self.bn(y if isinstance(y, torch.Tensor) else y[0])


def _counts(self, x):
    self.calls = self.calls + 1
    return self.bn(self.conv(x))


def _remembers(self, x):
    self.seen.append(x)
    return self.bn(self.conv(x))


def _prints(self, x):
    _ = f"{x}"
    return self.bn(self.conv(x))


def _only_in_evaluation(self, x):
    return self.conv(x) if self.training else self.bn(self.conv(x))


def _only_in_training(self, x):
    return self.bn(self.conv(x)) if self.training else self.conv(x)


def _where_gradients_are_wanted(self, x):
    return self.bn(self.conv(x)) if torch.is_grad_enabled() else self.conv(x)


def _looks_around(self, x):
    for child in self.children():
        x = child(x)
    return x


def _changes_what_it_reads(self, x):
    y = self.conv(x)
    x.mul_(2)
    return self.bn(y) + x


def _changes_an_alias(self, x):
    y = self.conv(x)
    z = self.doubles(x[:])
    return self.bn(y) + z


def _changes_what_it_views(self, x):
    y = self.conv(x.view_as(x))
    z = self.doubles(x)
    return self.bn(y) + z


class Doubles(nn.Module):
    """Its argument, and says so nowhere."""

    def forward(self, x):
        return x.mul_(2)


@pytest.mark.parametrize(
    "forward, why",
    (
        (_second_reader, "conv: its result has a second reader"),
        (_branches, "branches on a value"),
        (_asks, "asks for the type of a value"),
        (_counts, "sets self.calls"),
        (_remembers, "reads self.seen, a list"),
        (_prints, "prints a value"),
        (_only_in_evaluation, "conv+bn: only in evaluation"),
        (_only_in_training, "conv+bn: only in training"),
        (lambda self, x: self.conv(x), "bn: its forward does not call it"),
        (_where_gradients_are_wanted, "something else where gradients are wanted"),
        (_looks_around, "calls self.children"),
        (_changes_what_it_reads, "mul_ may change a value it reads"),
        (_changes_an_alias, "doubles may change a value it reads"),
        (_changes_what_it_views, "doubles may change a value it reads"),
    ),
)
def test_what_is_left_alone_is_named(forward, why):
    module = of(forward, doubles=Doubles())
    module.calls, module.seen = 0, []
    before = dict(vars(module))
    report = fused_ops.fuse(module)
    row = next(row for row in report if row.fqn == "")
    assert row.new is None and why in row.reason and why in str(report)
    assert type(module).__name__ == "Written" and vars(module) == before and not module.seen
    x = randn(1, 3, 5, 5)
    plain = fused_ops.unfuse(copy.deepcopy(module))
    torch.testing.assert_close(module(x.clone()), plain(x.clone()))


def test_an_argument_that_may_lie_where_another_does():
    def forward(self, x, y):
        z = self.conv(x)
        y = self.doubles(y)
        return self.bn(z) + y

    module, x = of(forward, doubles=Doubles()), randn(1, 3, 5, 5)
    plain, y = copy.deepcopy(module), x.clone()
    fused_ops.fuse(module)
    with torch.no_grad():
        torch.testing.assert_close(module(x, x), plain(y, y))


def test_an_addition_into_something_else_stays_one():
    def forward(self, x):
        x += self.bn(self.conv(x))
        return x * 1

    module, x = of(forward), randn(1, 3, 5, 5)
    plain, y = copy.deepcopy(module), x.clone()
    fused_ops.fuse(module)
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain(y))
    assert torch.equal(x, y)


@pytest.mark.parametrize("residual", ((3, 1, 1), (2, 3, 5, 5), (4, 1, 3, 5, 5), (1, 3, 1, 5), ()))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_sum_of_another_shape_or_type_is_torchs(residual, dtype):
    module = of(lambda self, x, y: F.relu(self.bn(self.conv(x)) + y))
    assert names(module) == ("conv+bn+add+relu",)
    x, y = randn(2, 3, 5, 5), randn(*residual, dtype=dtype, seed=3)
    plain = copy.deepcopy(module)
    fused_ops.fuse(module)
    with torch.no_grad():
        torch.testing.assert_close(module(x, y), plain(x, y))


def sequential():
    return trained(nn.Sequential(OrderedDict(
        pad=nn.ZeroPad2d(1), stem=nn.Conv2d(3, 8, 1, bias=False), norm=nn.BatchNorm2d(8), act=nn.ReLU6(inplace=True),
        pool=nn.MaxPool2d(2), depthwise=nn.Conv2d(8, 8, 3, 1, 1, groups=8), last=nn.BatchNorm2d(8), flat=nn.Flatten(),
    )))  # fmt: skip


def test_sequentials():
    module = sequential()
    check(module, randn(2, 3, 10, 10))
    assert names(module) == ("stem+norm+act", "depthwise+last")
    part = module[1:4].eval()
    assert type(part) is type(module) and ops_of(part, randn(2, 3, 10, 10))[1] == ["conv_bn_act2d"]
    conv = nn.Conv2d(3, 4, 1)
    for left_alone in (
        [conv],
        [nn.Conv2d(3, 4, 1, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)],
        [conv, nn.BatchNorm2d(4, track_running_stats=False)],
        [conv, nn.SyncBatchNorm(4)],
        [conv, nn.LeakyReLU(0.2)],
        [nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)],
    ):
        assert names(nn.Sequential(*left_alone).eval()) is None


def test_padding_is_left_alone_where_the_chain_cannot_take_it():
    dense, norm, depthwise = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6)
    pad, negative = nn.ZeroPad2d((0, 1, 0, 1)), nn.ZeroPad2d(-1)
    assert names(nn.Sequential(pad, dense, norm)) == ("1+2",)
    assert names(nn.Sequential(pad, depthwise, nn.ReLU())) == ("1+2",)
    assert names(nn.Sequential(pad, depthwise, norm)) == ("0+1+2",)
    assert names(nn.Sequential(negative, depthwise, norm)) == ("1+2",)
    check(trained(nn.Sequential(pad, depthwise, norm)), randn(1, 6, 5, 5))
    pad.register_forward_hook(lambda *_: None)
    assert names(nn.Sequential(pad, depthwise, norm)) == ("1+2",)


def test_a_chain_belongs_to_the_smallest_module_that_has_it():
    class Inverted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU6()), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            )

        def forward(self, x):
            return x + self.body(x)

    module = trained(nn.Sequential(OrderedDict(first=Inverted(), second=nn.Sequential(Inverted()))))
    report, ops = check(module, randn(1, 4, 5, 5))
    assert ops == ["conv_bn_act2d"] * 4
    inside = {row.fqn: row.reason for row in report if row.fqn.startswith("first")}
    assert inside == {
        "first": "body.0.0+body.0.1+body.0.2, body.1+body.2+add",
        "first.body": "0.0+0.1+0.2, 1+2",
        "first.body.0": "0+1+2",
    }
    assert not [row for row in report if row.fqn in ("", "second")]


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def encode(self, x):
        return self.bn(self.conv(x))


@pytest.mark.parametrize("kind", ("a dictionary", "a method"))
def test_what_has_no_forward_leaves_its_chains_to_who_calls_it(kind):
    if kind == "a method":
        module = of(lambda self, x: self.holder.encode(x), holder=Holder())
    else:
        children = nn.ModuleDict({"conv": nn.Conv2d(3, 3, 3), "bn": nn.BatchNorm2d(3)})
        module = of(lambda self, x: self.holder["bn"](self.holder["conv"](x)), holder=children)
    del module.conv, module.bn
    assert names(module) == ("holder.conv+holder.bn",)
    report, ops = check(module, randn(2, 3, 5, 5))
    assert ops == ["conv_bn_act2d"] and [row.fqn for row in report] == [""]
