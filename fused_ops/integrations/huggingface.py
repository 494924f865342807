"""`attn_implementation="fused_ops"` for Hugging Face transformers, 4.57 and later."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from fused_ops.attention.functional import decode_attention, scaled_dot_product_attention, varlen_attention
from fused_ops.attention.reference import Score, readable, visible

NAME = "fused_ops"
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# By bench/results/cpu/huggingface_cpu.json, where decode_attention and varlen_attention begin to be faster: elements of
# a decode step's keys, without and with a mask that is to be read, and the length of a packed batch.
_DECODE_KEYS = {torch.float32: (2**18, 2**18), torch.bfloat16: (2**15, 2**17), torch.float16: (2**14, 2**16)}
_PACKED_LENGTH = 256

_logger = logging.get_logger("transformers.integrations.fused_ops")


def register() -> None:
    """Make `attn_implementation="fused_ops"` known to transformers, through its two public registries.

    It serves every model that looks its attention up in `AttentionInterface`, with all that those pass to it: masks,
    grouped heads, sliding windows, softcap (Gemma 2), sinks (gpt-oss), position biases (T5), dropout, caches, sequences
    packed by `position_ids` or by `cu_seq_lens_q` and its companions. As under `sdpa`, attention weights are never
    returned, and `head_mask` is ignored with a warning. Calling it again changes nothing.

    Source: https://huggingface.co/docs/transformers/attention_interface
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)


def make_mask(*, kv_length: int, local_size: int | None = None, config=None, **described) -> Tensor | None:
    """The mask of transformers' `sdpa`: None where `is_causal` says it all, else bool (batch, 1, Lq, Lk).

    None also for one query whose sliding window is all that its cache holds.
    """
    rows = described["q_length"] if "q_length" in described else described["cache_position"].size(0)
    chunked = getattr(config, "attention_chunk_size", None) is not None
    if rows == 1 and local_size is not None and kv_length <= local_size and not chunked:
        local_size = None
    return sdpa_mask(kv_length=kv_length, local_size=local_size, config=config, **described)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What `AttentionInterface` wants: the attention of a layer, (batch, Lq, heads, Dv), and no weights.

    Args:
        module: the layer; `module.is_causal` counts where `is_causal` is None.
        query: (batch, heads, Lq, D).
        key, value: (batch, kv_heads, Lk, D) and (batch, kv_heads, Lk, Dv).
        attention_mask: (batch, 1 or heads, Lq, Lk), bool or added to the scores. Where there is one, it says what is
            causal and within the window: `is_causal` and `sliding_window` count without it only.
        is_causal: several queries see keys j ≤ i; one query sees all keys.
        position_bias: (batch or 1, heads, Lq, Lk), added to the scores.
        sliding_window: the keys a query of a packed sequence sees, its own included; other windows are in the mask.
        kwargs: `softcap`; `s_aux`, the sinks (heads,); `PACKING`, as flash attention takes it. The rest is ignored.
    """
    if kwargs.get("output_attentions", False) or kwargs.get("head_mask") is not None:
        _logger.warning_once(
            "`fused_ops` attention does not support `output_attentions=True` or `head_mask`."
            " Please set your attention to `eager` if you want any of these features."
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    score = {"scale": scaling, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    left = -1 if sliding_window is None else sliding_window - 1
    several = query.size(2) != 1
    packing = _given_packing(kwargs) if "cu_seq_lens_q" in kwargs else None
    if attention_mask is not None and attention_mask.size(-1) > key.size(2):
        attention_mask = attention_mask[..., : key.size(2)]
    if position_bias is not None:
        attention_mask = _with_bias(position_bias, attention_mask, is_causal and several)
    if attention_mask is not None:
        if packing is not None:
            attention_mask = _within_sequences(attention_mask, query.size(0), query.size(2), packing)
        packing = _packing_of(attention_mask, left)
        is_causal = packing is not None
    if packing is not None:
        out = _packed(query, key, value, packing, dropout, is_causal, left, score)
    elif several:
        out = _many_queries(query, key, value, attention_mask, dropout, is_causal, score)
    else:
        out = _one_query(query, key, value, attention_mask, dropout, score)
    return out, None


def _with_bias(bias: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Both as one mask, added to the scores."""
    if mask is None and is_causal:
        mask = visible(Score(1.0, is_causal=True), bias.size(-2), bias.size(-1), bias.device)
    if mask is None:
        return bias
    return _hidden(bias, ~mask) if mask.dtype == torch.bool else bias + mask


def _hidden(bias: Tensor, hidden: Tensor) -> Tensor:
    """`bias`, and where hidden the least number: a row that sees nothing stays finite, as in transformers."""
    return torch.where(hidden, torch.finfo(bias.dtype).min, bias)


def _given_packing(kwargs: dict) -> tuple | None:
    """(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), if the caller packed sequences and says so."""
    given = [kwargs.get(name) for name in PACKING]
    if any(part is None for part in given):
        return None
    return given[0], given[1], int(given[2]), int(given[3])


