"""torch.nn.MultiheadAttention on this package's attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.attention.functional import scaled_dot_product_attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose attention is `fused_ops.scaled_dot_product_attention`.

    out = Concat(head_1, …, head_h) · W_O with head_i = attention(Q·W_Qᵢ, K·W_Kᵢ, V·W_Vᵢ). Constructor, parameters,
    state_dict, shapes, masks, errors and outputs are torch's. Torch's own forward runs where it is asked for more than
    that (need_weights=True, its default; add_bias_kv; add_zero_attn; nested tensors), where it would raise, and where
    it has a faster kernel (self-attention in eval mode on the CPU with batch_first=True and no gradient).

    Source: Vaswani et al. 2017, section 3.2.2.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if (
            need_weights
            or self._torch_is_faster(query, key, value)
            or not self._serves(query, key, value)
            or not self._serves_masks(query, key, key_padding_mask, attn_mask, is_causal)
        ):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = (self._heads(projected) for projected in self._projections(query, key, value))
        causal = is_causal and key_padding_mask is None
        mask = None if causal else _merged(attn_mask, key_padding_mask, self.num_heads)
        out = scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, causal)
        # Like torch: the projection's result lies in memory as (length, batch, embed_dim).
        out = F.linear(out.permute(2, 0, 1, 3).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if query.dim() == 2:
            return out.squeeze(1), None
        return out.transpose(0, 1) if self.batch_first else out, None

    def _serves(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the inputs are what torch's forward accepts, and nothing that it alone handles."""
        if self.bias_k is not None or self.bias_v is not None or self.add_zero_attn:
            return False
        if query.is_nested or key.is_nested or value.is_nested or query.dim() not in (2, 3):
            return False
        if key.dim() != query.dim() or key.shape[:-1] != value.shape[:-1]:
            return False
        batch = 0 if self.batch_first else 1
        return (
            (query.dim() == 2 or query.size(batch) == key.size(batch))
            and query.size(-1) == self.embed_dim
            and key.size(-1) == self.kdim
            and value.size(-1) == self.vdim
        )

    def _serves_masks(self, query, key, key_padding_mask, attn_mask, is_causal) -> bool:
        if is_causal and attn_mask is None:
            return False
        length, batch = (0, None) if query.dim() == 2 else (1, 0) if self.batch_first else (0, 1)
        rows, columns = query.size(length), key.size(length)
        sequences = 1 if batch is None else query.size(batch)
        if attn_mask is not None and (
            attn_mask.shape not in ((rows, columns), (sequences * self.num_heads, rows, columns))
            or not (attn_mask.is_floating_point() or attn_mask.dtype == torch.bool)
        ):
            return False
        if key_padding_mask is None:
            return True
        wanted = (columns,) if batch is None else (sequences, columns)
        return (
            key_padding_mask.shape == wanted
            and (key_padding_mask.is_floating_point() or key_padding_mask.dtype == torch.bool)
            and (attn_mask is None or attn_mask.dtype == key_padding_mask.dtype)
        )

    def _torch_is_faster(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether torch's inference fast path (one fused op) may serve this call; it decides for itself."""
        if query is not key or key is not value or self.training or not self.batch_first or not query.is_cpu:
            return False
        if query.dim() == 2 or self.num_heads % 2 or not self._qkv_same_embed_dim or self.in_proj_bias is None:
            return False
        tensors = (query, self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias)
        return not (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self._qkv_same_embed_dim and key is value:
            if query is key:
                return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            sizes = (self.embed_dim, 2 * self.embed_dim)
            weight_q, weight_kv = self.in_proj_weight.split(sizes)
            bias_q, bias_kv = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
            return F.linear(query, weight_q, bias_q), *F.linear(key, weight_kv, bias_kv).chunk(2, -1)
        weights = (
            self.in_proj_weight.chunk(3)
            if self._qkv_same_embed_dim
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, weight, bias) for x, weight, bias in zip((query, key, value), weights, biases))

    def _heads(self, x: Tensor) -> Tensor:
        """The projected input as (batch, heads, length, head_dim), a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int) -> Tensor | None:
    """Both masks as one, broadcastable to (batch, heads, L, S). Bool says what may be seen, torch.nn's what not."""
    if attn_mask is not None:
        attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.unflatten(-1, (1, 1, -1))
        key_padding_mask = key_padding_mask[None] if key_padding_mask.dim() == 3 else key_padding_mask
    if attn_mask is None or key_padding_mask is None:
        mask = key_padding_mask if attn_mask is None else attn_mask
        return ~mask if mask is not None and mask.dtype == torch.bool else mask
    return ~(attn_mask | key_padding_mask) if attn_mask.dtype == torch.bool else attn_mask + key_padding_mask
