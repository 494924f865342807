"""Attention, named and ordered like `torch.nn.functional`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.attention import op, reference
from fused_ops.attention.reference import Score
from fused_ops.attention.validation import (
    check_dropout,
    check_groups,
    check_heads,
    check_lengths,
    check_longest,
    check_mask,
    check_per_head,
    check_qkv,
    check_softcap,
    check_tensors,
    check_window,
)
from fused_ops.core import verified
from fused_ops.core.dispatch import Backend, Op
from fused_ops.core.errors import EXPLAINED, ArgumentError

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _triton_supports(query, key, value, attn_mask, alibi_slopes, sinks, score, dropout_p, return_lse) -> str | None:
    if attn_mask is not None or alibi_slopes is not None or sinks is not None or dropout_p > 0.0:
        return "has no mask, ALiBi, sinks or dropout yet"
    if score.left >= 0 or score.right >= 0 or score.softcap is not None:
        return "has no window or softcap yet"
    if query.dim() != 4 or key.dim() != 4 or query.size(0) != key.size(0) or query.size(1) % max(key.size(1), 1):
        return "takes (batch, heads, length, dim) of one batch size, nothing broadcast"
    if query.size(-1) > 256 or value.shape != key.shape:
        return "takes values of the keys' shape, head dim at most 256"
    if query.dtype not in _KERNEL_DTYPES:
        return "takes float32, float16 and bfloat16"
    return None


_ATTENTION = Op(
    "scaled_dot_product_attention",
    Backend(
        "triton",
        op.attention_triton,
        _triton_supports,
        kernel=verified.kernel("attention.fwd.triton", "attention/triton_kernels.py"),
    ),
    Backend("reference", reference.attention),
    autocast="cast",
)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""out = softmax(s) · v with s = softcap·tanh(scale·q·kᵀ / softcap) − slope·|i + offset − j| + attn_mask.

    Args:
        query: (..., heads, Lq, D).
        key: (..., kv_heads, Lk, D).
        value: (..., kv_heads, Lk, Dv).
        attn_mask: broadcastable to (..., heads, Lq, Lk): bool (True: may be seen) or added to the scores.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        is_causal: query i sees keys j ≤ i + offset.
        scale: default 1/√D.
        enable_gqa: kv_heads may divide heads; query head h then uses key head h // (heads / kv_heads).
        window: (left, right), the number of keys seen either side of the aligned diagonal, −1 for no bound.
        softcap: bound of the scores, > 0.
        alibi_slopes: (heads,), ALiBi (Press et al. 2022, section 3).
        sinks: (heads,), adds exp(sink) to the softmax's denominator.
        causal_alignment: "top_left" (offset 0) or "bottom_right" (offset Lk − Lq).
        return_lse: also return the natural log-sum-exp of each row, float32, (..., heads, Lq), differentiable.
        backend: "triton", "reference" or "auto"; default as set by `use_backend`.

    Returns:
        (..., heads, Lq, Dv), and the log-sum-exp if asked for. A row that sees no key gives 0, and −inf.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
        BackendUnavailable: `backend` cannot serve the call.

    Source: Vaswani et al. 2017, section 3.2.1; the Triton kernel follows Dao 2023 (FlashAttention-2), section 3.1.
    """
    plain = window is softcap is alibi_slopes is sinks is None and not return_lse and causal_alignment == "top_left"
    if plain and dropout_p == 0.0 and (scale is None or scale > 0.0) and _ATTENTION.straight(backend, query):
        try:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        except EXPLAINED:
            pass
    check_qkv(query, key, value, enable_gqa)
    if attn_mask is not None:
        check_mask(query, key, attn_mask, is_causal)
    if not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError("dropout_p", "between 0 and 1", dropout_p)
    if causal_alignment != "top_left" and causal_alignment != "bottom_right":
        raise ArgumentError("causal_alignment", "top_left or bottom_right", repr(causal_alignment))
    if scale is None:
        scale = max(query.size(-1), 1) ** -0.5
    if window is None and softcap is None and alibi_slopes is None and sinks is None:
        score = Score(scale, is_causal, causal_alignment == "bottom_right")
    else:
        left, right = check_window(window)
        check_softcap(softcap)
        check_per_head("alibi_slopes", alibi_slopes, query)
        check_per_head("sinks", sinks, query)
        score = Score(scale, is_causal, causal_alignment == "bottom_right", left, right, softcap)
    return _ATTENTION(
        backend,
        (query, key, value, attn_mask, alibi_slopes, sinks),
        query, key, value, attn_mask, alibi_slopes, sinks, score, dropout_p, return_lse,
    )  # fmt: skip


