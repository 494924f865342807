"""Convolution, batch norm, residual and activation as one op, where the modules that hold them allow it."""

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fused_ops.conv import arguments, functional, op


def conv_bn_act(
    conv: nn.Module, bn: nn.Module, input: Tensor, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """act(bn(conv(input)) + residual), one op where both are plain and `bn` uses its running statistics.

    In training `conv` runs by itself and the rest is `batch_norm_act`. A child with hooks or of another type is called.
    """
    if _foldable(conv, bn) and not global_hooks():
        return _folded(conv, bn, input, residual, activation)
    y = conv(input)
    if type(bn) is nn.BatchNorm2d and untouched(bn) and not global_hooks():
        return batch_norm_act(bn, y, residual, activation)
    arguments.residual(residual, y.shape)
    return functional.reference.epilogue(bn(y), None, None, residual, activation, 2)


def activation_of(module: nn.Module) -> str | None:
    """Its name in ACTIVATIONS; None for anything else, and for a module with a hook."""
    kind = type(module)
    if kind is nn.GELU:
        name = "gelu" if module.approximate == "none" else "gelu_tanh"
    elif kind is nn.LeakyReLU:
        name = "leaky_relu" if module.negative_slope == 0.01 else None
    else:
        name = _ACTIVATION_NAMES.get(kind)
    return name if name is not None and untouched(module) else None


_ACTIVATION_NAMES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Hardswish: "hardswish",
}


_STATISTICS = ("running_mean", "running_var", "weight", "bias")


def untouched(module: nn.Module) -> bool:
    """Whether calling it does what its class says: no hooks, no forward of the instance's own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def global_hooks() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


_CONVOLUTIONS = {nn.Conv2d}


def convolution(kind: type) -> type:
    """Says of a class that its forward is nn.Conv2d's."""
    _CONVOLUTIONS.add(kind)
    return kind


def plain_convolution(module: nn.Module) -> bool:
    return type(module) in _CONVOLUTIONS and module.padding_mode == "zeros" and untouched(module)


def normalises(bn: nn.Module, conv: nn.Conv2d) -> bool:
    """Whether `bn` is a batch norm, if maybe of a class of its own, with statistics for what `conv` gives."""
    return (
        isinstance(bn, nn.BatchNorm2d)
        and bn.running_mean is not None
        and bn.num_features == conv.out_channels
        and untouched(bn)
    )


def _foldable(conv: nn.Module, bn: nn.Module) -> bool:
    return plain_convolution(conv) and type(bn) is nn.BatchNorm2d and not bn.training and normalises(bn, conv)


def _folded(
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    input: Tensor,
    residual: Tensor | None,
    activation: str | None,
    pad: nn.ZeroPad2d | None = None,
) -> Tensor:
    padding = conv.padding
    if pad is not None:
        left, right, top, bottom = pad.padding
        padding = (top, left, bottom, right)
    (weight, bias), (mean, var, scale, shift) = _tensors(conv, "weight", "bias"), _tensors(bn, *_STATISTICS)
    return functional.conv_bn_act2d(
        input, weight, bias, conv.stride, padding, conv.dilation, conv.groups,
        mean, var, scale, shift, bn.eps, residual, activation,
    )  # fmt: skip


def _tensors(module: nn.Module, *names: str) -> list[Tensor | None]:
    """The attributes `names`, each in a tenth of what nn.Module's own look-up takes."""
    kind, parameters, buffers = type(module), module._parameters, module._buffers
    if kind is nn.Conv2d or kind is nn.BatchNorm2d:
        try:
            return [parameters[name] if name in parameters else buffers[name] for name in names]
        except KeyError:
            pass
    return [getattr(module, name) for name in names]


def pads(pad: nn.Module, conv: nn.Conv2d) -> bool:
    """Whether `pad` may become the padding of `conv`, a depthwise one without."""
    return (
        type(pad) is nn.ZeroPad2d
        and untouched(pad)
        and min(pad.padding) >= 0
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.padding == (0, 0)
    )


def run_chain(
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d | None,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    pad: nn.ZeroPad2d | None = None,
    residual_first: bool = False,
) -> Tensor:
    """act(bn(conv(pad(input))) + residual), or residual + ..., of modules without hooks in evaluation.

    One op, unless its result would differ from that of the calls one by one, which then are made.
    """
    if (
        conv.padding_mode != "zeros"
        or (bn is not None and (bn.running_mean is None or input.dim() != 4))
        or (pad is not None and not pads(pad, conv))
        or (residual is not None and not _fits(residual, conv, input, residual_first))
    ):
        y = conv(input if pad is None else pad(input))
        y = y if bn is None else nn.BatchNorm2d.forward(bn, y)
        y = y if residual is None else residual + y if residual_first else y + residual
        return functional.reference.epilogue(y, None, None, None, activation, 2)
    if bn is not None:
        return _folded(conv, bn, input, residual, activation, pad)
    return functional.conv2d(
        input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
        residual=residual, activation=activation,
    )  # fmt: skip


def _fits(residual: object, conv: nn.Conv2d, input: Tensor, first: bool) -> bool:
    """Whether a sum with `residual` is a convolution's result in shape, dtype and memory format."""
    if type(residual) is not Tensor or residual.dtype != input.dtype or input.dim() != 4:
        return False
    if isinstance(conv.padding, str):
        return False
    if residual.shape != arguments.output_shape(input, conv.weight, conv.stride, conv.padding, conv.dilation):
        return False
    return not first or residual.is_contiguous(memory_format=op.output_format(input, conv.weight))


def batch_norm_act(bn: nn.BatchNorm2d, input: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """As `BatchNorm2d.forward`, and the epilogue; nothing is counted by a call that raises."""
    count = bn.num_batches_tracked if bn.training and bn.track_running_stats else None
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if count is not None and bn.momentum is None:
        momentum = 1.0 / (float(count) + 1.0)
    tracked = not bn.training or bn.track_running_stats
    y = functional.batch_norm_act(
        input,
        bn.running_mean if tracked else None,
        bn.running_var if tracked else None,
        bn.weight,
        bn.bias,
        bn.training or bn.running_mean is None,
        momentum,
        bn.eps,
        residual=residual,
        activation=activation,
    )
    if count is not None:
        count.add_(1)
    return y
