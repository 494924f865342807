"""Convolution, batch norm and pooling in PyTorch: its own op, then the epilogue in eager maths. Twice differentiable.

Shapes: input (batch, channels, *space), weight (out_channels, channels / groups, *kernel); the batch may be absent.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
}
NAMES = tuple(ACTIVATIONS)
CODES = {name: code for code, name in enumerate(NAMES)}  # how kernels are told; 0 is none


IN_PLACE = {
    None: lambda x: x,
    "relu": torch.relu_,
    "relu6": partial(F.relu6, inplace=True),
    "silu": partial(F.silu, inplace=True),
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
    "hardswish": partial(F.hardswish, inplace=True),
    "leaky_relu": partial(F.leaky_relu, inplace=True),
}


def overwritten(y: Tensor, activation: str | None) -> Tensor:
    """act(y), in y's memory where torch can."""
    return (IN_PLACE.get(activation) or ACTIVATIONS[activation])(y)


def epilogue(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, activation: str | None, dims: int
) -> Tensor:
    """act(y·scale + shift + residual) in y's dtype; scale and shift (channels,), ahead of `dims` dimensions of space.

    Half types are computed in float32. y is fresh: without gradients it is overwritten where that saves a pass.
    """
    affine = scale is not None or shift is not None or residual is not None
    if not affine and activation is None:
        return y
    in_place = not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._functorch.get_dynamic_layer_stack_depth()
    )
    dtype = y.dtype
    if affine:
        y = _affine(y, scale, shift, residual, (-1, *(1,) * dims), in_place)
    y = overwritten(y, activation) if in_place else ACTIVATIONS[activation](y)
    return y.to(dtype)


def _affine(y, scale, shift, residual, per_channel: tuple[int, ...], in_place: bool) -> Tensor:
    result = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
    scale = None if scale is None else scale.to(result.dtype).view(per_channel)
    shift = None if shift is None else shift.to(result.dtype).view(per_channel)
    if scale is not None and shift is not None:
        result = torch.addcmul(shift, result, scale)
    elif scale is not None:
        result = result * scale
    elif shift is not None:
        result = result + shift
    if residual is None:
        return result
    residual = residual.to(result.dtype)
    return result.add_(residual) if in_place else result + residual


def conv1d(input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation) -> Tensor:
    y = F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    return epilogue(y, scale, shift, residual, activation, 1)


def conv2d(input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation) -> Tensor:
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return epilogue(y, scale, shift, residual, activation, 2)


def conv_bn_act2d(
    input, weight, bias, stride, padding, dilation, groups,
    running_mean, running_var, bn_weight, bn_bias, eps, residual, activation,
) -> Tensor:  # fmt: skip
    if len(padding) == 4 and padding != "same":
        top, left, bottom, right = padding
        input, padding = F.pad(input, (left, right, top, bottom)), (0, 0)
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps)
    return epilogue(y, None, None, residual, activation, 2)


def causal_conv1d(input, weight, bias, activation, initial_state, return_final_state):
    """input (batch, dim, length), weight (dim, width): y[t] = act(Σₖ weight[k] · x[t + k − width + 1] + bias)."""
    dim, width = weight.shape
    past = input.new_zeros((input.size(0), dim, width - 1)) if initial_state is None else initial_state
    seen = torch.cat([past.to(input.dtype), input], -1)
    if input.numel() == 0:
        y = input * weight.sum(-1)[:, None]
        y = y if bias is None else y + bias[:, None]
    else:
        y = F.conv1d(seen, weight[:, None], bias, groups=dim)
    y = ACTIVATIONS[activation](y)
    return (y, seen[..., input.size(-1) :].contiguous()) if return_final_state else y


def batch_norm_act(
    input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation
) -> Tensor:
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return epilogue(y, None, None, residual, activation, input.dim() - 2)


def max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices):
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
