"""Chains of a convolution, and torch's own functions, under torch.compile(backend="fused_ops")."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ops.integrations import dynamo
from tests.integrations.dynamo.models import NEEDS_KERNELS, Block, compiled, rows
from tests.support import randn


@NEEDS_KERNELS
@pytest.mark.parametrize("then", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("activation", "in_place", "called"),
    [(nn.ReLU, True, "relu_"), (nn.ReLU6, True, "hardtanh_"), (nn.SiLU, False, "silu"), (nn.GELU, False, "gelu"),
     (nn.LeakyReLU, False, "leaky_relu")],
)  # fmt: skip
def test_chains_of_a_residual_block(activation, in_place, called, then):
    block, x = nn.Sequential(Block(8, activation, in_place), Block(8, activation, in_place)).eval(), randn(2, 8, 6, 5)
    with torch.no_grad(), dynamo.record() as listings:
        found, wanted = compiled(block, then)(x), block(x)
    assert [(row.pattern, row.became, row.reason) for row in rows(listings)] == [
        (f"conv2d + batch_norm + {called}", "conv_bn_act2d", "runs on cpu"),
        (f"conv2d + batch_norm + add_ + {called}", "conv_bn_act2d", "runs on cpu"),
    ] * 2
    assert [row.place.split(" ")[0] for row in rows(listings)] == ["0.first", "0.second", "1.first", "1.second"]
    torch.testing.assert_close(found, wanted)
    assert found.stride() == wanted.stride()


class Chain(nn.Module):
    """A convolution, a batch norm and what `rest` makes of it."""

    def __init__(self, rest):
        super().__init__()
        self.conv, self.norm, self.rest = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), rest

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self, x)


def capped_lower(self, x):
    return F.hardtanh(self.norm(self.conv(x)), max_val=6.0)


def another_slope(self, x):
    return F.leaky_relu(self.norm(self.conv(x)), 0.2)


def added_to_the_residual(self, x):
    x = x * 1
    x += self.norm(self.conv(x))
    return torch.relu(x)


def residual_written_before_the_activation(self, x):
    r = x * 1
    y = self.norm(self.conv(x)) + r
    r.mul_(2)
    return torch.relu(y) + r


def broadcast_residual(self, x):
    return torch.relu(self.norm(self.conv(x[:1])) + x)


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("rest", "pattern"),
    [
        (capped_lower, "conv2d + batch_norm"),
        (another_slope, "conv2d + batch_norm"),
        (added_to_the_residual, "conv2d + batch_norm"),
        (residual_written_before_the_activation, "conv2d + batch_norm + add"),
        (broadcast_residual, "conv2d + batch_norm"),
    ],
)
def test_a_chain_ends_before_what_it_cannot_take_in(rest, pattern):
    module, x = Chain(rest).eval(), randn(2, 8, 6, 5)
    with torch.no_grad(), dynamo.record() as listings:
        found, wanted = compiled(module)(x), module(x)
    assert [(row.pattern, row.became) for row in rows(listings)] == [(pattern, "conv_bn_act2d")]
    torch.testing.assert_close(found, wanted)


def read_twice(self, x):
    y = self.conv(x)
    return self.norm(y) + y


def written_to_in_between(self, x):
    y = self.conv(x)
    x.mul_(1)
    return self.norm(y)


def in_training(self, x):
    return self.norm.train()(self.conv(x))


def in_half_precision(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.norm(self.conv(x))


def dense(self, x):
    return self.norm(F.conv2d(x, self.conv.weight.expand(8, 8, 3, 3)))


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (read_twice, "result is read elsewhere"),
        (written_to_in_between, "mul_ within it may change"),
        (in_training, "batch norm is in training"),
        (in_half_precision, "autocast changes its dtype"),
        (dense, "has only oneDNN here"),
    ],
)
def test_chains_left_alone(rest, reason):
    module, x = Chain(rest).eval(), randn(2, 8, 6, 5)
    with torch.no_grad(), dynamo.record() as listings:
        found, wanted = compiled(module)(x), module(x)
    chain = next(row for row in rows(listings) if row.pattern.startswith("conv2d + batch_norm"))
    assert chain.became is None and reason in chain.reason, chain
    torch.testing.assert_close(found, wanted)


def test_chains_whose_parameters_need_a_gradient_are_left_alone():
    block, x = Block().eval(), randn(2, 8, 6, 5)
    with dynamo.record() as listings:
        found = compiled(block)(x)
    assert {row.became for row in rows(listings)} == {None}
    assert all("has no gradient" in row.reason for row in rows(listings) if row.pattern.startswith("conv2d +"))
    torch.testing.assert_close(found, block(x))


@NEEDS_KERNELS
@pytest.mark.parametrize("mode", ["rnn_tanh", "gru", "lstm"])
def test_recurrent_functions_with_gradients(mode):
    module = {"rnn_tanh": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[mode](4, 6, 2, bidirectional=True)
    params, zeros = module._flat_weights, torch.zeros(4, 3, 6)

    def call(x, *params):
        hx = (zeros, zeros) if mode == "lstm" else zeros
        return getattr(torch, mode)(x, hx, params, True, 2, 0.0, True, True, False)

    x = randn(5, 3, 4, requires_grad=True)
    with dynamo.record() as listings:
        found, wanted = compiled(call, "aot_eager")(x, *params), call(x, *params)
    assert [(row.pattern, row.became, row.reason) for row in rows(listings)] == [
        (f"torch's {mode}", mode, "runs on cpu")
    ]
    torch.testing.assert_close(found, wanted)
    ours, theirs = (torch.autograd.grad(sum(out.sum() for out in part), [x, *params]) for part in (found, wanted))
    torch.testing.assert_close(ours, theirs)


def test_calls_that_pytorch_serves_are_left_alone():
    cell = nn.GRUCell(4, 6)

    def call(q, x):
        return F.scaled_dot_product_attention(q, q, q), cell(x)

    inputs = (randn(1, 2, 8, 4), randn(3, 4))
    with dynamo.record() as listings:
        found = compiled(call)(*inputs)
    reasons = {row.pattern: row.reason for row in rows(listings) if row.became is None}
    assert "triton" in reasons["torch's scaled_dot_product_attention"] and reasons["torch's gru_cell"]
    torch.testing.assert_close(found, call(*inputs))
