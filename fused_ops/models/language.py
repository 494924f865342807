"""What BERT and GPT share: activations by Hugging Face's names and checks of what comes in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fused_ops.core.errors import ArgumentError


def gelu_tanh(x: Tensor) -> Tensor:
    """x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))). Source: Hendrycks and Gimpel 2016, section 2."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


_BLOCKS = 32
# Up to how many rows blocks are faster, and from which size of the table (bench/results/cpu/head_cpu.json).
_FEW_ROWS, _LARGE = 4, 4_000_000


def in_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """x·Wᵀ (rows, vocabulary) as a batch of products with blocks of W, and one with what is left of it."""
    size = weight.size(0) // _BLOCKS
    blocks, rest = weight[: _BLOCKS * size].view(_BLOCKS, size, weight.size(1)), weight[_BLOCKS * size :]
    scores = torch.bmm(blocks, x.t().expand(_BLOCKS, -1, -1)).flatten(0, 1).t()
    return torch.cat((scores, F.linear(x, rest)), 1) if len(rest) else scores


class Head(nn.Linear):
    """logits = W·x without a bias. For the next tokens of a few texts W is read in blocks, by all threads."""

    def __init__(self, hidden: int, vocab_size: int, device: str | None = None):
        super().__init__(hidden, vocab_size, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        few = x.is_cpu and x.dim() == 2 and 0 < x.size(0) <= _FEW_ROWS and self.weight.numel() >= _LARGE
        plain = x.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if few and plain and self.weight.is_contiguous() and not torch.is_autocast_enabled("cpu"):
            return in_blocks(x, self.weight)
        return super().forward(x)


def check_choice(name: str, value: object, choices) -> None:
    """A configuration's field: `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(name, f"one of {', '.join(map(str, choices))}", value)


def check_heads(name: str, size: int, heads: int) -> None:
    """A configuration's field: `heads` divides the hidden size."""
    if heads < 1 or size % heads:
        raise ArgumentError(name, f"a divisor of the hidden size {size}", heads)


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
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(ids).__name__}")
    if ids.dim() != 2 or (shape is not None and ids.shape != shape):
        raise ArgumentError(name, f"of shape {tuple(shape) if shape else '(batch, length)'}", tuple(ids.shape))
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


def check_attention_mask(mask: Tensor, shape: tuple[int, int]) -> None:
    """`mask`: (batch, length), not 0 on tokens."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a Tensor or None, got {type(mask).__name__}")
    if mask.shape != shape:
        raise ArgumentError("attention_mask", f"of shape {tuple(shape)}, not 0 on tokens", tuple(mask.shape))
