"""Schemas, fake kernels and derivatives of the convolution kernels.

A kernel computes act((weight ⋆ input) · scale + shift + residual), scale and shift float32, residual of the output's
shape; bias is folded into shift here. `activation` is its code in `reference.CODES`.
"""

import torch
from torch import Tensor

from fused_ops.conv import kept, reference
from fused_ops.conv.arguments import output_shape
from fused_ops.core.autograd import reference_gradient, with_reference_gradient
from fused_ops.core.device import TRITON_KEYS
from fused_ops.core.library import define

STATIC = "int[] stride, int[] padding, int[] dilation, int groups, str? activation"
KERNEL = (
    "(Tensor input, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual,"
    " int[] stride, int[] padding, int[] dilation, int groups, int activation{}) -> Tensor"
)
# What the C++ CPU kernels apply themselves; oneDNN's relu and clip turn NaN into 0, the rest of its own do not.
VECTOR_ACTIVATIONS = (None, "relu", "relu6", "hardswish", "leaky_relu")
ONEDNN_ACTIVATIONS = {
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
    "tanh": ("tanh", [], ""),
    "sigmoid": ("sigmoid", [], ""),
    "hardswish": ("hardswish", [], ""),
    "leaky_relu": ("leaky_relu", [0.01], ""),
}


def output_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format F.conv2d gives: channels_last if either argument is."""
    either = channels_last(input) or channels_last(weight)
    return torch.channels_last if either else torch.contiguous_format


def channels_last(tensor: Tensor) -> bool:
    """As c10::is_channels_last_strides_2d: of a tensor that is both, (N, 1, 1, 1) say, the strides decide."""
    shape, strides, least = tensor.shape, tensor.stride(), 0
    if strides[1] == 0:
        return False
    for dim in (1, 3, 2, 0):
        if shape[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * max(shape[dim], 1)
    return True


def _fake(input, weight, scale, shift, residual, stride, padding, dilation, groups, activation, lanes=None):
    size = output_shape(input, weight, stride, padding, dilation)
    layout = output_format(input, weight)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=layout)


def _conv2d_triton(input, weight, scale, shift, residual, stride, padding, dilation, groups, activation):
    from fused_ops.conv import triton_kernels

    return triton_kernels.conv2d_pointwise_fwd(input, weight, scale, shift, residual, activation)


def _conv2d_onednn(input, weight, scale, shift, residual, stride, padding, dilation, groups, activation):
    """scale goes into the weights, shift becomes the bias: one oneDNN call and at most one pass in place after it."""
    name, layout = reference.NAMES[activation], output_format(input, weight)
    if scale is not None:
        weight = torch.mul(weight, scale.view(-1, 1, 1, 1), out=torch.empty_like(weight))
    return _onednn(input, weight, shift, residual, (padding, stride, dilation, groups), name, layout)


def _onednn(input, weight, shift, residual, geometry, name, layout) -> Tensor:
    attribute = ("none", [], "") if residual is not None else ONEDNN_ACTIVATIONS.get(name, ("none", [], ""))
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise(input, weight, shift, *geometry, *attribute)
    else:
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            input, residual, weight, shift, *geometry, "add", 1.0, None, [], None
        )
    if attribute[0] == "none":
        y = reference.overwritten(y, name)
    return y.contiguous(memory_format=layout)


define("conv2d_triton" + KERNEL.format(""), _fake, _conv2d_triton, TRITON_KEYS)
define("conv2d_onednn" + KERNEL.format(""), _fake, _conv2d_onednn, ("CPU",))
define("conv2d_cuda" + KERNEL.format(""), _fake)
define("conv2d_cpu" + KERNEL.format(", int lanes=16"), _fake)


def conv_bn_act2d_onednn(
    input, weight, bias, mean, var, bn_weight, bn_bias, eps, residual, stride, padding, dilation, groups, activation
):
    """The folded weights are kept between calls; residual and activation are oneDNN's, or a pass in place."""
    name, layout = reference.NAMES[activation], output_format(input, weight)
    sources = (mean, var, bn_weight, bn_bias)
    weight, shift = kept.folded(
        input, weight, bias, lambda: folded(*sources, eps), sources, (stride, padding, dilation, groups), eps
    )
    return _onednn(input, weight, shift, residual, (padding, stride, dilation, groups), name, layout)


def _batch_norm_fake(input, weight, bias, mean, var, bn_weight, bn_bias, eps, residual, *static):
    return _fake(input, weight, None, None, residual, *static)