def _within_sequences(mask: Tensor, batch: int, rows: int, packing: tuple) -> Tensor:
    """`mask`, and no key of another sequence; the rows of the batch are one row of sequences."""
    columns = mask.size(3)
    of_query, of_key = (
        torch.searchsorted(ends[1:], torch.arange(batch * length, device=ends.device, dtype=ends.dtype), right=True)
        for ends, length in ((packing[0], rows), (packing[1], columns))
    )
    same = of_query.view(batch, 1, rows, 1) == of_key.view(batch, 1, 1, columns)
    return mask & same if mask.dtype == torch.bool else _hidden(mask, ~same)


def _packing_of(mask: Tensor, left: int) -> tuple | None:
    """The same, if `mask` is causal within each of several sequences in a row, with that window, and nothing else."""
    if mask.shape[:3] != (1, 1, mask.size(-1)) or mask.dtype != torch.bool or mask.size(-1) < _PACKED_LENGTH:
        return None
    if not _at_hand(mask):
        return None
    seen = mask[0, 0]
    starts = [0, *(1 + (~seen.diagonal(-1)).nonzero().flatten()).tolist(), mask.size(2)]
    if len(starts) == 2:
        return None
    inside = 0
    for start, end in pairwise(starts):
        own = visible(Score(1.0, is_causal=True, left=left), end - start, end - start, mask.device)
        if not torch.equal(seen[start:end, start:end], own):
            return None
        inside += own.count_nonzero()
    if seen.count_nonzero() != inside:
        return None
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    longest = int(cu_seqlens.diff().max())
    return cu_seqlens, cu_seqlens, longest, longest


def _at_hand(tensor: Tensor) -> bool:
    """Whether values may decide what is run."""
    return readable(tensor) and not torch.jit.is_tracing()


def _packed(query, key, value, packing, dropout, is_causal, left, score) -> Tensor:
    """(batch, Lq, heads, Dv): the batch is one row of sequences."""
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    binds = left >= 0 and max(packing[2:]) > left + 1
    window = (left, -1 if is_causal else left) if binds else None
    out = varlen_attention(q, k, v, *packing, dropout_p=dropout, is_causal=is_causal, window=window, **score)
    return out.unflatten(0, (query.size(0), query.size(2)))


def _many_queries(query, key, value, mask, dropout, is_causal, score) -> Tensor:
    """(batch, Lq, heads, Dv) of contiguous memory, which the model's next layer wants."""
    if is_causal and key.size(2) > query.size(2):  # a static cache as it is filled: no query sees the rest
        key, value = (t[:, :, : query.size(2)] for t in (key, value))
    grouped = query.size(1) != key.size(1)
    if grouped and not (query.is_cpu or (mask is None and key.size(3) == value.size(3) <= 256)):
        # On a GPU, F.scaled_dot_product_attention shares heads in its flash kernel only.
        key, value = (t.repeat_interleave(query.size(1) // t.size(1), 1) for t in (key, value))
    out = scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, enable_gqa=grouped, **score)
    return out.transpose(1, 2).contiguous()


def _one_query(query, key, value, mask, dropout, score) -> Tensor:
    """(batch, 1, heads, Dv): a decode step. A key head's query heads become its rows, so that it is read once."""
    heads, kv_heads = query.size(1), key.size(1)
    lengths = _decoded(query, key, mask) if dropout == 0.0 and score["softcap"] is None else None
    if lengths is not None:
        return decode_attention(query, key, value, lengths, **score).transpose(1, 2)
    if heads != kv_heads and score["sinks"] is None:
        query = query.reshape(query.size(0), kv_heads, heads // kv_heads, query.size(3))
        if mask is not None and mask.size(1) == heads:
            mask = mask.reshape(mask.size(0), kv_heads, heads // kv_heads, mask.size(3))
    out = scaled_dot_product_attention(query, key, value, mask, dropout, enable_gqa=query.size(1) != kv_heads, **score)
    return out.reshape(out.size(0), 1, heads, value.size(3))


def _decoded(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """(batch,) how many of the keys, from the first on, the one query sees; None where that is not how it is, or where
    `decode_attention` would not be faster."""
    least = _DECODE_KEYS.get(query.dtype)
    if least is None or key.numel() < least[mask is not None] or not query.is_cpu or torch.compiler.is_compiling():
        return None
    if query.size(0) != key.size(0):
        return None
    if mask is None:
        return torch.full((key.size(0),), key.size(2), dtype=torch.int32)
    if mask.dtype != torch.bool or mask.shape[:2] != (key.size(0), 1) or not _at_hand(mask) or mask[0, 0, 0, -1]:
        return None  # with the last key in sight, others are out of it: padding or a window, no static cache
    seen = mask[:, 0, 0]
    lengths = seen.sum(-1)
    return lengths if torch.equal(seen, torch.arange(key.size(2)) < lengths[:, None]) else None
