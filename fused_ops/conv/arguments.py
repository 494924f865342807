"""What the public functions check before anything is launched, in few enough steps for the hot path.

An error names the argument, what was wanted and what came, and ends in torch's own words where torch has some.
"""

import torch
from torch import Tensor

from fused_ops.conv.reference import ACTIVATIONS
from fused_ops.core.errors import ArgumentError


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def activation(value: str | None) -> None:
    if value is not None and (not isinstance(value, str) or value not in ACTIVATIONS):
        names = ", ".join(filter(None, ACTIVATIONS))
        raise ArgumentError("activation", f"None or one of {names}", repr(value))


def convolution(
    dims: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int
) -> tuple[tuple[int, ...], tuple[int, ...] | str, tuple[int, ...]]:
    """stride, padding and dilation, one per dimension of space; "same" stays where it pads unevenly."""
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
        tensor("input", input)
        tensor("weight", weight)
    shape, kernel = input.shape, weight.shape
    steps = stride if type(stride) is tuple else (stride,) * dims
    pads = padding if type(padding) is tuple else (padding,) * dims
    spread = dilation if type(dilation) is tuple else (dilation,) * dims
    if _common(dims, shape, kernel, input, weight, bias, steps, pads, spread, groups):
        return steps, pads, spread
    if len(kernel) != dims + 2 or (len(shape) != dims + 2 and len(shape) != dims + 1):
        _refuse_rank(dims, shape, kernel)
    stride = (stride,) * dims if type(stride) is int else each("stride", stride, dims)
    dilation = (dilation,) * dims if type(dilation) is int else each("dilation", dilation, dims)
    if type(padding) is int:
        padding = (padding,) * dims
    elif isinstance(padding, str):
        padding = _named_padding(padding, kernel, stride, dilation)
    else:
        padding = each("padding", padding, dims)
    _check_signs(stride, padding, dilation)
    _check_channels(dims, shape, kernel, bias, groups)
    if input.dtype != weight.dtype or (bias is not None and bias.dtype != input.dtype):
        _check_dtypes(input, weight, bias)
    if padding != "same":
        _check_space(shape, kernel, stride, padding, dilation)
    return stride, padding, dilation


def _common(dims, shape, kernel, input, weight, bias, stride, padding, dilation, groups) -> bool:
    """Whether a batched call with one int per dimension is right: the checks below in one expression."""
    if not (len(shape) == len(kernel) == dims + 2 and len(stride) == len(padding) == len(dilation) == dims):
        return False
    down, across, top, left = stride[0], stride[-1], padding[0], padding[-1]
    rows, columns, height, width = dilation[0], dilation[-1], kernel[2], kernel[-1]
    return (
        type(down) is type(across) is type(top) is type(left) is type(rows) is type(columns) is type(groups) is int
        and down > 0 < across
        and top >= 0 <= left
        and rows > 0 < columns
        and groups > 0
        and shape[1] == kernel[1] * groups
        and kernel[0] >= groups
        and kernel[0] % groups == 0
        and shape[2] > 0 < height
        and shape[2] + 2 * top > rows * (height - 1)
        and shape[-1] > 0 < width
        and shape[-1] + 2 * left > columns * (width - 1)
        and input.dtype is weight.dtype
        and (bias is None or (isinstance(bias, Tensor) and bias.shape == kernel[:1] and bias.dtype is input.dtype))
    )


def _refuse_rank(dims: int, shape, kernel) -> None:
    rank, unbatched, batched = len(shape), f"{dims + 1}D (unbatched)", f"{dims + 2}D (batched)"
    if rank != dims + 2 and rank != dims + 1:
        said = f"Expected {unbatched} or {batched} input to conv{dims}d, but got input of size: {list(shape)}"
        raise ArgumentError("input", f"{unbatched} or {batched}", f"{rank}D. {said}")
    said = f"Expected {len(kernel)}-dimensional input for {len(kernel)}-dimensional weight {list(kernel)}"
    said = said if len(kernel) > 2 else "weight should have at least three dimensions"
    raise ArgumentError("weight", f"{dims + 2}-dimensional", f"shape {tuple(kernel)}. {said}")