_BATCH_NORM = (
    "(Tensor input, Tensor weight, Tensor? bias, Tensor running_mean, Tensor running_var,"
    " Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor? residual,"
    " int[] stride, int[] padding, int[] dilation, int groups, int activation{}) -> Tensor"
)
define("conv_bn_act2d_cpu" + _BATCH_NORM.format(", int lanes=16"), _batch_norm_fake)
define("conv_bn_act2d_onednn" + _BATCH_NORM.format(""), _batch_norm_fake, conv_bn_act2d_onednn, ("CPU",))


def affine(bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(y + bias) · scale + shift as y · scale' + shift', float32."""
    scale = None if scale is None else scale.float()
    if bias is not None:
        bias = bias.float() if scale is None else bias.float() * scale
        shift = bias if shift is None else bias + shift.float()
    return scale, None if shift is None else shift.float()


def _arguments(input, weight, bias, scale, shift, residual, stride, padding, dilation, groups, activation) -> tuple:
    """A kernel's arguments, laid out as it wants them."""
    scale, shift = affine(bias, scale, shift)
    residual = _full(residual, input, weight, stride, padding, dilation)
    code = reference.CODES[activation]
    return input, weight, scale, shift, residual, stride, padding, dilation, groups, code


def _full(residual, input, weight, stride, padding, dilation) -> Tensor | None:
    """`residual` as a tensor like the output."""
    if residual is None:
        return None
    size = output_shape(input, weight, stride, padding, dilation)
    return residual.to(input.dtype).expand(size).contiguous(memory_format=output_format(input, weight))


def _maths(input, weight, bias, scale, shift, residual, *static) -> tuple[Tensor]:
    stride, padding, dilation, groups, activation = static
    return (
        reference.conv2d(input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation),
    )


_conv2d_bwd = reference_gradient("conv2d_bwd", STATIC, _maths)


def _on_triton(*call):
    return (torch.ops.fused_ops.conv2d_triton(*_arguments(*call)),)


def _on_cuda(*call):
    return (torch.ops.fused_ops.conv2d_cuda(*_arguments(*call)),)


_triton = with_reference_gradient(_on_triton, _conv2d_bwd, _maths)
_cuda = with_reference_gradient(_on_cuda, _conv2d_bwd, _maths)


def conv2d_triton(input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation):
    static = (stride, padding, dilation, groups, activation)
    return _triton((input, weight, bias, scale, shift, residual), static)[0]


def conv2d_cuda(input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation):
    static = (stride, padding, dilation, groups, activation)
    return _cuda((input, weight, bias, scale, shift, residual), static)[0]


def conv2d_cpu(input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation):
    """Without gradients: the C++ kernels, else oneDNN."""
    if not vectorised(input, weight, stride, padding, dilation, groups):
        arguments = _arguments(
            input, weight, bias, scale, shift, residual, stride, padding, dilation, groups, activation
        )
        return torch.ops.fused_ops.conv2d_onednn(*arguments)
    inside = activation if activation in VECTOR_ACTIVATIONS else None
    arguments = _arguments(input, weight, bias, scale, shift, residual, stride, padding, dilation, groups, inside)
    y = torch.ops.fused_ops.conv2d_cpu(*arguments)
    return y if activation == inside else reference.overwritten(y, activation)


def conv_bn_act2d_cpu(
    input, weight, bias, stride, padding, dilation, groups,
    running_mean, running_var, bn_weight, bn_bias, eps, residual, activation,
):  # fmt: skip
    """Without gradients: the C++ kernels, which fold the batch norm themselves, else oneDNN on folded weights."""
    residual = _full(residual, input, weight, stride, padding, dilation)
    call = (input, weight, bias, running_mean, running_var, bn_weight, bn_bias, eps, residual, stride, padding)
    mine = vectorised(input, weight, stride, padding, dilation, groups)
    if not mine or (weight.size(2) == weight.size(3) == 1 and _better_on_onednn(input, weight, residual)):
        # An op written in Python costs as much as a small convolution: only who traces needs to see it.
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing()
        onednn = torch.ops.fused_ops.conv_bn_act2d_onednn if traced else conv_bn_act2d_onednn
        return onednn(*call, dilation, groups, reference.CODES[activation])
    inside = activation if activation in VECTOR_ACTIVATIONS else None
    y = torch.ops.fused_ops.conv_bn_act2d_cpu(*call, dilation, groups, reference.CODES[inside])
    return y if activation == inside else reference.overwritten(y, activation)


def _better_on_onednn(input, weight, residual) -> bool:
    """Whether the C++ kernel for channels_last, which reads weights as they are, loses to oneDNN on kept ones.

    It does where pixels are many (bench/results/cpu/conv_pointwise.json), or more than a cache holds: unless memory
    decides, since it adds and writes an output of that size in one pass.
    """
    if not channels_last(input):
        return False
    pixels, channels, filters = input.size(0) * input.size(2) * input.size(3), input.size(1), weight.size(0)
    if residual is not None and filters >= 4 * channels and pixels * filters >= 1 << 22 and channels <= 64:
        return False
    return pixels > 4096 or pixels * channels > 1 << 20


def conv1d_cpu(input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation):
    """`conv2d_cpu` over an image one row high."""
    residual = None if residual is None else residual.unsqueeze(-2)
    y = conv2d_cpu(
        input.unsqueeze(-2), weight.unsqueeze(-2), bias, (1, *stride), (0, *padding), (1, *dilation), groups,
        scale, shift, residual, activation,
    )  # fmt: skip
    return y.squeeze(-2)


def vectorised(input, weight, stride, padding, dilation, groups) -> bool:
    """Whether the C++ CPU kernels take this: contiguous 1x1 or depthwise, channels_last 1x1, `filtered` or `direct`.

    What is laid out both ways by chance (one channel, one pixel) is contiguous.
    """
    _, channels, height, width = input.shape
    filters, depth, rows, columns = weight.shape
    plane, row, filter = height * width, width * channels, rows * columns
    if groups == 1:
        last = input.stride() == (plane * channels, 1, row, channels) and not plane == channels == 1
        if rows != 1 or columns != 1 or padding != (0, 0):
            place = (stride, padding, dilation)
            return last and (filtered(input, weight, *place) or direct(input, weight, *place))
        if last and weight.is_contiguous():
            return True
        if stride != (1, 1):
            return False
    elif groups != channels or groups != filters:
        return False
    return input.stride() == (channels * plane, plane, width, 1) and weight.stride() == (
        depth * filter, filter, columns, 1
    )  # fmt: skip


def filtered(input, weight, stride, padding, dilation) -> bool:
    """Whether Winograd's minimal filtering takes a channels_last 3x3 convolution: where it is faster than oneDNN.

    It is from a vector of channels up, unless transforming the filters costs more than their use saves
    (bench/results/cpu/conv_filters.json).
    """
    if weight.shape[2:] != (3, 3) or stride != (1, 1) or dilation != (1, 1):
        return False
    filters, channels = weight.shape[:2]
    if min(filters, channels) < 16 or channels > 1024 or not (weight.is_contiguous() or channels_last(weight)):
        return False
    return filters * channels <= 8192 * tiles(input, weight, stride, padding, dilation)


def direct(input, weight, stride, padding, dilation) -> bool:
    """Whether the C++ kernel takes a channels_last convolution of any other kind: where it is faster than oneDNN.

    It is where pixels are few, since it reads weights as they are (bench/results/cpu/conv_filters.json).
    """
    if not channels_last(weight) or (weight.shape[2:] == (3, 3) and stride == dilation == (1, 1)):
        return False
    batch, _, height, width = output_shape(input, weight, stride, padding, dilation)
    return batch * height * width <= (512 if weight.size(1) >= 8 else 4096)


def tiles(input, weight, stride, padding, dilation) -> int:
    """Of 2x2 pixels in the output: as often is a transformed filter used."""
    batch, _, height, width = output_shape(input, weight, stride, padding, dilation)
    return batch * ((height + 1) // 2) * ((width + 1) // 2)


def folded(running_mean, running_var, weight, bias, eps) -> tuple[Tensor, Tensor]:
    """Batch norm in evaluation as (scale, shift), at least float32."""
    compute = torch.promote_types(running_var.dtype, torch.float32)
    scale = torch.rsqrt(running_var.to(compute) + eps)
    scale = scale if weight is None else scale * weight.to(compute)
    bias = scale.new_zeros(()) if bias is None else bias.to(compute)
    return scale, torch.addcmul(bias, running_mean.to(compute), scale, value=-1)


def with_batch_norm(conv2d):
    """A backend's conv2d as its conv_bn_act2d."""

    def run(
        input, weight, bias, stride, padding, dilation, groups,
        running_mean, running_var, bn_weight, bn_bias, eps, residual, activation,
    ):  # fmt: skip
        scale, shift = folded(running_mean, running_var, bn_weight, bn_bias, eps)
        return conv2d(input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation)

    return run
