"""causal_conv1d, batch_norm_act and max_pool2d."""

import pytest
import torch
import torch.nn.functional as F

import fused_ops
from tests.conv.oracle import ACTIVATIONS, check
from tests.support import assert_accurate, noncontiguous, randn


def slow_causal(x, w, b, state):
    """The definition, position by position."""
    width, length = w.size(1), x.size(2)
    past = x.new_zeros(x.size(0), x.size(1), width - 1) if state is None else state
    seen = torch.cat([past, x], 2)
    y = [(seen[:, :, t : t + width] * w).sum(2) for t in range(length)]
    y = torch.stack(y, 2) if y else x.new_zeros(x.shape)
    return (y if b is None else y + b[:, None]), seen[:, :, length:]


@pytest.mark.parametrize("length", [0, 1, 2, 5, 37])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_causal_conv1d_is_its_definition(width, length):
    x = randn(2, 3, length, requires_grad=True)
    w, b = randn(3, width, requires_grad=True), randn(3, requires_grad=True)
    for state in (None, randn(2, 3, width - 1, requires_grad=True)):

        def fused(x, w, b, state):
            return fused_ops.causal_conv1d(x, w, b, activation="silu", initial_state=state, return_final_state=True)

        def eager(x, w, b, state):
            y, last = slow_causal(x, w, b, state)
            return F.silu(y), last

        check(fused, eager, [x, w, b, state], terms=width + 1)
        y, last = fused(x, w, b, state)
        assert y.shape == x.shape and last.shape == (2, 3, width - 1) and last.is_contiguous()


def test_causal_conv1d_in_pieces_is_the_whole():
    x, w = randn(2, 3, 11), randn(3, 4)
    whole, last = fused_ops.causal_conv1d(x, w, return_final_state=True)
    state, pieces = None, []
    for piece in x.split([1, 2, 5, 3], 2):
        y, state = fused_ops.causal_conv1d(piece, w, initial_state=state, return_final_state=True)
        pieces.append(y)
    assert_accurate(torch.cat(pieces, 2), whole.double(), terms=4)
    assert torch.equal(state, last)


def test_causal_conv1d_does_not_see_the_future():
    x, w = randn(1, 2, 9), randn(2, 3)
    changed = x.clone()
    changed[:, :, 5:] = float("nan")
    assert torch.equal(fused_ops.causal_conv1d(x, w)[:, :, :5], fused_ops.causal_conv1d(changed, w)[:, :, :5])


def test_causal_conv1d_layouts_and_second_derivative():
    x, w, b = randn(2, 3, 8), randn(3, 4), randn(3)
    for other in (noncontiguous(x), x.transpose(1, 2).contiguous().transpose(1, 2), x[:1].expand(2, 3, 8)):
        assert_accurate(
            fused_ops.causal_conv1d(other, w, b), slow_causal(other.double(), w.double(), b.double(), None)[0]
        )
    double = [randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 5), (2, 3), (2,), (1, 2, 2))]

    def fn(x, w, b, state):
        return fused_ops.causal_conv1d(x, w, b, activation="silu", initial_state=state, return_final_state=True)

    assert torch.autograd.gradcheck(fn, double, fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, double, fast_mode=True)


