"""Masked multi-head attention as a block of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fused_ops
from fused_ops.models.checks import check_shape, check_sizes


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of an `Attention`. `concat_input`: the output is made of Concat(context, x), not of the context alone."""

    d_model: int
    d_k: int
    num_heads: int
    concat_input: bool = False
    bias: bool = True

    def __post_init__(self):
        check_sizes(self, "d_model", "d_k", "num_heads")


class Attention(nn.Module):
    r"""output = Concat(context_1, …, context_h[, x])·W_o with context_i = softmax(Q_i·K_iᵀ/√d_k)·V_i.

    Q = x·W_q; K and V come from `context`, by default x itself.

    Args:
        d_model: features of input and output.
        d_k: features of a head's queries, keys and values.
        num_heads: h.
        config: `concat_input` (False by default) and `bias` (True), by keyword.

    Raises:
        ValueError: a size is less than 1; x, context or the mask has another shape.

    Source: Vaswani et al. 2017, section 3.2; the form with Concat(context, x): Luong et al. 2015, equation 5.
    """

    def __init__(self, d_model: int, d_k: int, num_heads: int, **config):
        super().__init__()
        self.config = config = AttentionConfig(d_model, d_k, num_heads, **config)
        inner = num_heads * d_k
        self.w_q, self.w_k, self.w_v = (nn.Linear(d_model, inner, bias=config.bias) for _ in range(3))
        self.w_o = nn.Linear(inner + (d_model if config.concat_input else 0), d_model, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output (batch, Lq, d_model), weights (batch, heads, Lq, Lk) if need_weights, else None).

        Args:
            x: (batch, Lq, d_model).
            context: (batch, Lk, d_model). Default: x.
            mask: bool, True where a query sees a key, or float, added to the scores; broadcastable to
                (batch, heads, Lq, Lk). A query that sees no key has context and weights 0.
            is_causal: query i sees the keys up to i; not together with a mask.
        """
        context = x if context is None else context
        check_shape("x", x, "batch", "length", self.config.d_model)
        check_shape("context", context, x.size(0), "length", self.config.d_model)
        q, k, v = (
            projected.unflatten(-1, (self.config.num_heads, self.config.d_k)).transpose(1, 2)
            for projected in (self.w_q(x), self.w_k(context), self.w_v(context))
        )
        weights = None
        if need_weights:
            eye = torch.eye(k.size(2), dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
            weights = fused_ops.scaled_dot_product_attention(q, k, eye, mask, is_causal=is_causal)
        heads = fused_ops.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
        found = heads.transpose(1, 2).flatten(2)
        return self.w_o(torch.cat((found, x), -1) if self.config.concat_input else found), weights
