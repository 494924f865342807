"""Attention by the definition: plain Python loops over numbers, sharing no code with the package."""

import math

import torch
from torch import Tensor


def attend(
    query, key, value, *, scale, mask=None, causal=False, bottom_right=False, window=(-1, -1), softcap=None,
    slopes=None, sinks=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) in float64 of query (heads, Lq, D), key (kv_heads, Lk, D), value (kv_heads, Lk, Dv)."""
    heads, rows, _ = query.shape
    kv_heads, columns, _ = key.shape
    out = torch.zeros(heads, rows, value.size(-1), dtype=torch.float64)
    lse = torch.zeros(heads, rows, dtype=torch.float64)
    offset = columns - rows if bottom_right else 0
    for h in range(heads):
        keys, values = key[h // (heads // kv_heads)].tolist(), value[h // (heads // kv_heads)].double()
        for i, q in enumerate(query[h].tolist()):
            scores = []
            for j, k in enumerate(keys):
                score = scale * math.fsum(a * b for a, b in zip(q, k))
                if softcap is not None:
                    score = softcap * math.tanh(score / softcap)
                if slopes is not None:
                    score -= slopes[h].item() * abs(i + offset - j)
                if mask is not None:
                    seen = mask.expand(heads, rows, columns)[h, i, j].item()
                    score = score + seen if mask.dtype != torch.bool else score if seen else -math.inf
                away = j - (i + offset)
                if (
                    (causal and away > 0)
                    or (window[0] >= 0 and -away > window[0])
                    or (window[1] >= 0 and away > window[1])
                ):
                    score = -math.inf
                scores.append(score)
            everything = scores + ([sinks[h].item()] if sinks is not None else [])
            top = max(everything, default=-math.inf)
            if top == -math.inf:
                lse[h, i] = -math.inf
                continue
            total = math.fsum(math.exp(score - top) for score in everything)
            lse[h, i] = top + math.log(total)
            for score, row in zip(scores, values):
                if score > -math.inf:
                    out[h, i] += math.exp(score - top) / total * row
    return out, lse
