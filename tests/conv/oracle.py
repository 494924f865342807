"""Inputs and comparisons the convolution tests share."""

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ops
from fused_ops.conv import reference
from tests.support import assert_accurate, leaves, randn, value_and_gradients

ACTIVATIONS = [name for name in reference.ACTIVATIONS if name is not None]


def inputs(
    batch=2, channels=6, out_channels=8, space=(9, 7), kernel=(3, 3), groups=1, *, dtype=torch.float32,
    residual=None, requires_grad=False, device="cpu",
) -> dict[str, Tensor | None]:  # fmt: skip
    """input, weight, bias, scale, shift of a convolution; a residual of shape `residual` if given."""
    make = dict(dtype=dtype, requires_grad=requires_grad, device=device)
    scale = randn(out_channels, seed=3, **make).detach().abs().add(0.5).requires_grad_(requires_grad)
    return {
        "input": randn(batch, channels, *space, seed=1, **make),
        "weight": randn(out_channels, channels // groups, *kernel, seed=2, **make),
        "bias": randn(out_channels, seed=5, **make),
        "scale": scale,
        "shift": randn(out_channels, seed=4, **make),
        "residual": None if residual is None else randn(*residual, seed=6, **make),
    }


def plain(f, input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation):
    """The definition, with F's own convolution `f` and nothing of this package."""
    y = f(input, weight, bias, stride, padding, dilation, groups)
    channels = (-1, *(1,) * (weight.dim() - 2))
    y = y if scale is None else y * scale.view(channels)
    y = y if shift is None else y + shift.view(channels)
    y = y if residual is None else y + residual
    return _PLAIN[activation](y)


_PLAIN = {
    None: lambda y: y,
    "relu": lambda y: y.clamp(min=0),
    "relu6": lambda y: y.clamp(0, 6),
    "gelu": lambda y: 0.5 * y * (1 + torch.erf(y / 2**0.5)),
    "gelu_tanh": lambda y: 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))),
    "silu": lambda y: y * torch.sigmoid(y),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": lambda y: y * (y + 3).clamp(0, 6) / 6,
    "leaky_relu": lambda y: torch.where(y < 0, 0.01 * y, y),
}


def check(fn, torch_fn, tensors: list[Tensor | None], terms: int) -> None:
    """Values and gradients of `fn` against `torch_fn` in float64, with `torch_fn` in their dtype as the yardstick."""
    values, gradients = value_and_gradients(fn, leaves(*tensors))
    exact, exact_gradients = value_and_gradients(torch_fn, leaves(*tensors, dtype=torch.float64))
    theirs, their_gradients = value_and_gradients(torch_fn, leaves(*tensors))
    for mine, right, torchs in zip(values, exact, theirs, strict=True):
        assert_accurate(mine, right, torchs, terms=terms)
    for mine, right, torchs in zip(gradients, exact_gradients, their_gradients, strict=True):
        assert_accurate(mine, right, torchs, factor=3, terms=terms * 8)


def check_kernel(backend, a, place, activation, layout, terms: int) -> None:
    """`fused_ops.conv2d` of `inputs` at `place` (stride, padding, dilation, groups) on `backend`."""
    x = a["input"].contiguous(memory_format=layout)
    residual = None if a["residual"] is None else a["residual"].contiguous(memory_format=layout)
    order = (x, a["weight"], a["bias"], *place, a["scale"], a["shift"], residual, activation)
    got = fused_ops.conv2d(*order[:3], *place, scale=a["scale"], shift=a["shift"], residual=residual,
                           activation=activation, backend=backend)  # fmt: skip
    exact = plain(F.conv2d, *(t.cpu().double() if isinstance(t, Tensor) else t for t in order))
    assert_accurate(got, exact, plain(F.conv2d, *order), terms=terms)
    assert got.is_contiguous(memory_format=layout) and got.dtype is x.dtype


def check_depthwise(kernel, space, place, activation, dtype, device) -> None:
    """The CUDA depthwise kernel with everything that may follow the sum."""
    channels = place[-1]
    size = F.conv2d(randn(2, channels, *space), randn(channels, 1, *kernel), None, *place).shape
    a = inputs(2, channels, channels, space, kernel, channels, dtype=dtype, device=device, residual=size)
    check_kernel("cuda", a, place, activation, torch.channels_last, kernel[0] * kernel[1])
