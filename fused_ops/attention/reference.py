"""Attention in PyTorch: its own fused op where it has one, eager maths where it has none.

Shapes: query (..., heads, Lq, D), key (..., kv_heads, Lk, D), value (..., kv_heads, Lk, Dv).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.core.autograd import twice_differentiable


class Score(NamedTuple):
    """How a score is formed from query·key. `left` and `right` bound the window, -1 for no bound; softcap None: none.

    The diagonal runs from the first key (top-left), or ends at the last (bottom-right).
    """

    scale: float
    is_causal: bool = False
    bottom_right: bool = False
    left: int = -1
    right: int = -1
    softcap: float | None = None

    @property
    def positional(self) -> bool:
        """Whether a position decides what is seen, beyond what F.scaled_dot_product_attention can be told."""
        return self.left >= 0 or self.right >= 0 or (self.is_causal and self.bottom_right)


def visible(score: Score, rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) bool: which keys a query sees."""
    distance = relative_position(score, rows, columns, device)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if score.is_causal:
        seen = seen & (distance <= 0)
    if score.left >= 0:
        seen = seen & (distance >= -score.left)
    if score.right >= 0:
        seen = seen & (distance <= score.right)
    return seen


def relative_position(score: Score, rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) int: key position minus the query's aligned position."""
    offset = columns - rows if score.bottom_right else 0
    return torch.arange(columns, device=device) - (torch.arange(rows, device=device)[:, None] + offset)


def maths(query, key, value, attn_mask, alibi_slopes, sinks, *score, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """softmax(mask(softcap·tanh(scale·q·kᵀ/softcap) − slope·|distance|)) · v and its natural log-sum-exp, step by step.

    Half types are computed in float32. A row that sees no key gives 0 and −inf.
    """
    score = Score(*score)
    compute = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    q, k, v = (t.to(compute) for t in (query, key, value))
    if q.dim() > 2 and k.size(-3) != q.size(-3):
        k, v = (t.repeat_interleave(q.size(-3) // t.size(-3), -3) for t in (k, v))
    rows, columns = q.size(-2), k.size(-2)
    s = (q * score.scale) @ k.transpose(-2, -1)
    if score.softcap is not None:
        s = score.softcap * torch.tanh(s / score.softcap)
    if alibi_slopes is not None:
        distance = relative_position(score, rows, columns, s.device).abs()
        s = s - alibi_slopes.to(compute)[:, None, None] * distance
    if attn_mask is not None:
        s = s.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else s + attn_mask.to(compute)
    if score.is_causal or score.positional:
        s = s.masked_fill(~visible(score, rows, columns, s.device), -torch.inf)
    sink = None if sinks is None else sinks.to(compute)[:, None]
    top = s.detach().amax(-1) if columns else s.new_full(s.shape[:-1], -torch.inf)
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(s - top[..., None])
    total = weights.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + torch.log(total)).masked_fill(empty, -torch.inf)
    probabilities = F.dropout(weights / total[..., None], dropout_p) if dropout_p else weights / total[..., None]
    return (probabilities @ v).to(query.dtype), lse.to(torch.promote_types(compute, torch.float32))


def attention(query, key, value, attn_mask, alibi_slopes, sinks, score, dropout_p, return_lse):
    """`scaled_dot_product_attention` in PyTorch: F's own wherever it can be told what is wanted."""
    if sinks is not None or score.softcap is not None or return_lse:
        out, lse = maths(query, key, value, attn_mask, alibi_slopes, sinks, *score, dropout_p=dropout_p)
        return (out, lse) if return_lse else out
    if alibi_slopes is None and not score.positional:
        return _torch_attention(query, key, value, attn_mask, score, dropout_p, score.is_causal)
    mask = _as_mask(query, key, attn_mask, alibi_slopes, score)
    return _torch_attention(query, key, value, mask, score, dropout_p, False)


def _torch_attention(query, key, value, attn_mask, score, dropout_p, is_causal):
    grouped = query.dim() > 2 and key.size(-3) != query.size(-3)

    def fused(query, key, value, attn_mask):
        return (
            F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=score.scale, enable_gqa=grouped
            ),
        )

    def double(query, key, value, attn_mask):
        return maths(query, key, value, attn_mask, None, None, score.scale, is_causal)[:1]

    if dropout_p > 0.0 or not torch.is_grad_enabled():  # with dropout F runs its own eager maths on the CPU
        return fused(query, key, value, attn_mask)[0]
    return twice_differentiable(fused, double, query, key, value, attn_mask)[0]


def _as_mask(query, key, attn_mask, alibi_slopes, score) -> Tensor:
    """What is visible and ALiBi as one mask: bool, or added to the scores."""
    rows, columns = query.size(-2), key.size(-2)
    mask = visible(score, rows, columns, query.device)
    if alibi_slopes is None and (attn_mask is None or attn_mask.dtype == torch.bool):
        return mask if attn_mask is None else mask & attn_mask
    bias = query.new_zeros((rows, columns)).masked_fill(~mask, -torch.inf)
    if alibi_slopes is not None:
        distance = relative_position(score, rows, columns, query.device).abs()
        bias = bias - alibi_slopes.to(query.dtype)[:, None, None] * distance
    if attn_mask is None:
        return bias
    if attn_mask.dtype == torch.bool:
        return bias.masked_fill(~attn_mask, -torch.inf)
    return bias + attn_mask
