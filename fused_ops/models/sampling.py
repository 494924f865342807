"""How the next token is drawn from a language model's logits."""

import torch
from torch import Tensor

from fused_ops.core.errors import ArgumentError


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 0:
        raise ArgumentError("max_new_tokens", "0 or more", max_new_tokens)
    if not temperature >= 0.0:
        raise ArgumentError("temperature", "0 or more", temperature)
    if top_k is not None and top_k < 1:
        raise ArgumentError("top_k", "at least 1", top_k)
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ArgumentError("top_p", "in (0, 1]", top_p)


def restricted(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """logits / temperature (batch, vocabulary) in float32, −inf where `top_k` or `top_p` rules a token out."""
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ascending, order = logits.sort()
        out = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
        out[:, -1] = False
        logits = logits.masked_fill(out.scatter(1, order, out), -torch.inf)
    return logits


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token a row, (batch,)."""
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = restricted(logits, temperature, top_k, top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
