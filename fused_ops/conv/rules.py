"""Which backend can serve a convolution, and where `auto` takes it."""

import torch

from fused_ops.conv import op
from fused_ops.conv.arguments import output_shape
from fused_ops.core import extension

ONEDNN = torch.backends.mkldnn.is_available()
SMALL = 20_000  # elements of a 1x1 convolution's output
SMALL_3X3 = 500_000  # channels of a 3x3 convolution's input times those of its output times pixels
THIN_3X3 = 512  # the first two of these
# Of a chain, what pays for the call of one op instead of three: multiplications in a C++ kernel; output elements, or
# weights, that oneDNN meets laid out.
CHAIN, CHAIN_OUTPUT, CHAIN_WEIGHT = 800_000, 65_536, 262_144
MEASURED, MEASURED_3X3 = "bench/results/cpu/conv_pointwise.json", "bench/results/cpu/conv_filters.json"
MEASURED_CHAINS = "bench/results/cpu/conv_chains.json"
ONLY_ONEDNN = f"has only oneDNN here, which is no faster than F.conv2d ({MEASURED})"


def triton(input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation) -> str | None:
    if input.dim() != 4 or input.numel() == 0:
        return "takes non-empty (batch, channels, height, width)"
    if groups != 1 or weight.shape[2:] != (1, 1) or stride != (1, 1) or padding != (0, 0):
        return "takes 1x1 convolutions of stride 1 without groups or padding"
    if max(input.size(1), weight.size(0), input.size(2) * input.size(3)) >= 1 << 24:
        return "takes fewer than 2^24 channels and pixels an image"  # offsets within a tile have 32 bits
    return _float_type(input)


def cuda(input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation) -> str | None:
    if input.dim() != 4 or input.numel() == 0:
        return "takes non-empty (batch, channels, height, width)"
    if padding == "same" or len(padding) > 2:
        return "takes even padding"
    if groups != input.size(1) or groups != weight.size(0):
        return "takes depthwise convolutions, one filter per channel"
    if not (op.channels_last(input) and input.is_contiguous(memory_format=torch.channels_last)):
        return "takes channels_last"
    return _float_type(input)


def cpu(input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation) -> str | None:
    if input.dtype is not torch.float32:
        return "takes float32"
    if input.dim() != 4 or input.numel() == 0:
        return "takes non-empty (batch, channels, height, width)"
    if padding == "same":
        return "takes even padding"
    if needs_grad(input, weight, bias, scale, shift, residual):
        return "has no gradient"
    if op.vectorised(input, weight, stride, padding, dilation, groups):
        return None if extension.has_kernel("conv2d_cpu", "CPU") else extension.kernels_missing or "was not built"
    if len(padding) > 2:
        return "takes even padding, but for depthwise convolutions"
    return None if ONEDNN else "needs a torch with oneDNN"


def cpu_worthwhile(
    input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation
) -> str | None:
    """By `MEASURED`: the C++ kernels win where scale or shift saves a pass, 3x3 alone; oneDNN's fused ones do not."""
    mine = input.dim() == 4 and padding != "same" and op.vectorised(input, weight, stride, padding, dilation, groups)
    if mine and groups == 1 and op.filtered(input, weight, stride, padding, dilation):
        return _small_3x3(input, weight, stride, padding, dilation)
    if scale is None and shift is None:
        return "has no scale or shift to fuse"
    if not mine:
        return ONLY_ONEDNN
    if groups == 1 and input.size(0) * input.size(2) * input.size(3) * weight.size(0) < SMALL:
        return f"costs more to call than it saves on a small output ({MEASURED})"
    return None


def _small_3x3(input, weight, stride, padding, dilation) -> str | None:
    filters = weight.size(0) * weight.size(1)
    used = op.tiles(input, weight, stride, padding, dilation)
    if filters < THIN_3X3 or input.numel() * weight.size(0) < SMALL_3X3 or filters > 2048 * used:
        return f"costs more to call than it saves with few channels or pixels ({MEASURED_3X3})"
    return None


def cpu_batch_norm(input, *call) -> str | None:
    reason = with_batch_norm(cpu)(input, *call)
    if reason is None and not extension.has_kernel("fingerprint_cpu", "CPU"):
        return extension.kernels_missing or "was not built"
    return reason


def cpu_batch_norm_worthwhile(input, weight, bias, stride, padding, dilation, groups, *rest) -> str | None:
    """By `MEASURED`, its chains: batch norm costs the C++ kernels nothing, and PyTorch a pass or more.

    oneDNN gains most from kept weights that are large, and loses where it must change the image's layout for them.
    """
    if input.dim() != 4 or padding == "same":
        return ONLY_ONEDNN
    if small_chain(input, weight, stride, padding, dilation, groups):
        return f"costs more to call than it saves where there is little to compute ({MEASURED_CHAINS})"
    if op.vectorised(input, weight, stride, padding, dilation, groups):
        return None
    outweighed = weight.numel() > 4 * input.numel()
    return None if outweighed or op.channels_last(input) else ONLY_ONEDNN


def small_chain(input, weight, stride, padding, dilation, groups) -> bool:
    """Whether PyTorch's three calls take no longer than one op, by `MEASURED_CHAINS`.

    A contiguous depthwise convolution never is: oneDNN would change its layout.
    """
    batch, filters, height, width = output_shape(input, weight, stride, padding, dilation)
    output, weights = batch * filters * height * width, weight.numel()
    few, small = output * weights < CHAIN * filters, output < CHAIN_OUTPUT and weights < CHAIN_WEIGHT
    if not (few or small):
        return False
    return not op.vectorised(input, weight, stride, padding, dilation, groups) or (few and groups == 1)


def cpu1d(input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation) -> str | None:
    return _in_2d(cpu, input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation)


def cpu1d_worthwhile(*call) -> str | None:
    return _in_2d(cpu_worthwhile, *call)


def _in_2d(rule, input, weight, bias, stride, padding, dilation, groups, *rest) -> str | None:
    if input.dim() != 3:
        return "takes (batch, channels, length)"
    if padding == "same":
        return "takes even padding"
    if not (input.is_contiguous() and weight.is_contiguous()):
        return "takes contiguous tensors"
    geometry = ((1, *stride), (0, *padding), (1, *dilation))
    return rule(input.unsqueeze(-2), weight.unsqueeze(-2), bias, *geometry, groups, *rest)


def with_batch_norm(rule):
    """A rule for conv2d as one for conv_bn_act2d."""

    def call(
        input, weight, bias, stride, padding, dilation, groups,
        running_mean, running_var, bn_weight, bn_bias, eps, residual, activation,
    ):  # fmt: skip
        scale = running_var if bn_weight is None else bn_weight
        shift = running_mean if bn_bias is None else bn_bias
        return rule(input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation)

    return call


def needs_grad(*tensors) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _float_type(input) -> str | None:
    fits = input.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return None if fits else "takes float32, float16 and bfloat16"
