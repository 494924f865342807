"""Schemas, fake kernels and derivatives of the attention kernels."""

import torch

from fused_ops.attention import reference
from fused_ops.core.autograd import reference_gradient, with_reference_gradient
from fused_ops.core.device import TRITON_KEYS
from fused_ops.core.library import define

SCORE = "float scale, bool is_causal, bool bottom_right, int left, int right, float? softcap"

attention_bwd = reference_gradient("attention_bwd", SCORE, reference.maths)


def _attention_fwd_triton(query, key, value, scale, is_causal, bottom_right):
    from fused_ops.attention import triton_kernels

    return triton_kernels.attention_fwd(query, key, value, scale, is_causal, bottom_right)


def _attention_fwd_fake(query, key, value, scale, is_causal, bottom_right):
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse


define(
    "attention_fwd_triton(Tensor query, Tensor key, Tensor value, float scale, bool is_causal, bool bottom_right)"
    " -> (Tensor out, Tensor lse)",
    _attention_fwd_fake,
    _attention_fwd_triton,
    TRITON_KEYS,
)


def _triton_forward(query, key, value, attn_mask, alibi_slopes, sinks, scale, is_causal, bottom_right, *score):
    return torch.ops.fused_ops.attention_fwd_triton(query, key, value, scale, is_causal, bottom_right)


_attention_triton = with_reference_gradient(_triton_forward, attention_bwd, reference.maths)


def attention_triton(query, key, value, attn_mask, alibi_slopes, sinks, score, dropout_p, return_lse):
    out, lse = _attention_triton((query, key, value, attn_mask, alibi_slopes, sinks), tuple(score))
    return (out, lse) if return_lse else out


# Lengths decide what is computed, so a trace holds varlen and decode as opaque ops; eager mode runs plain autograd.

VARLEN = f"SymInt max_seqlen_q, SymInt max_seqlen_k, bool return_lse, {SCORE}"

varlen_bwd = reference_gradient("varlen_attention_bwd", VARLEN, reference.varlen)


def _varlen_fwd(*call):
    with torch.no_grad():
        return tuple(t.contiguous() for t in reference.varlen(*call))


def _varlen_fwd_fake(query, key, value, alibi, sinks, cu_q, cu_k, max_q, max_k, return_lse, *score):
    total, heads, _ = query.shape
    lse = (heads, total) if return_lse else (0,)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((total, heads, value.size(2))), query.new_empty(lse, dtype=dtype)


define(
    "varlen_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? alibi_slopes, Tensor? sinks,"
    f" Tensor cu_seqlens_q, Tensor cu_seqlens_k, {VARLEN}) -> (Tensor out, Tensor lse)",
    _varlen_fwd_fake,
    _varlen_fwd,
    ("CPU", "CUDA"),
)

_varlen_traced = with_reference_gradient(torch.ops.fused_ops.varlen_attention_fwd.default, varlen_bwd, reference.varlen)


def varlen_reference(
    query, key, value, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
    max_seqlen_q, max_seqlen_k, score, dropout_p, return_lse,
):  # fmt: skip
    inputs = (query, key, value, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    static = (max_seqlen_q, max_seqlen_k, return_lse, *score)
    if torch.compiler.is_compiling() and dropout_p == 0.0:  # an opaque op would drop other weights in its backward
        out, lse = _varlen_traced(inputs, static)
    else:
        out, lse = reference.varlen(*inputs, *static, dropout_p=dropout_p)
    return (out, lse) if return_lse else out


decode_bwd = reference_gradient("decode_attention_bwd", SCORE, reference.decode)


def _decode_fwd(*call):
    with torch.no_grad():
        return reference.decode(*call)[0].contiguous()


def _decode_fwd_fake(query, k_cache, v_cache, cache_seqlens, *rest):
    return query.new_empty((*query.shape[:-1], v_cache.size(-1)))


define(
    "decode_attention_fwd(Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? sinks,"
    f" {SCORE}) -> Tensor",
    _decode_fwd_fake,
    _decode_fwd,
    ("CPU", "CUDA"),
)

define(
    "decode_attention_cuda(Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, float scale) -> Tensor",
    _decode_fwd_fake,
)

define(
    "decode_attention_cpu(Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? sinks,"
    " float scale, int left, int lanes=16) -> Tensor",
    _decode_fwd_fake,
)

_decode_traced = with_reference_gradient(
    lambda *call: (torch.ops.fused_ops.decode_attention_fwd(*call),), decode_bwd, reference.decode
)
_decode_cuda = with_reference_gradient(
    lambda query, k_cache, v_cache, cache_seqlens, sinks, scale, *score: (
        torch.ops.fused_ops.decode_attention_cuda(query, k_cache, v_cache, cache_seqlens, scale),
    ),
    decode_bwd,
    reference.decode,
)


def _decode_cpu_forward(query, k_cache, v_cache, cache_seqlens, sinks, scale, is_causal, bottom_right, left, *rest):
    sinks = None if sinks is None else sinks.float().contiguous()
    return (torch.ops.fused_ops.decode_attention_cpu(query, k_cache, v_cache, cache_seqlens, sinks, scale, left),)


_decode_cpu = with_reference_gradient(_decode_cpu_forward, decode_bwd, reference.decode)


def decode_reference(query, k_cache, v_cache, cache_seqlens, sinks, score):
    if torch.compiler.is_compiling():
        return _decode_traced((query, k_cache, v_cache, cache_seqlens, sinks), tuple(score))[0]
    return reference.decode(query, k_cache, v_cache, cache_seqlens, sinks, *score)[0]


def decode_cuda(query, k_cache, v_cache, cache_seqlens, sinks, score):
    return _decode_cuda((query, k_cache, v_cache, cache_seqlens, sinks), tuple(score))[0]


def decode_cpu(query, k_cache, v_cache, cache_seqlens, sinks, score):
    if reference.readable(cache_seqlens):
        reference.sequence_ends(cache_seqlens, k_cache.size(2))
    return _decode_cpu((query, k_cache, v_cache, cache_seqlens, sinks), tuple(score))[0]
