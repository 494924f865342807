"""Attention in PyTorch: its own fused op where it has one, eager maths where it has none.

Shapes: query (..., heads, Lq, D), key (..., kv_heads, Lk, D), value (..., kv_heads, Lk, Dv).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fused_ops.core.autograd import add_second_derivative
from fused_ops.core.errors import ArgumentError


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


def visible(score: Score, rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) bool: which keys a query sees."""
    return _in_window(score, relative_position(score, rows, columns, device))


def relative_position(score: Score, rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) int: key position minus the query's aligned position."""
    offset = columns - rows if score.bottom_right else 0
    return torch.arange(columns, device=device) - (torch.arange(rows, device=device)[:, None] + offset)


def grouped(query: Tensor, key: Tensor) -> bool:
    """Whether several query heads share a key head (other differences broadcast)."""
    if query.dim() < 3 or key.dim() < 3:
        return False
    heads, kv_heads = query.size(-3), key.size(-3)
    return heads != kv_heads and kv_heads > 0 and heads % kv_heads == 0


def maths(query, key, value, attn_mask, alibi_slopes, sinks, *score, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """softmax(mask(softcap·tanh(scale·q·kᵀ/softcap) − slope·|distance|)) · v and its natural log-sum-exp, step by step.

    Half types are computed in float32. A row that sees no key gives 0 and −inf.
    """
    score = Score(*score)
    compute = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    q, k, v = (t.to(compute) for t in (query, key, value))
    if grouped(q, k):
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
    if score.is_causal or score.left >= 0 or score.right >= 0:
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
    scale, is_causal, bottom_right, left, right, softcap = score
    rounds_bias = alibi_slopes is not None and query.dtype.itemsize < 4  # F's bias in bfloat16 misplaces far keys
    if sinks is not None or softcap is not None or return_lse or rounds_bias:
        out, lse = maths(query, key, value, attn_mask, alibi_slopes, sinks, *score, dropout_p=dropout_p)
        return (out, lse) if return_lse else out
    # On the CPU, F's own causal mask turns to NaN under a scale that is not positive.
    if alibi_slopes is not None or left >= 0 or right >= 0 or (is_causal and (bottom_right or scale <= 0)):
        attn_mask, is_causal = _as_mask(query, key, attn_mask, alibi_slopes, score), False
    gqa = {"enable_gqa": True} if grouped(query, key) else {}
    out = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **gqa)
    if not torch.is_grad_enabled() or dropout_p > 0.0 or torch.compiler.is_compiling() or out.grad_fn is None:
        return out

    def double(query, key, value, attn_mask=None):
        return maths(query, key, value, attn_mask, None, None, scale, is_causal)[0]

    mask = "attn_mask" if out.is_cpu else "attn_bias"
    return add_second_derivative(out, "ScaledDotProduct", ("query", "key", "value", mask), double)


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


def aligned(score: Score, rows: int, columns: int, alibi: bool) -> Score:
    """The same scores told top-left where that is possible, so that F.scaled_dot_product_attention can serve them."""
    if rows == columns:
        return score._replace(bottom_right=False)
    if rows == 1 and score.left < 0 and score.right < 0 and not alibi:  # the last query sees every key
        return score._replace(is_causal=False, bottom_right=False)
    return score


def readable(lengths: Tensor) -> bool:
    """Whether the values are at hand: not on a GPU, where reading them back would stall it, nor in a trace."""
    return lengths.is_cpu and not torch.compiler.is_compiling() and not isinstance(lengths, FakeTensor)