_VARLEN = Op("varlen_attention", Backend("reference", op.varlen_reference))


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`scaled_dot_product_attention` within each sequence of a packed batch, aligned bottom-right.

    Sequence b has queries query[cu_seqlens_q[b] : cu_seqlens_q[b+1]] and likewise its keys and values; it gives
    softmax(s) · v with s = softcap·tanh(scale·q·kᵀ / softcap) − slope·|i + Lk − Lq − j|, Lq and Lk its own lengths.

    Args:
        query: (total_q, heads, D), the sequences one after another.
        key: (total_k, kv_heads, D); kv_heads divides heads, query head h uses key head h // (heads / kv_heads).
        value: (total_k, kv_heads, Dv).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32 or int64: 0, then where each sequence ends. Lengths may be 0.
        max_seqlen_q, max_seqlen_k: at least the longest length.
        is_causal: query i of a sequence sees its keys j ≤ i + Lk − Lq.
        scale: default 1/√D.
        window: (left, right), the number of keys seen either side of that diagonal, −1 for no bound.
        softcap: bound of the scores, > 0.
        alibi_slopes: (heads,), ALiBi (Press et al. 2022, section 3).
        sinks: (heads,), adds exp(sink) to the softmax's denominator.
        dropout_p: probability of dropping an attention weight, in [0, 1].
        return_lse: also return the natural log-sum-exp of each row, float32, (heads, total_q), differentiable.
        backend: "reference" or "auto"; default as set by `use_backend`.

    Returns:
        (total_q, heads, Dv), and the log-sum-exp if asked for. A row that sees no key gives 0, and −inf.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came. The values of cu_seqlens are checked
            on the CPU; on a GPU they are never read back, and wrong ones give wrong results.
        BackendUnavailable: `backend` cannot serve the call.

    Source: Vaswani et al. 2017, section 3.2.1; the packed layout is FlashAttention's (Dao 2023).
    """
    check_tensors("total, heads, dim", query=query, key=key, value=value)
    check_groups("key", query.size(1), key.size(1))
    check_lengths("cu_seqlens_q", cu_seqlens_q, None, query)
    check_lengths("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.size(0), query)
    check_longest("max_seqlen_q", max_seqlen_q, query.size(0), cu_seqlens_q.size(0) - 1)
    check_longest("max_seqlen_k", max_seqlen_k, key.size(0), cu_seqlens_q.size(0) - 1)
    check_dropout(dropout_p)
    check_heads("alibi_slopes", alibi_slopes, query, query.size(1))
    check_heads("sinks", sinks, query, query.size(1))
    check_softcap(softcap)
    scale = max(query.size(-1), 1) ** -0.5 if scale is None else scale
    score = Score(scale, is_causal, True, *check_window(window), softcap)
    return _VARLEN(
        backend,
        (query, key, value, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k),
        query, key, value, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q, max_seqlen_k, score, dropout_p, return_lse,
    )  # fmt: skip


_DECODE_HEAD_DIMS = (64, 128, 256)
_DECODE_ROWS = 64


def _decode_cuda_supports(query, k_cache, v_cache, cache_seqlens, sinks, score) -> str | None:
    if score.left >= 0 or score.softcap is not None or sinks is not None:
        return "has no window, softcap or sinks yet"
    if query.dtype not in _KERNEL_DTYPES:
        return "takes float32, float16 and bfloat16"
    if query.size(-1) not in _DECODE_HEAD_DIMS or v_cache.size(-1) != query.size(-1):
        return "takes one head dim, 64, 128 or 256"
    if query.size(1) * query.size(2) > _DECODE_ROWS * k_cache.size(1):
        return f"takes at most {_DECODE_ROWS} queries per key head (heads / kv_heads · Lq)"
    return None


def _decode_cpu_supports(query, k_cache, v_cache, cache_seqlens, sinks, score) -> str | None:
    if score.softcap is not None:
        return "has no softcap"
    if query.dtype not in _KERNEL_DTYPES:
        return "takes float32, float16 and bfloat16"
    if (k_cache.stride(-1) != 1 and k_cache.size(-1) > 1) or (v_cache.stride(-1) != 1 and v_cache.size(-1) > 1):
        return "takes caches that are contiguous in their last dimension"
    return None


# By bench/results/cpu/decode_cpu.json: with more rows to a key head, products of matrices are as fast or faster.
_DECODE_CPU_ROWS = {torch.float32: 64, torch.bfloat16: 16, torch.float16: 64}


def _decode_cpu_worthwhile(query, k_cache, v_cache, cache_seqlens, sinks, score) -> str | None:
    if query.size(1) * query.size(2) > _DECODE_CPU_ROWS.get(query.dtype, 64) * k_cache.size(1):
        return "is slower with many queries per key head (bench/results/cpu/decode_cpu.json)"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, k_cache, v_cache, sinks)):
        return "has no backward of its own: its gradient would compute the reference's forward again"
    return None


_DECODE = Op(
    "decode_attention",
    Backend(
        "cuda",
        op.decode_cuda,
        _decode_cuda_supports,
        needs="decode_attention_cuda",
        kernel=verified.kernel(
            "attention.decode.cuda",
            "attention/decode.cuh",
            "attention/decode.cu",
            "attention/decode_plan.h",
            "common/shared.cuh",
            *verified.CUDA_COMMON,
        ),
    ),
    Backend("cpu", op.decode_cpu, _decode_cpu_supports, _decode_cpu_worthwhile, needs="decode_attention_cpu"),
    Backend("reference", op.decode_reference),
)


def decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attention of the newest Lq queries of each sequence over its key/value cache, causal, aligned bottom-right.

    With n = cache_seqlens[b], query i sees the cached keys j ≤ i + n − Lq and gives softmax(s) · v,
    s = softcap·tanh(scale·q·kᵀ / softcap). Nothing past n is read.

    Args:
        query: (batch, heads, Lq, D).
        k_cache: (batch, kv_heads, capacity, D), this call's keys already in it; kv_heads divides heads, query head h
            uses key head h // (heads / kv_heads).
        v_cache: (batch, kv_heads, capacity, Dv).
        cache_seqlens: (batch,), int32 or int64: the keys in each cache, those of this call's queries included.
        scale: default 1/√D.
        window: (left, right), the number of keys seen either side of the diagonal, −1 for no bound.
        softcap: bound of the scores, > 0.
        sinks: (heads,), adds exp(sink) to the softmax's denominator.
        backend: "cuda", "cpu", "reference" or "auto"; default as set by `use_backend`.

    Returns:
        (batch, heads, Lq, Dv). A row that sees no key gives 0.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came. The values of cache_seqlens are
            checked on the CPU; on a GPU they are never read back, and the kernel takes them as at most the capacity.
        BackendUnavailable: `backend` cannot serve the call.

    Source: Dao et al. 2023, "Flash-Decoding for long-context inference": keys split over blocks, merged by log-sum-exp.
    """
    check_tensors("batch, heads, length, dim", query=query, k_cache=k_cache, v_cache=v_cache)
    if k_cache.size(0) != query.size(0):
        raise ArgumentError("k_cache", f"of query's batch size {query.size(0)}", k_cache.size(0))
    check_groups("k_cache", query.size(1), k_cache.size(1))
    check_lengths("cache_seqlens", cache_seqlens, query.size(0), query)
    check_heads("sinks", sinks, query, query.size(1))
    check_softcap(softcap)
    scale = max(query.size(-1), 1) ** -0.5 if scale is None else scale
    score = Score(scale, True, True, *check_window(window), softcap)
    return _DECODE(
        backend,
        (query, k_cache, v_cache, cache_seqlens, sinks),
        query, k_cache, v_cache, cache_seqlens, sinks, score,
    )  # fmt: skip
