"""Convolution, batch norm and pooling, named and ordered like `torch.nn.functional`, with fused epilogues."""

import torch.nn.functional as F
from torch import Tensor

from fused_ops.conv import arguments, op, reference, rules
from fused_ops.core import verified
from fused_ops.core.dispatch import Backend, Op
from fused_ops.core.errors import EXPLAINED

_POINTWISE = verified.kernel("conv.pointwise.fwd.triton", "conv/triton_kernels.py")
_DEPTHWISE = verified.kernel(
    "conv.depthwise.fwd.cuda", "conv/depthwise.cu", "conv/depthwise.cuh", "conv/epilogue.h", *verified.CUDA_COMMON
)

_CONV1D = Op(
    "conv1d",
    Backend("cpu", op.conv1d_cpu, rules.cpu1d, rules.cpu1d_worthwhile),
    Backend("reference", reference.conv1d),
)
_CONV2D = Op(
    "conv2d",
    Backend("cuda", op.conv2d_cuda, rules.cuda, needs="conv2d_cuda", kernel=_DEPTHWISE),
    Backend("triton", op.conv2d_triton, rules.triton, kernel=_POINTWISE),
    Backend("cpu", op.conv2d_cpu, rules.cpu, rules.cpu_worthwhile),
    Backend("reference", reference.conv2d),
)
_CONV_BN_ACT2D = Op(
    "conv_bn_act2d",
    Backend(
        "cuda",
        op.with_batch_norm(op.conv2d_cuda),
        rules.with_batch_norm(rules.cuda),
        needs="conv2d_cuda",
        kernel=_DEPTHWISE,
    ),
    Backend("triton", op.with_batch_norm(op.conv2d_triton), rules.with_batch_norm(rules.triton), kernel=_POINTWISE),
    Backend("cpu", op.conv_bn_act2d_cpu, rules.cpu_batch_norm, rules.cpu_batch_norm_worthwhile),
    Backend("reference", reference.conv_bn_act2d),
)
_CAUSAL_CONV1D = Op("causal_conv1d", Backend("reference", reference.causal_conv1d))
_BATCH_NORM_ACT = Op("batch_norm_act", Backend("reference", reference.batch_norm_act))
_MAX_POOL2D = Op("max_pool2d", Backend("reference", reference.max_pool2d))


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int] = 1,
    padding: int | tuple[int] | str = 0,
    dilation: int | tuple[int] = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""out = act((weight ⋆ input + bias) · scale + shift + residual): `conv2d` over one dimension of space.

    Args:
        input: (batch, channels, length), or without the batch.
        weight: (out_channels, channels / groups, width).
        stride, padding, dilation: an int or a tuple of one.

    The other arguments, the result (batch, out_channels, out_length) and the errors are those of `conv2d`.
    """
    epilogue = scale is not None or shift is not None or residual is not None or activation is not None
    if not epilogue and _CONV1D.straight(backend, input):
        try:
            return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
        except EXPLAINED:
            pass
    stride, padding, dilation = arguments.convolution(1, input, weight, bias, stride, padding, dilation, groups)
    if epilogue:
        _check_epilogue(input, weight, stride, padding, dilation, scale, shift, residual, activation)
    return _CONV1D(
        backend,
        (input, weight, bias, scale, shift, residual),
        input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation,
    )  # fmt: skip


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""out = act((weight ⋆ input + bias) · scale + shift + residual), ⋆ as in `F.conv2d`.

    Args:
        input: (batch, channels, height, width), or without the batch.
        weight: (out_channels, channels / groups, kernel_height, kernel_width), input's dtype.
        bias: (out_channels,), default none.
        stride, dilation: an int, or one per dimension.
        padding: zeros on both sides, an int or one per dimension; "valid" is 0, "same" keeps the size (stride 1).
        groups: divides channels and out_channels.
        scale, shift: (out_channels,) of any floating dtype, default 1 and 0.
        residual: broadcastable to the result, default 0.
        activation: None, "relu", "relu6", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "hardswish" or "leaky_relu"
            (slope 0.01).
        backend: "cuda", "triton", "cpu", "reference" or "auto"; default as set by `use_backend`.

    Returns:
        (batch, out_channels, out_height, out_width) in the convolution's dtype and memory format.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
        BackendUnavailable: `backend` cannot serve the call.

    Source: an epilogue of scale, shift, residual and activation is what inference makes of batch norm (Ioffe and
    Szegedy 2015, section 3.1) in a residual block (He et al. 2016, section 3).
    """
    epilogue = scale is not None or shift is not None or residual is not None or activation is not None
    if not epilogue and not _may_be_filtered(input, weight) and _CONV2D.straight(backend, input):
        try:
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        except EXPLAINED:
            pass
    stride, padding, dilation = arguments.convolution(2, input, weight, bias, stride, padding, dilation, groups)
    if epilogue:
        _check_epilogue(input, weight, stride, padding, dilation, scale, shift, residual, activation)
    tensors = (input, weight, bias, scale, shift, residual)
    call = (input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation)
    if backend is not None:
        return _CONV2D(backend, tensors, *call)
    affine = scale is None and shift is None
    return _CONV2D.remembered((*_sizes(input, weight), stride, padding, dilation, groups, affine), tensors, *call)


