"""Checks of what comes in: configurations, shapes, tokens. One error names what was wanted and what came."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fused_ops.core.errors import ArgumentError


def check_choice(name: str, value: object, choices) -> None:
    """A configuration's field: `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(name, f"one of {', '.join(map(str, choices))}", value)


def check_heads(name: str, size: int, heads: int) -> None:
    """A configuration's field: `heads` divides the hidden size."""
    if heads < 1 or size % heads:
        raise ArgumentError(name, f"a divisor of the hidden size {size}", heads)


def check_sizes(config: object, *names: str) -> None:
    """Fields of a configuration: each is at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ArgumentError(name, "at least 1", getattr(config, name))


def check_shape(name: str, tensor: Tensor, *shape: int | str) -> None:
    """`tensor` has this shape; a size that is a word is any."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    fits = all(isinstance(wanted, str) or wanted == size for wanted, size in zip(shape, tensor.shape))
    if tensor.dim() != len(shape) or not fits:
        raise ArgumentError(name, f"of shape ({', '.join(map(str, shape))})", tuple(tensor.shape))


def readable(tensor: Tensor) -> bool:
    """Whether the values are at hand: not on a GPU, where reading them back would stall it, nor in a trace."""
    return (
        tensor.is_cpu
        and not torch.compiler.is_compiling()
        and not isinstance(tensor, FakeTensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def check_indices(name: str, ids: Tensor, shape: tuple[int, ...] | None, size: int) -> None:
    """`ids`: (batch, length) integers in [0, size), of `shape` if that is given."""
    check_shape(name, ids, *(("batch", "length") if shape is None else shape))
    if ids.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(name, "int32 or int64", ids.dtype)
    if ids.numel() and readable(ids):
        low, high = (bound.item() for bound in torch.aminmax(ids))
        if low < 0 or high >= size:
            raise ArgumentError(name, f"between 0 and {size - 1}", low if low < 0 else high)


def check_length(name: str, length: int, size: int) -> None:
    """`length` tokens fit the position table."""
    if length > size:
        raise ArgumentError(name, f"at most {size} tokens long, the size of the position table", length)


def positions(position_ids: Tensor | None, input_ids: Tensor, size: int) -> Tensor:
    """`position_ids` (batch, length) or (1, length), checked; default: 0, 1, 2, …"""
    length = input_ids.size(1)
    if length == 0:
        raise ArgumentError("input_ids", "at least one token long", tuple(input_ids.shape))
    if position_ids is None:
        check_length("input_ids", length, size)
        return torch.arange(length, device=input_ids.device)[None]
    one_row = isinstance(position_ids, Tensor) and position_ids.dim() == 2 and position_ids.size(0) == 1
    check_indices("position_ids", position_ids, (1, length) if one_row else input_ids.shape, size)
    return position_ids
