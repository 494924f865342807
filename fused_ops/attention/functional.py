"""Attention, named and ordered like `torch.nn.functional`."""

from torch import Tensor

from fused_ops.attention import op, reference
from fused_ops.attention.reference import Score
from fused_ops.core import verified
from fused_ops.core.dispatch import Backend, Op
from fused_ops.core.errors import ArgumentError


def _triton_supports(query, key, value, attn_mask, alibi_slopes, sinks, score, dropout_p, return_lse) -> str | None:
    if attn_mask is not None or alibi_slopes is not None or sinks is not None or dropout_p > 0.0:
        return "has no mask, ALiBi, sinks or dropout yet"
    if score.left >= 0 or score.right >= 0 or score.softcap is not None:
        return "has no window or softcap yet"
    if query.dim() != 4:
        return "takes (batch, heads, length, dim)"
    if query.size(-1) > 256 or value.size(-1) != query.size(-1):
        return "takes one head dim, at most 256"
    if query.dtype.itemsize > 4 or not query.dtype.is_floating_point:
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
    _check_qkv(query, key, value, enable_gqa)
    _check_mask(query, key, attn_mask, is_causal)
    if not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError("dropout_p", "between 0 and 1", dropout_p)
    if causal_alignment != "top_left" and causal_alignment != "bottom_right":
        raise ArgumentError("causal_alignment", "top_left or bottom_right", repr(causal_alignment))
    left, right = (-1, -1) if window is None else _check_window(window)
    if softcap is not None and not softcap > 0.0:
        raise ArgumentError("softcap", "positive", softcap)
    _check_per_head("alibi_slopes", alibi_slopes, query)
    _check_per_head("sinks", sinks, query)
    scale = query.size(-1) ** -0.5 if scale is None and query.size(-1) else scale or 1.0
    score = Score(scale, is_causal, causal_alignment == "bottom_right", left, right, softcap)
    return _ATTENTION(
        backend,
        (query, key, value, attn_mask, alibi_slopes, sinks),
        query, key, value, attn_mask, alibi_slopes, sinks, score, dropout_p, return_lse,
    )  # fmt: skip


def _check_qkv(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.dim() < 2:
            raise ArgumentError(name, "at least 2-dimensional", f"shape {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise ArgumentError(name, f"of query's dtype {query.dtype}", tensor.dtype)
        if tensor.device != query.device:
            raise ArgumentError(name, f"on query's device {query.device}", tensor.device)
    if key.size(-1) != query.size(-1):
        raise ArgumentError("key", f"(..., Lk, {query.size(-1)}) like query", f"shape {tuple(key.shape)}")
    if value.size(-2) != key.size(-2):
        raise ArgumentError("value", f"(..., {key.size(-2)}, Dv) like key", f"shape {tuple(value.shape)}")
    if enable_gqa:
        if query.dim() < 3 or key.dim() < 3 or key.size(-3) == 0 or query.size(-3) % key.size(-3):
            raise ArgumentError("key", "of a head count that divides query's", f"{key.shape} for {query.shape}")
        if value.size(-3) != key.size(-3):
            raise ArgumentError("value", f"of {key.size(-3)} heads like key", value.size(-3))


def _check_mask(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is None:
        return
    if is_causal:
        raise ArgumentError("attn_mask", "None when is_causal=True", f"shape {tuple(attn_mask.shape)}")
    if not attn_mask.is_floating_point() and attn_mask.dtype.itemsize != 1:
        raise ArgumentError("attn_mask", "bool or floating point", attn_mask.dtype)
    wanted = (*query.shape[:-1], key.size(-2))
    if attn_mask.dim() > len(wanted) or any(
        have not in (1, want) for have, want in zip(reversed(attn_mask.shape), reversed(wanted))
    ):
        raise ArgumentError("attn_mask", f"broadcastable to {tuple(wanted)}", f"shape {tuple(attn_mask.shape)}")


def _check_window(window: tuple[int, int]) -> tuple[int, int]:
    if not (isinstance(window, (tuple, list)) and len(window) == 2 and all(side >= -1 for side in window)):
        raise ArgumentError("window", "(left, right), each -1 or more", repr(window))
    return window[0], window[1]


def _check_per_head(name: str, tensor: Tensor | None, query: Tensor) -> None:
    if tensor is None:
        return
    if query.dim() < 3 or tuple(tensor.shape) != (query.size(-3),):
        raise ArgumentError(name, "of shape (heads,)", f"{tuple(tensor.shape)} for query {tuple(query.shape)}")