def _may_be_filtered(input: Tensor, weight: Tensor) -> bool:
    """Whether the CPU may have a kernel that beats F.conv2d with nothing to fuse."""
    return (
        type(input) is type(weight) is Tensor
        and input.dim() == weight.dim() == 4
        and weight.size(3) == 3
        and input.numel() * weight.size(0) >= rules.SMALL_3X3
        and op.channels_last(input)
    )


def _sizes(input: Tensor, weight: Tensor) -> tuple:
    return input.shape, input.stride(), input.dtype, weight.shape, weight.stride()


def conv_bn_act2d(
    input, weight, bias, stride, padding, dilation, groups,
    running_mean, running_var, bn_weight, bn_bias, eps, residual, activation,
) -> Tensor:  # fmt: skip
    """act(BN(weight ⋆ input + bias) + residual) with BN in evaluation: what the modules run.

    padding is conv2d's, or one per side: (top, left, bottom, right).
    """
    sides = padding if isinstance(padding, tuple) and len(padding) == 4 else None
    padding = padding if sides is None else (max(sides[::2]), max(sides[1::2]))
    stride, padding, dilation = arguments.convolution(2, input, weight, bias, stride, padding, dilation, groups)
    padding = sides or padding
    if residual is not None:
        arguments.residual(residual, arguments.output_shape(input, weight, stride, padding, dilation))
    return _CONV_BN_ACT2D.remembered(
        (*_sizes(input, weight), stride, padding, dilation, groups),
        (input, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual),
        input, weight, bias, stride, padding, dilation, groups,
        running_mean, running_var, bn_weight, bn_bias, eps, residual, activation,
    )  # fmt: skip


def _check_epilogue(input, weight, stride, padding, dilation, scale, shift, residual, activation) -> None:
    arguments.activation(activation)
    arguments.per_channel("scale", scale, weight.size(0))
    arguments.per_channel("shift", shift, weight.size(0))
    if residual is not None:
        arguments.residual(residual, arguments.output_shape(input, weight, stride, padding, dilation))


def causal_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""out[t] = act(Σₖ weight[k] · x[t + k − width + 1] + bias), each channel by itself, x = 0 before the start.

    Args:
        input: (batch, dim, length), any length.
        weight: (dim, width), any width ≥ 1.
        bias: (dim,), default none.
        activation: as in `conv2d`.
        initial_state: (batch, dim, width − 1), the inputs before the first; default zeros.
        return_final_state: also return the last width − 1 inputs, the initial state included.
        backend: "reference" or "auto"; default as set by `use_backend`.

    Returns:
        (batch, dim, length), and the final state (batch, dim, width − 1) if asked for: the initial state of the next
        piece of the same sequence.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
        BackendUnavailable: `backend` cannot serve the call.

    Source: Gu and Dao 2023 (Mamba), section 3.4.
    """
    arguments.causal(input, weight, bias, initial_state)
    arguments.activation(activation)
    return _CAUSAL_CONV1D(
        backend,
        (input, weight, bias, initial_state),
        input, weight, bias, activation, initial_state, return_final_state,
    )  # fmt: skip


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""out = act((input − mean) / √(var + eps) · weight + bias + residual), per channel, as `F.batch_norm`.

    Args:
        input: (batch, channels, ...).
        running_mean, running_var: (channels,), used as mean and var unless `training`; in training, mean and var are
            the batch's, and these move towards them: running ← (1 − momentum) · running + momentum · batch.
        weight, bias: (channels,), default 1 and 0.
        momentum: in [0, 1].
        eps: ≥ 0.
        residual: broadcastable to input, default 0.
        activation: as in `conv2d`.
        backend: "reference" or "auto"; default as set by `use_backend`.

    Returns:
        input's shape and memory format.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came. Nothing has been written then.
        BackendUnavailable: `backend` cannot serve the call.

    Source: Ioffe and Szegedy 2015, algorithms 1 and 2.
    """
    arguments.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    arguments.activation(activation)
    arguments.residual(residual, input.shape)
    return _BATCH_NORM_ACT(
        backend,
        (input, running_mean, running_var, weight, bias, residual),
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation,
    )  # fmt: skip


def max_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""out[i, j] = max over (k, l) in the kernel of input[i·stride + k·dilation − padding, ...], as `F.max_pool2d`.

    Args:
        input: (batch, channels, height, width), or without the batch.
        stride: default kernel_size.
        padding: of −∞, at most half the kernel.
        ceil_mode: round the result's size up instead of down.
        return_indices: also return the flat position of each maximum within its channel, int64.
        backend: "reference" or "auto"; default as set by `use_backend`.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
        BackendUnavailable: `backend` cannot serve the call.
    """
    pairs = arguments.pooling(input, kernel_size, stride, padding, dilation, ceil_mode)
    return _MAX_POOL2D(backend, (input,), input, *pairs, ceil_mode, return_indices)