def varlen(
    query, key, value, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
    max_seqlen_q, max_seqlen_k, return_lse, *score, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention within each sequence of a packed batch: out (total, heads, Dv), LSE (heads, total) or size 0."""
    if not readable(cu_seqlens_q):
        return _varlen_padded(
            query, key, value, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
            max_seqlen_q, max_seqlen_k, return_lse, Score(*score), dropout_p,
        )  # fmt: skip
    lengths_q = _sequence_lengths("cu_seqlens_q", cu_seqlens_q, query.size(0), "max_seqlen_q", max_seqlen_q)
    lengths_k = _sequence_lengths("cu_seqlens_k", cu_seqlens_k, key.size(0), "max_seqlen_k", max_seqlen_k)
    outs, lses = [], []
    for q, k, v in zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k)):
        own = aligned(Score(*score), q.size(0), k.size(0), alibi_slopes is not None)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = attention(q, k, v, None, alibi_slopes, sinks, own, dropout_p, return_lse)
        out, lse = out if return_lse else (out, None)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0] if return_lse else None)
    return torch.cat(outs), torch.cat(lses, -1) if return_lse else _no_lse(query)


def _no_lse(query: Tensor) -> Tensor:
    return query.new_empty(0, dtype=torch.promote_types(query.dtype, torch.float32))


def _sequence_lengths(name: str, cu_seqlens: Tensor, total: int, bound: str, longest: int) -> list[int]:
    """Checked lengths; [0] for a batch of no sequences."""
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != total or any(length < 0 for length in lengths):
        raise ArgumentError(name, f"non-decreasing from 0 to the total length {total}", ends)
    if lengths and max(lengths) > longest:
        raise ArgumentError(bound, f"at least the longest sequence of {name}, {max(lengths)}", longest)
    return lengths or [0]


def _varlen_padded(
    query, key, value, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
    max_seqlen_q, max_seqlen_k, return_lse, score, dropout_p,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same without reading a length: sequences padded to (batch, heads, max_seqlen, D), masked, packed again."""
    starts_q, lengths_q = cu_seqlens_q[:-1].long(), cu_seqlens_q.diff().long()
    starts_k, lengths_k = cu_seqlens_k[:-1].long(), cu_seqlens_k.diff().long()
    rows = torch.arange(max_seqlen_q, device=query.device)
    columns = torch.arange(max_seqlen_k, device=query.device)
    q = _padded(query, starts_q[:, None] + rows, rows < lengths_q[:, None])
    k, v = (_padded(t, starts_k[:, None] + columns, columns < lengths_k[:, None]) for t in (key, value))
    diagonal = rows + (lengths_k - lengths_q)[:, None]
    distance = (columns - diagonal[..., None])[:, None]  # (batch, 1, max_seqlen_q, max_seqlen_k)
    seen = _in_window(score, distance) & (columns < lengths_k[:, None])[:, None, None]
    if alibi_slopes is not None:
        compute = torch.promote_types(query.dtype, torch.float32)
        bias = -alibi_slopes.to(compute)[:, None, None] * distance.abs()
        seen = bias.masked_fill(~seen, -torch.inf)
    plain = Score(score.scale, softcap=score.softcap)
    if alibi_slopes is not None or return_lse:
        out, lse = maths(q, k, v, seen, None, sinks, *plain, dropout_p=dropout_p)
    else:
        out, lse = attention(q, k, v, seen, None, sinks, plain, dropout_p, False), None
    token = torch.arange(query.size(0), device=query.device)
    ends = cu_seqlens_q[1:].long()
    sequence = torch.searchsorted(ends, token, right=True).clamp(max=ends.size(0) - 1)
    row = (token - starts_q[sequence]).clamp(0, max_seqlen_q - 1)
    packed = out.transpose(1, 2)[sequence, row]
    return packed, lse.transpose(1, 2)[sequence, row].t() if return_lse else _no_lse(query)


def _padded(packed: Tensor, index: Tensor, inside: Tensor) -> Tensor:
    """(total, heads, D) -> (batch, heads, length, D): rows `index` (batch, length) where `inside`, elsewhere 0."""
    if packed.size(0) == 0:
        padded = packed.new_zeros((*index.shape, *packed.shape[1:])) + packed.sum()
    else:
        padded = packed[index.clamp(0, packed.size(0) - 1)]
    return torch.where(inside[..., None, None], padded, 0.0).transpose(1, 2)


def _in_window(score: Score, distance: Tensor) -> Tensor:
    seen = distance <= 0 if score.is_causal else torch.ones_like(distance, dtype=torch.bool)
    if score.left >= 0:
        seen = seen & (distance >= -score.left)
    return seen & (distance <= score.right) if score.right >= 0 else seen


def decode(query, k_cache, v_cache, cache_seqlens, sinks, *score) -> tuple[Tensor]:
    """Queries at the end of each sequence against its cache: out (batch, heads, Lq, Dv)."""
    score, rows, capacity = Score(*score), query.size(2), k_cache.size(2)
    if not readable(cache_seqlens):
        return (_decode_masked(query, k_cache, v_cache, cache_seqlens, sinks, score),)
    lengths = sequence_ends(cache_seqlens, capacity)
    if len(set(lengths)) <= 1:
        batches = [(query, k_cache, v_cache)]
    else:
        batches = zip(query.split(1), k_cache.split(1), v_cache.split(1))
    outs = []
    for (q, k, v), length in zip(batches, lengths or [0]):
        own = aligned(score, rows, length, alibi=False)
        k, v = k[:, :, :length], v[:, :, :length]
        if rows == 1 and sinks is None and not own.is_causal and grouped(q, k):  # aligned: no window either
            # The heads of a key head as its rows: it is read once.
            q = q.squeeze(2).unflatten(1, (k.size(1), q.size(1) // k.size(1)))
            outs.append(attention(q, k, v, None, None, None, own, 0.0, False).flatten(1, 2).unsqueeze(2))
        else:
            outs.append(attention(q, k, v, None, None, sinks, own, 0.0, False))
    return (outs[0] if len(outs) == 1 else torch.cat(outs),)


def sequence_ends(cache_seqlens: Tensor, capacity: int) -> list[int]:
    """The values of `cache_seqlens`, checked."""
    lengths = cache_seqlens.tolist()
    if lengths and not 0 <= min(lengths) <= max(lengths) <= capacity:
        raise ArgumentError("cache_seqlens", f"between 0 and the capacity {capacity}", lengths)
    return lengths


def _decode_masked(query, k_cache, v_cache, cache_seqlens, sinks, score) -> Tensor:
    """The same without reading a length."""
    rows = torch.arange(query.size(2), device=query.device)
    columns = torch.arange(k_cache.size(2), device=query.device)
    lengths = cache_seqlens.long()[:, None]
    diagonal = rows + lengths - query.size(2)
    inside = columns < lengths  # (batch, capacity)
    seen = _in_window(score, columns - diagonal[..., None]) & inside[:, None]
    k, v = (torch.where(inside[:, None, :, None], cache, 0.0) for cache in (k_cache, v_cache))
    return attention(query, k, v, seen[:, None], None, sinks, Score(score.scale, softcap=score.softcap), 0.0, False)
