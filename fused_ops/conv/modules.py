"""torch.nn drop-ins: convolutions, and batch norm with an epilogue."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ops.conv import arguments, blocks, functional


class Conv1d(nn.Conv1d):
    """`torch.nn.Conv1d`, computed by `fused_ops.conv1d`: same constructor, state, shapes and errors."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return functional.conv1d(input, weight, bias, self.stride, 0, self.dilation, self.groups)
        return functional.conv1d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


@blocks.convolution
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
        return blocks.batch_norm_act(self, input, residual, self.activation)

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
        return blocks.conv_bn_act(self.conv, self.bn, input, residual, self.activation)

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
