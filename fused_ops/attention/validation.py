"""Checks of attention's arguments, before anything runs."""

import torch
from torch import Tensor

from fused_ops.core.errors import ArgumentError


def check_qkv(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    usual = query.shape == key.shape == value.shape and query.dim() > 1
    if not (usual and query.dtype == key.dtype == value.dtype and query.device == key.device == value.device):
        _check_unusual(query, key, value, enable_gqa)


def _check_unusual(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
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
            raise ArgumentError(
                "key", "of a head count that divides query's", f"{tuple(key.shape)} for {tuple(query.shape)}"
            )
        if value.dim() < 3 or value.size(-3) != key.size(-3):
            raise ArgumentError("value", f"of {key.size(-3)} heads like key", f"shape {tuple(value.shape)}")
    else:
        for name, tensor in (("key", key), ("value", value)):
            if any(a != b and 1 not in (a, b) for a, b in zip(query.shape[-3::-1], tensor.shape[-3::-1])):
                wanted = f"broadcastable to query's leading dimensions {tuple(query.shape[:-2])}"
                raise ArgumentError(name, wanted, f"shape {tuple(tensor.shape)}")


def check_mask(query: Tensor, key: Tensor, attn_mask: Tensor, is_causal: bool) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a Tensor or None, got {type(attn_mask).__name__}")
    if is_causal:
        raise ArgumentError("attn_mask", "None when is_causal=True", f"shape {tuple(attn_mask.shape)}")
    if not attn_mask.is_floating_point() and str(attn_mask.dtype) != "torch.bool":
        raise ArgumentError("attn_mask", "bool or floating point", attn_mask.dtype)
    wanted = (*query.shape[:-1], key.size(-2))
    if attn_mask.dim() > len(wanted) or any(
        have not in (1, want) for have, want in zip(reversed(attn_mask.shape), reversed(wanted))
    ):
        raise ArgumentError("attn_mask", f"broadcastable to {tuple(wanted)}", f"shape {tuple(attn_mask.shape)}")


def check_window(window: tuple[int, int] | None) -> tuple[int, int]:
    """(left, right), -1 for no bound."""
    if window is None:
        return -1, -1
    if not (isinstance(window, (tuple, list)) and len(window) == 2 and all(side >= -1 for side in window)):
        raise ArgumentError("window", "(left, right), each -1 or more", repr(window))
    return window[0], window[1]


def check_softcap(softcap: float | None) -> None:
    if softcap is not None and not softcap > 0.0:
        raise ArgumentError("softcap", "positive", softcap)


def check_per_head(name: str, tensor: Tensor | None, query: Tensor) -> None:
    if tensor is None:
        return
    if query.dim() < 3 or tuple(tensor.shape) != (query.size(-3),):
        raise ArgumentError(name, "of shape (heads,)", f"{tuple(tensor.shape)} for query {tuple(query.shape)}")


def check_heads(name: str, tensor: Tensor | None, query: Tensor, heads: int) -> None:
    """`tensor`: one number per query head."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(tensor).__name__}")
    if tuple(tensor.shape) != (heads,) or not tensor.is_floating_point():
        raise ArgumentError(name, f"{heads} floating-point numbers, one per head", _described(tensor))
    if tensor.device != query.device:
        raise ArgumentError(name, f"on query's device {query.device}", tensor.device)


def check_tensors(layout: str, **tensors: Tensor) -> None:
    """Query, key and value under their public names: tensors of `layout`, one dtype, one device."""
    names = list(tensors)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.dim() != layout.count(",") + 1:
            raise ArgumentError(name, f"({layout})", f"shape {tuple(tensor.shape)}")
    query, key, value = tensors.values()
    if not query.is_floating_point():
        raise ArgumentError(names[0], "floating point", query.dtype)
    for name, tensor in tensors.items():
        if tensor.dtype != query.dtype:
            raise ArgumentError(name, f"of {names[0]}'s dtype {query.dtype}", tensor.dtype)
        if tensor.device != query.device:
            raise ArgumentError(name, f"on {names[0]}'s device {query.device}", tensor.device)
    if key.size(-1) != query.size(-1):
        raise ArgumentError(names[1], f"of head dim {query.size(-1)} like {names[0]}", f"shape {tuple(key.shape)}")
    if value.shape[:-1] != key.shape[:-1]:
        raise ArgumentError(names[2], f"{tuple(key.shape[:-1])} + (Dv,) like {names[1]}", f"shape {tuple(value.shape)}")


def check_groups(name: str, heads: int, kv_heads: int) -> None:
    if heads % kv_heads if kv_heads else heads:
        raise ArgumentError(name, f"of a head count that divides query's {heads}", kv_heads)


def check_lengths(name: str, lengths: Tensor, count: int | None, query: Tensor) -> None:
    """A vector of `count` integers (None: at least one). The op checks its values; on a GPU nobody reads them."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(name, "int32 or int64", lengths.dtype)
    if lengths.dim() != 1 or (lengths.size(0) != count if count is not None else lengths.size(0) == 0):
        wanted = "a vector of batch + 1 numbers" if count is None else f"a vector of {count} numbers"
        raise ArgumentError(name, wanted, f"shape {tuple(lengths.shape)}")
    if lengths.device != query.device:
        raise ArgumentError(name, f"on query's device {query.device}", lengths.device)


def check_longest(name: str, longest: int, total: int, batch: int) -> None:
    if isinstance(longest, (Tensor, float)):
        raise TypeError(f"{name} must be an int, got {type(longest).__name__}")
    if longest < 0 or longest * batch < total:
        raise ArgumentError(name, f"the longest of {batch} sequences of {total} in all", longest)


def check_dropout(dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError("dropout_p", "between 0 and 1", dropout_p)


def _described(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}"
