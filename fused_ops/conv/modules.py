"""torch.nn drop-ins: convolutions, batch norm with an epilogue, and chains of them that run as one op in evaluation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fused_ops.conv import arguments, functional


class Conv1d(nn.Conv1d):
    """`torch.nn.Conv1d`, computed by `fused_ops.conv1d`: same constructor, state, shapes and errors."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return functional.conv1d(input, weight, bias, self.stride, 0, self.dilation, self.groups)
        return functional.conv1d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`, computed by `fused_ops.conv2d`: same constructor, state, shapes and errors."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return functional.conv2d(input, weight, bias, self.stride, 0, self.dilation, self.groups)
        return functional.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class BatchNormAct2d(nn.BatchNorm2d):
    r"""act((input − mean) / √(var + eps) · weight + bias + residual), with `torch.nn.BatchNorm2d`'s state.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as `torch.nn.BatchNorm2d`.
        activation: as in `fused_ops.conv2d`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str | None = "relu",
        device=None,
        dtype=None,
    ):
        arguments.activation(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input (batch, num_features, height, width), residual broadcastable to it -> input's shape."""
        self._check_input_dim(input)
        return _batch_norm_act(self, input, residual, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class ConvBNAct2d(nn.Module):
    r"""act(BN(weight ⋆ input) + residual), a convolution without bias, `torch.nn.BatchNorm2d`, and an epilogue.

    Its state is `conv.*` and `bn.*`. In evaluation the three are one op where a backend has it.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as `torch.nn.Conv2d`.
        eps, momentum: as `torch.nn.BatchNorm2d`.
        activation: as in `fused_ops.conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str | None = "relu",
        device=None,
        dtype=None,
    ):
        arguments.activation(activation)
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False, **where
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, **where)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input (batch, in_channels, height, width), residual broadcastable to the result."""
        conv, bn = self.conv, self.bn
        if _foldable(conv, bn) and not _global_hooks():
            return _folded(conv, bn, input, residual, self.activation)
        y = conv(input)
        if type(bn) is nn.BatchNorm2d and _untouched(bn) and not _global_hooks():
            return _batch_norm_act(bn, y, residual, self.activation)
        arguments.residual(residual, y.shape)
        return functional.reference.epilogue(bn(y), None, None, residual, self.activation, 2)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class CausalConv1d(nn.Module):
    r"""out[t] = act(Σₖ weight[k] · x[t + k − width + 1] + bias), each channel by itself: `fused_ops.causal_conv1d`.

    Its state is `weight` (channels, width) and `bias` (channels,), initialised as a depthwise `torch.nn.Conv1d`.

    Args:
        channels: how many.
        width: of the kernel, at least 1.
        bias: whether there is one.
        activation: as in `fused_ops.conv2d`.
    """

    def __init__(
        self, channels: int, width: int, bias: bool = True, *, activation: str | None = None, device=None, dtype=None
    ):
        arguments.activation(activation)
        super().__init__()
        self.channels, self.width, self.activation = channels, width, activation
        self.weight = nn.Parameter(torch.empty(channels, width, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.width)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, input: Tensor, initial_state: Tensor | None = None, return_final_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """input (batch, channels, length), initial_state (batch, channels, width − 1)."""
        return functional.causal_conv1d(
            input,
            self.weight,
            self.bias,
            activation=self.activation,
            initial_state=initial_state,
            return_final_state=return_final_state,
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}, bias={self.bias is not None}, activation={self.activation!r}"


class ConvSequential(nn.Sequential):
    """A `torch.nn.Sequential` whose chains of Conv2d[, BatchNorm2d][, activation] run as one op each in evaluation.

    Children, names, state and hooks are those of the Sequential. In training, where a gradient is needed, or where a
    child was changed or given a hook, that child runs by itself.
    """

    def forward(self, input):
        if self.training or not isinstance(input, Tensor) or _needs_grad(self, input) or _global_hooks():
            return super().forward(input)
        children = list(self._modules.values())
        position = 0
        for start, stop in _chains(children):
            for child in children[position:start]:
                input = child(input)
            input = _run_chain(children[start:stop], input)
            position = stop
        for child in children[position:]:
            input = child(input)
        return input


def fusible_chains(sequential: nn.Sequential) -> list[tuple[int, int]]:
    """(start, stop) of every run of children that `ConvSequential` computes as one op in evaluation.

    A chain is an untouched Conv2d with zero padding, then an untouched BatchNorm2d with running statistics or an
    activation or both; it begins with the ZeroPad2d ahead of a depthwise convolution that has a BatchNorm2d. Mode is
    not looked at: children in training are chains once they are in evaluation.
    """
    return _chains(list(sequential._modules.values()), in_any_mode=True)


def _chains(children: list[nn.Module], in_any_mode: bool = False) -> list[tuple[int, int]]:
    found, i = [], 0
    while i < len(children):
        start, i = i, i + 1
        if not _plain_convolution(children[start]):
            continue
        if i < len(children) and _follows(children[start], children[i], in_any_mode):
            i += 1
        if i < len(children) and _activation_of(children[i]) is not None:
            i += 1
        if i - start > 1:
            padded = start > 0 and type(children[start + 1]) is nn.BatchNorm2d
            found.append((start - 1 if padded and _pads(children[start - 1], children[start]) else start, i))
    return found


def _pads(pad: nn.Module, conv: nn.Conv2d) -> bool:
    """Whether `pad` may become the padding of `conv`, a depthwise one without."""
    return (
        type(pad) is nn.ZeroPad2d
        and _untouched(pad)
        and min(pad.padding) >= 0
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.padding == (0, 0)
    )


def _run_chain(chain: list[nn.Module], input: Tensor) -> Tensor:
    pad = chain[0] if type(chain[0]) is nn.ZeroPad2d else None
    conv, *rest = chain if pad is None else chain[1:]
    activation = _activation_of(rest[-1])
    if type(rest[0]) is nn.BatchNorm2d:
        return _folded(conv, rest[0], input, None, activation, pad)
    return functional.conv2d(
        input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups, activation=activation
    )


def _activation_of(module: nn.Module) -> str | None:
    """Its name in ACTIVATIONS; None for anything else, and for a module with a hook."""
    kind = type(module)
    if kind is nn.GELU:
        name = "gelu" if module.approximate == "none" else "gelu_tanh"
    elif kind is nn.LeakyReLU:
        name = "leaky_relu" if module.negative_slope == 0.01 else None
    else:
        name = _ACTIVATION_NAMES.get(kind)
    return name if name is not None and _untouched(module) else None


_ACTIVATION_NAMES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Hardswish: "hardswish",
}


def _untouched(module: nn.Module) -> bool:
    """Whether calling it does what its class says: no hooks, no forward of the instance's own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _global_hooks() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _plain_convolution(module: nn.Module) -> bool:
    return type(module) in (nn.Conv2d, Conv2d) and module.padding_mode == "zeros" and _untouched(module)


def _follows(conv: nn.Conv2d, bn: nn.Module, in_any_mode: bool = False) -> bool:
    return (
        type(bn) is nn.BatchNorm2d
        and (in_any_mode or not bn.training)
        and bn.running_mean is not None
        and bn.num_features == conv.out_channels
        and _untouched(bn)
    )


def _foldable(conv: nn.Module, bn: nn.Module) -> bool:
    return _plain_convolution(conv) and _follows(conv, bn)


def _needs_grad(module: nn.Module, input: Tensor) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or any(p.requires_grad for p in module.parameters()))


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
    return functional.conv_bn_act2d(
        input, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups,
        bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps, residual, activation,
    )  # fmt: skip


def _batch_norm_act(bn: nn.BatchNorm2d, input: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
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