def each(name: str, value, dims: int) -> tuple[int, ...]:
    """An int, or one per dimension of space, as a tuple of `dims` ints."""
    if isinstance(value, (int, torch.SymInt)):
        return (value,) * dims
    try:
        values = tuple(part if isinstance(part, torch.SymInt) else part.__index__() for part in value)
    except (TypeError, AttributeError):
        raise TypeError(f"{name} must be an int or {dims} ints, got {value!r}") from None
    if len(values) == 1:
        return values * dims
    if len(values) != dims:
        said = f"expected {name} to be a single integer value or a list of {dims} values to match the convolution"
        raise ArgumentError(name, f"an int or {dims} ints", f"{value}. {said} dimensions, but got {name}={list(value)}")
    return values


def _named_padding(padding, kernel, stride, dilation):
    if padding == "valid":
        return (0,) * len(stride)
    if padding != "same":
        raise ArgumentError("padding", "'same', 'valid' or ints", f"{padding!r}. Invalid padding string: {padding!r}")
    if any(step != 1 for step in stride):
        raise ArgumentError("padding", "ints where the stride is not 1",
                            "'same'. padding='same' is not supported for strided convolutions")  # fmt: skip
    total = [d * (k - 1) for d, k in zip(dilation, kernel[2:])]
    return "same" if any(pad % 2 for pad in total) else tuple(pad // 2 for pad in total)


def _check_channels(dims, shape, kernel, bias, groups) -> None:
    if not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    if groups < 1:
        raise ArgumentError("groups", "positive", f"{groups}. non-positive groups is not supported")
    if kernel[0] < groups:
        said = f"expected weight to be at least {groups} at dimension 0, but got weight of size {list(kernel)} instead"
        raise ArgumentError(
            "weight", f"of at least {groups} out_channels", f"{kernel[0]}. Given groups={groups}, {said}"
        )
    if kernel[0] % groups:
        said = f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, but got weight of"
        raise ArgumentError("weight", f"of out_channels divisible by {groups}", f"{kernel[0]}. {said} size {kernel}")
    if shape[-1 - dims] != kernel[1] * groups:
        said = f"Given groups={groups}, weight of size {list(kernel)}, expected input{list(shape)} to have"
        said = f"{said} {kernel[1] * groups} channels, but got {shape[-1 - dims]} channels instead"
        raise ArgumentError("input", f"of {kernel[1] * groups} channels", f"{shape[-1 - dims]}. {said}")
    if bias is None:
        return
    tensor("bias", bias)
    if bias.dim() != 1 or bias.size(0) != kernel[0]:
        said = f"Given weight of size {list(kernel)}, expected bias to be 1-dimensional with {kernel[0]} elements, but"
        raise ArgumentError("bias", f"of shape ({kernel[0]},)",
                            f"{tuple(bias.shape)}. {said} got bias of size {list(bias.shape)} instead")  # fmt: skip


def _check_dtypes(input, weight, bias) -> None:
    if torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu"):
        return
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != input.dtype:
            said = f"Input type ({input.dtype}) and {name} type ({other.dtype}) should be the same"
            raise ArgumentError(name, f"of input's dtype {input.dtype}", f"{other.dtype}. {said}")


def _check_signs(stride, padding, dilation) -> None:
    """torch looks at these before it looks at shapes."""
    if padding != "same" and min(padding) < 0:
        raise ArgumentError("padding", "at least 0", f"{padding}. negative padding is not supported")
    if min(stride) < 1:
        raise ArgumentError("stride", "positive", f"{stride}. non-positive stride is not supported")
    if min(dilation) < 1:
        said = "non-positive dilation is not supported, dilation should be greater than zero"
        raise ArgumentError("dilation", "positive", f"{dilation}. {said}")


def _check_space(shape, kernel, stride, padding, dilation) -> None:
    space = shape[-len(stride) :]
    for size, taps, pad, step in zip(space, kernel[2:], padding, dilation):
        if size and taps and size + 2 * pad > step * (taps - 1):
            continue
        if taps < 1:
            raise ArgumentError("weight", "of kernel sizes at least 1", f"shape {tuple(kernel)}")
        if size == 0 and shape[0] != 0 and kernel[1] != 0:
            said = f"Only zero batch or zero channel inputs are supported, but got input shape: {list(shape)}"
            raise ArgumentError("input", "non-empty in space", f"{tuple(shape)}. {said}")
        if size + 2 * pad <= step * (taps - 1):
            padded = " x ".join(str(n + 2 * p) for n, p in zip(space, padding))
            reach = " x ".join(str(d * (k - 1) + 1) for d, k in zip(dilation, kernel[2:]))
            said = f"Calculated padded input size per channel: ({padded}). Kernel size: ({reach})."
            said = f"{said} Kernel size can't be greater than actual input size"
            raise ArgumentError("weight", "of a kernel no larger than the padded input", f"({reach}). {said}")


def output_shape(input: Tensor, weight: Tensor, stride, padding, dilation) -> tuple[int, ...]:
    """padding: "same", one per dimension, or one per side: (top, left, bottom, right)."""
    dims = len(stride)
    space = input.shape[-dims:]
    if padding != "same":
        before, after = padding[:dims], padding[-dims:]
        space = [
            (space[i] + before[i] + after[i] - dilation[i] * (weight.size(i + 2) - 1) - 1) // stride[i] + 1
            for i in range(dims)
        ]
    return (*input.shape[: -dims - 1], weight.size(0), *space)


def per_channel(name: str, value: Tensor | None, channels: int) -> None:
    if value is None:
        return
    tensor(name, value)
    if value.dim() != 1 or value.size(0) != channels:
        raise ArgumentError(name, f"of shape ({channels},), one per out-channel", tuple(value.shape))


def residual(value: Tensor | None, shape: tuple[int, ...]) -> None:
    """`value` must broadcast to `shape` without enlarging it."""
    if value is None:
        return
    tensor("residual", value)
    have = value.shape
    if have == shape:
        return
    fits = len(have) <= len(shape) and all(
        have[-i] == 1 or have[-i] == shape[-i] for i in range(1, len(have) + 1)
    )  # fmt: skip
    if not fits:
        raise ArgumentError("residual", f"broadcastable to the output {tuple(shape)}", f"shape {tuple(have)}")


def causal(input, weight, bias, initial_state) -> None:
    tensor("input", input)
    tensor("weight", weight)
    if input.dim() != 3:
        raise ArgumentError("input", "(batch, dim, length)", f"shape {tuple(input.shape)}")
    if weight.dim() != 2 or weight.size(0) != input.size(1) or weight.size(1) < 1:
        raise ArgumentError("weight", f"({input.size(1)}, width) with width at least 1", f"shape {tuple(weight.shape)}")
    if bias is not None:
        tensor("bias", bias)
        if bias.dim() != 1 or bias.size(0) != input.size(1):
            raise ArgumentError("bias", f"of shape ({input.size(1)},)", tuple(bias.shape))
    _check_dtypes(input, weight, bias)
    if initial_state is not None:
        tensor("initial_state", initial_state)
        wanted = (input.size(0), input.size(1), weight.size(1) - 1)
        if tuple(initial_state.shape) != wanted:
            raise ArgumentError("initial_state", f"(batch, dim, width - 1) = {wanted}", tuple(initial_state.shape))


def batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps) -> None:
    tensor("input", input)
    if input.dim() < 2:
        raise ArgumentError("input", "(batch, channels, ...)", f"shape {tuple(input.shape)}")
    if not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum must be a float, got {type(momentum).__name__}")
    if (running_mean is None) != (running_var is None):
        said = "running_mean and running_var must either both be None or neither be None"
        raise ArgumentError("running_var", "given if and only if running_mean is", f"one of the two. {said}")
    if not training and running_mean is None:
        raise ArgumentError("running_mean", "a Tensor unless training",
                            "None. running_mean must be defined in evaluation mode")  # fmt: skip
    channels = input.size(1)
    for name, value in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if value is None:
            continue
        tensor(name, value)
        if value.dim() != 1 or value.size(0) != channels:
            said = f"{name} should contain {channels} elements not {value.numel()}"
            raise ArgumentError(name, f"of shape ({channels},)", f"{tuple(value.shape)}. {said}")
    if eps < 0:
        raise ArgumentError("eps", "at least 0", f"{eps}. batch_norm eps must be non-negative, but got {eps}")
    if training and input.numel() == channels:
        said = f"Expected more than 1 value per channel when training, got input size {input.size()}"
        raise ArgumentError("input", "of more than 1 value per channel in training", f"{tuple(input.shape)}. {said}")