@pytest.mark.parametrize(
    ("bad", "argument"),
    [
        (dict(input=randn(3, 8)), "input"),
        (dict(weight=randn(4, 4)), "weight"),
        (dict(weight=randn(3, 0)), "weight"),
        (dict(bias=randn(4)), "bias"),
        (dict(initial_state=randn(2, 3, 4)), "initial_state"),
        (dict(weight=randn(3, 4).double()), "weight"),
        (dict(activation="mish"), "activation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_causal_conv1d_names_bad_arguments(bad, argument):
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        fused_ops.causal_conv1d(**{"input": randn(2, 3, 8), "weight": randn(3, 4), **bad})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 3), (2, 3, 7), (0, 3, 2, 2)], ids=str)
def test_batch_norm_act_is_f_batch_norm_and_moves_the_same_statistics(shape, training):
    x, w, b = randn(*shape, requires_grad=True), randn(3, requires_grad=True), randn(3, requires_grad=True)
    residual = randn(*shape, seed=8, requires_grad=True)
    mine, theirs = ([randn(3), randn(3).abs() + 0.1] for _ in range(2))

    def fused(x, w, b, residual):
        return fused_ops.batch_norm_act(
            x, *(t.to(x.dtype) for t in mine), w, b, training, 0.3, 1e-3, residual=residual, activation="relu"
        )

    def eager(x, w, b, residual):
        y = F.batch_norm(x, *(t.to(x.dtype) for t in theirs), w, b, training, 0.3, 1e-3)
        return F.relu(y + residual)

    check(fused, eager, [x, w, b, residual], terms=60)
    mine, theirs = ([randn(3), randn(3).abs() + 0.1] for _ in range(2))
    fused(x, w, b, residual), eager(x, w, b, residual)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_batch_norm_act_without_statistics_or_affine():
    x = randn(4, 3, 5, 5)
    got = fused_ops.batch_norm_act(x, None, None, training=True, activation="gelu")
    assert_accurate(got, F.gelu(F.batch_norm(x.double(), None, None, training=True)))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_batch_norm_act_twice_differentiable(activation):
    x, w, b, r = (randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 2, 2), (2,), (2,), (3, 2, 2, 2)))

    def fn(x, w, b, r):
        return fused_ops.batch_norm_act(x, None, None, w, b, True, residual=r, activation=activation)

    assert torch.autograd.gradcheck(fn, (x, w, b, r), fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, (x, w, b, r), fast_mode=True)


@pytest.mark.parametrize(
    ("bad", "argument"),
    [
        (dict(input=randn(1, 3, 1, 1)), "input"),
        (dict(running_mean=randn(2)), "running_mean"),
        (dict(running_var=None), "running_var"),
        (dict(weight=randn(4)), "weight"),
        (dict(residual=randn(2, 3, 4, 5)), "residual"),
        (dict(activation="mish"), "activation"),
        (dict(eps=-1.0), "eps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_batch_norm_act_writes_nothing_when_it_raises(bad, argument):
    statistics = [randn(3), randn(3).abs()]
    before = [t.clone() for t in statistics]
    call = {"input": randn(2, 3, 4, 4), "running_mean": statistics[0], "running_var": statistics[1], **bad}
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        fused_ops.batch_norm_act(**call, training=True)
    assert all(torch.equal(a, b) for a, b in zip(statistics, before))


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    "call", [(2,), ((3, 2), 1), (3, 2, 1), (2, None, 1, 2), ((2, 3), (1, 2), (1, 0), (2, 1))], ids=str
)
def test_max_pool2d_is_f_max_pool2d(call, ceil_mode):
    for shape in ((2, 3, 9, 10), (3, 9, 10), (0, 3, 9, 10)):
        x = randn(*shape, requires_grad=True)
        y, where = fused_ops.max_pool2d(x, *call, ceil_mode=ceil_mode, return_indices=True)
        wanted, places = F.max_pool2d(x, *call, ceil_mode=ceil_mode, return_indices=True)
        assert torch.equal(y, wanted) and torch.equal(where, places)
        assert torch.equal(fused_ops.max_pool2d(x, *call, ceil_mode=ceil_mode), wanted)
        got, want = (torch.autograd.grad(t.sin().sum(), x) for t in (y, wanted))
        assert torch.equal(got[0], want[0])


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        ((randn(4, 4), 2), "input"),
        ((randn(1, 2, 4, 4), 0), "kernel_size"),
        ((randn(1, 2, 4, 4), 2, 0), "stride"),
        ((randn(1, 2, 4, 4), 2, None, 2), "padding"),
        ((randn(1, 2, 4, 4), 2, None, 0, 0), "dilation"),
        ((randn(1, 2, 4, 4), (1, 2, 3)), "kernel_size"),
        ((randn(1, 0, 4, 4), 2), "input"),
        ((randn(1, 2, 4, 4), 5), "kernel_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_max_pool2d_names_bad_arguments(call, argument):
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        fused_ops.max_pool2d(*call)
