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