def pooling(input, kernel_size, stride, padding, dilation, ceil_mode):
    """kernel_size, stride, padding and dilation as pairs; an absent stride is the kernel's size."""
    tensor("input", input)
    kernel = _pool_pair("kernel_size", kernel_size)
    stride = kernel if stride is None or stride == [] or stride == () else _pool_pair("stride", stride)
    padding, dilation = _pool_pair("padding", padding), _pool_pair("dilation", dilation)
    for i in range(2):
        if kernel[i] < 1:
            raise ArgumentError("kernel_size", "positive", f"{kernel}. kernel size should be greater than zero")
        if stride[i] < 1:
            raise ArgumentError("stride", "positive", f"{stride}. stride should not be zero")
        if dilation[i] < 1:
            raise ArgumentError("dilation", "positive", f"{dilation}. dilation should be greater than zero")
        if padding[i] < 0:
            said = f"pad must be non-negative, but got pad: {padding[i]}"
            raise ArgumentError("padding", "at least 0", f"{padding}. {said}")
        if padding[i] > (dilation[i] * (kernel[i] - 1) + 1) // 2:
            said = "pad should be at most half of effective kernel size, but got"
            said = f"{said} pad={padding[i]}, kernel_size={kernel[i]} and dilation={dilation[i]}"
            raise ArgumentError("padding", "at most half of the dilated kernel", f"{padding}. {said}")
    shape = input.shape
    if len(shape) not in (3, 4):
        said = "non-empty 3D or 4D (batch mode) tensor expected for input"
        raise ArgumentError("input", "3D or 4D", f"{len(shape)}D. {said}")
    if 0 in shape[-3:]:
        said = "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, but got"
        raise ArgumentError("input", "non-empty but for its batch", f"{tuple(shape)}. {said}:{list(shape)}")
    spare = [shape[i - 2] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1 for i in range(2)]
    if any(left < (1 - step if ceil_mode else 0) for left, step in zip(spare, stride)):
        said = f"Given input size: {tuple(shape[-3:])}. Output size is too small"
        raise ArgumentError("kernel_size", "no larger than the padded input", f"{kernel}. {said}")
    return kernel, stride, padding, dilation


def _pool_pair(name: str, value) -> tuple[int, int]:
    if type(value) is int:
        return value, value
    values = (value,) if isinstance(value, (int, torch.SymInt)) else value
    if not isinstance(values, (tuple, list)) or not all(hasattr(part, "__index__") for part in values):
        raise TypeError(f"{name} must be an int or 2 ints, got {value!r}")
    if len(values) not in (1, 2):
        said = f"max_pool2d: {name} must either be a single int, or a tuple of two ints"
        raise ArgumentError(name, "an int or 2 ints", f"{value}. {said}")
    return (values[0], values[-1])
