"""Models as people write them, and how these tests compile them."""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ops.core import extension
from fused_ops.integrations import dynamo
from fused_ops.integrations.dynamo import attention

NEEDS_KERNELS = pytest.mark.skipif(not extension.has_kernel("conv2d_cpu", "CPU"), reason="_C.so was not built")


@contextmanager
def any_length():
    """Short attention is rewritten too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_WORTH", dict.fromkeys(attention._WORTH, 0))
        patch.setattr(attention, "_FEW_ROWS", 0)
        yield


def compiled(written, then="eager", **settings):
    return torch.compile(written, backend=dynamo.backend, options={"then": then}, fullgraph=True, **settings)


def rows(listings) -> list:
    return [row for listing in listings for row in listing]


class Block(nn.Module):
    """A residual block of 1x1 and depthwise convolutions, its activations in place or not."""

    def __init__(self, channels: int = 8, activation: type = nn.ReLU, in_place: bool = True):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.activation = activation(inplace=True) if in_place else activation()
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm1(self.first(x)))
        y = self.norm2(self.second(y))
        y += x
        return self.activation(y)


class Attention(nn.Module):
    """As GPT tutorials write it: joint projection, a mask in a buffer, dropout."""

    def __init__(self, width: int = 16, heads: int = 2, longest: int = 64, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.project, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("mask", torch.tril(torch.ones(longest, longest)).view(1, 1, longest, longest))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.project(x).split(width, dim=2)
        q, k, v = (t.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        weights = weights.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        y = self.dropout(F.softmax(weights, dim=-1)) @ v
        return self.output(y.transpose(1, 2).contiguous().view(batch, length, width))


class GPT(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class BERT(nn.Module):
    """Self-attention as BERT writes it, with an added mask."""

    def __init__(self, width: int = 16, heads: int = 2):
        super().__init__()
        self.heads, self.size, self.dropout = heads, width // heads, nn.Dropout(0.1)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        def split(t):
            return t.view(*t.size()[:-1], self.heads, self.size).permute(0, 2, 1, 3)

        scores = torch.matmul(split(self.query(x)), split(self.key(x)).transpose(-1, -2)) / math.sqrt(self.size)
        weights = self.dropout(nn.functional.softmax(scores + (1.0 - mask[:, None, None]) * -10000.0, dim=-1))
        context = torch.matmul(weights, split(self.value(x))).permute(0, 2, 1, 3).contiguous()
        return context.view(*context.size()[:-2], self.heads * self.size)
