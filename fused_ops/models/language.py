"""What BERT and GPT share: activations by Hugging Face's names, and the head that scores a vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
