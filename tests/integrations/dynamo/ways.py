"""Ways to write attention by hand, each with a row for it in the listing of what was rewritten."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import randn

HEADS, DIM = 2, 8
LOWEST = torch.finfo(torch.float32).min


def tensors(rows: int = 12, columns: int = 12, requires_grad: bool = False) -> list[Tensor]:
    """query, key, value, and which keys a query sees: one row none, one all."""
    sizes = (rows, columns, columns)
    q, k, v = (randn(2, HEADS, n, DIM, seed=seed, requires_grad=requires_grad) for seed, n in enumerate(sizes))
    seen = randn(2, 1, rows, columns, seed=9) > 0
    seen[0, :, 3 % rows], seen[1, :, 2 % rows] = False, True
    return [q, k, v, seen]


def scores(q, k):
    return q @ k.transpose(-2, -1) / math.sqrt(DIM)


def matmul_div(q, k, v, seen):
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)) / 2.0, dim=-1), v)


def scale_before(q, k, v, seen):
    return ((q * 0.25) @ k.mT).softmax(-1) @ v


def no_scale(q, k, v, seen):
    return nn.Softmax(3)(q @ k.permute(0, 1, 3, 2)) @ v


def scaled_in_place(q, k, v, seen):
    weights = q @ k.mT
    weights *= 0.5
    weights /= 3
    return F.softmax(weights, -1) @ v


def three_dimensional(q, k, v, seen):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.3, dim=2), v)


def two_dimensional(q, k, v, seen):
    return (q[0, 0] @ k[0, 0].T).softmax(1) @ v[0, 0]


def einsum(q, k, v, seen):
    return torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * 0.35).softmax(-1), v)


def einsum_heads_third(q, k, v, seen):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = torch.einsum("b q h d, b k h d -> b h q k", q, k).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def einsum_ellipsis_swapped(q, k, v, seen):
    return torch.einsum("...jd,...ij->...id", v, torch.einsum("...jd,...id->...ij", k, q).softmax(-1))


def float32_softmax(q, k, v, seen):
    return F.softmax(scores(q, k).float(), dim=-1, dtype=torch.float32).to(v.dtype) @ v


def dropout_in_evaluation(q, k, v, seen):
    return F.dropout(F.dropout(scores(q, k).softmax(-1), 0.1, training=False), p=0.0) @ v


def scale_in_a_tensor(q, k, v, seen):
    return (q @ k.mT / torch.full([], DIM**0.5, dtype=v.dtype)).softmax(-1) @ v


def scale_by_head(q, k, v, seen):
    return (q @ k.mT * torch.arange(1.0, HEADS + 1)[:, None, None]).softmax(-1) @ v


def heads_joined(q, k, v, seen):
    return (scores(q, k).softmax(-1) @ v).transpose(1, 2).contiguous().view(2, -1, HEADS * DIM)


def result_viewed(q, k, v, seen):
    return (scores(q, k).softmax(-1) @ v).view(2 * HEADS, -1, DIM)


def filled_with_lowest(q, k, v, seen):
    return torch.softmax(scores(q, k).masked_fill(~seen, torch.finfo(q.dtype).min), -1) @ v


def filled_far_below(q, k, v, seen):
    return torch.softmax((8 * scores(q, k)).masked_fill(seen == 0, -1e9), -1) @ v


def filled_in_place(q, k, v, seen):
    weights = scores(q, k)
    weights.masked_fill_(~seen, LOWEST)
    return weights.softmax(-1) @ v


def filled_twice(q, k, v, seen):
    return scores(q, k).masked_fill(~seen, -1e9).masked_fill(~seen[:, :, :1], -1e9).softmax(-1) @ v


def where(q, k, v, seen):
    weights = scores(q, k)
    return torch.where(seen, weights, torch.full([], LOWEST, dtype=weights.dtype)).softmax(-1) @ v


def where_the_other_way(q, k, v, seen):
    return torch.where(~seen, torch.tensor(LOWEST), scores(q, k)).softmax(-1) @ v


def lower_equals_zero(q, k, v, seen):
    lower = torch.tril(torch.ones(q.size(-2), k.size(-2), device=q.device)).view(1, 1, q.size(-2), k.size(-2))
    return scores(q, k).masked_fill(lower == 0, float("-inf")).softmax(-1) @ v


def upper(q, k, v, seen):
    hidden = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).triu(diagonal=1)
    return scores(q, k).masked_fill(hidden[None, None], -1e9).softmax(-1) @ v


def upper_infinite(q, k, v, seen):
    hidden = torch.triu(torch.full((q.size(-2), k.size(-2)), float("-inf")), diagonal=1)
    return (scores(q, k) + hidden).softmax(-1) @ v


def where_lower(q, k, v, seen):
    lower = torch.ones(q.size(-2), k.size(-2)).tril().bool()
    return torch.where(lower, scores(q, k), LOWEST).softmax(-1) @ v


CAUSAL = (lower_equals_zero, upper, upper_infinite, where_lower)
WRITTEN = (
    matmul_div, scale_before, no_scale, scaled_in_place, three_dimensional, two_dimensional, einsum, einsum_heads_third,
    einsum_ellipsis_swapped, float32_softmax, dropout_in_evaluation, scale_in_a_tensor, scale_by_head, heads_joined,
    result_viewed, filled_with_lowest, filled_far_below, filled_in_place, filled_twice, where, where_the_other_way,
    *CAUSAL,
)  # fmt: skip
