"""The Triton 1x1 convolution under TRITON_INTERPRET=1, on the CPU."""

import pytest
import torch
import torch.nn.functional as F

import fused_ops
from fused_ops.core.device import TRITON_INTERPRETED
from tests.conv.oracle import ACTIVATIONS, check, inputs, plain
from tests.support import assert_accurate, error, randn

pytestmark = pytest.mark.skipif(not TRITON_INTERPRETED, reason="runs under TRITON_INTERPRET=1")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 4), (1, 33, 40, 9, 9), (3, 64, 17, 1, 1), (2, 1, 1, 3, 50)], ids=str)
def test_pointwise_at_odd_sizes(shape, dtype, layout):
    batch, channels, out_channels, height, width = shape
    a = inputs(batch, channels, out_channels, (height, width), (1, 1), dtype=dtype,
               residual=(batch, out_channels, height, width))  # fmt: skip
    x = a["input"].to(memory_format=layout)
    call = (x, a["weight"], a["bias"], 1, 0, 1, 1, a["scale"], a["shift"], a["residual"], "relu")
    got = fused_ops.conv2d(**{**a, "input": x}, activation="relu", backend="triton")
    exact = plain(F.conv2d, *(t.double() if isinstance(t, torch.Tensor) else t for t in call))
    assert_accurate(got, exact, plain(F.conv2d, *call), terms=channels)
    assert got.stride() == F.conv2d(x, a["weight"]).stride()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_every_gradient(activation):
    a = inputs(2, 5, 6, (3, 4), (1, 1), requires_grad=True, residual=(2, 6, 1, 4))

    def fused(x, w, b, s, t, r):
        return fused_ops.conv2d(x, w, b, scale=s, shift=t, residual=r, activation=activation, backend="triton")

    def eager(x, w, b, s, t, r):
        return plain(F.conv2d, x, w, b, 1, 0, 1, 1, s, t, r, activation)

    check(fused, eager, list(a.values())[:2] + [a[k] for k in ("bias", "scale", "shift", "residual")], terms=40)
    x = randn(1, 1, 1, 3)
    x[..., 1:] = torch.tensor([float("nan"), -200.0])
    got = fused_ops.conv2d(x, torch.ones(1, 1, 1, 1), activation=activation, backend="triton").flatten()
    want = _value(activation, x.flatten())
    assert torch.equal(got.isnan(), want.isnan())
    assert_accurate(got[[0, 2]], want[[0, 2]].double(), ulps=16)


def _value(activation, x):
    return fused_ops.conv2d(
        x.view(1, 1, 1, -1), torch.ones(1, 1, 1, 1), activation=activation, backend="reference"
    ).flatten()


def test_second_derivative_and_opcheck():
    a = inputs(1, 3, 2, (2, 3), (1, 1), requires_grad=True)

    def first(x):
        y = fused_ops.conv2d(x, a["weight"], scale=a["scale"], activation="tanh", backend="triton")
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0]

    got = torch.autograd.grad(first(a["input"]).sum(), a["input"])[0]
    y = plain(
        F.conv2d, a["input"].double(), a["weight"].double(), None, 1, 0, 1, 1, a["scale"].double(), None, None, "tanh"
    )
    grad = torch.autograd.grad(y.sum(), a["input"], create_graph=True)[0]
    assert_accurate(got, torch.autograd.grad(grad.sum(), a["input"])[0].double(), factor=3, terms=16)
    call = (a["input"].detach(), a["weight"].detach(), None, None, None, (1, 1), (0, 0), (1, 1), 1, 1)
    torch.library.opcheck(torch.ops.fused_ops.conv2d_triton.default, call)


def test_what_it_cannot_serve_is_said():
    a = inputs()
    for bad in (a, {**inputs(kernel=(1, 1)), "stride": 2}):
        with pytest.raises(fused_ops.BackendUnavailable, match="1x1 convolutions of stride 1"):
            fused_ops.conv2d(**bad, backend="triton")


def test_the_comparison_rejects_a_wrong_kernel():
    """A mutant: the kernel given the weights of the wrong channel order."""
    x, w = randn(2, 9, 3, 5), randn(4, 9, 1, 1)
    got = fused_ops.conv2d(x, w.flip(1), backend="triton")
    exact = F.conv2d(x.double(), w.double())
    assert error(got, exact) > 1e-2
    with pytest.raises(AssertionError):
        assert_accurate(got, exact, F.conv2d(x, w), terms=9)
