"""torch.nn.MultiheadAttention and the Transformer layers on this package's attention."""

from functools import wraps
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.attention.functional import scaled_dot_product_attention, varlen_attention
from fused_ops.core.dispatch import OPS

# On the CPU torch's inference fast path writes out all scores; beyond these lengths that costs more than it saves
# (bench/results/cpu/transformer_cpu.json).
_FAST_PATH_LENGTH = {"plain": 256, "masked": 128, "nested": 128}


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose attention is `fused_ops.scaled_dot_product_attention`.

    out = Concat(head_1, …, head_h) · W_O with head_i = attention(Q·W_Qᵢ, K·W_Kᵢ, V·W_Vᵢ). Constructor, parameters,
    state_dict, shapes, masks, errors and outputs are torch's. Torch's own forward runs where it is asked for more than
    that (need_weights=True, its default; add_bias_kv; add_zero_attn; nested tensors), where it would raise, and where
    it has a faster kernel (self-attention over short sequences in eval mode on the CPU with batch_first=True and no
    gradient).

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
            or self._torch_is_faster(query, key, value, attn_mask is not None or key_padding_mask is not None)
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

    def _torch_is_faster(self, query: Tensor, key: Tensor, value: Tensor, masked: bool) -> bool:
        """Whether torch's inference fast path (one fused op) may serve this call; it decides for itself."""
        if query is not key or key is not value or self.training or not self.batch_first or not query.is_cpu:
            return False
        if query.dim() != 3 or self.num_heads % 2 or not self._qkv_same_embed_dim or self.in_proj_bias is None:
            return False
        if not query.is_nested and not _fast_path_wins("masked" if masked else "plain", query.size(1)):
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

    def _packed(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """Self-attention within each sequence of x (tokens, embed_dim)."""
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in self._projections(x, x, x))
        out = varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
        return F.linear(out.flatten(1), self.out_proj.weight, self.out_proj.bias)

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


def _fast_path_wins(kind: str, length: int) -> bool:
    """Whether torch's inference fast path is no slower than this package's attention on the CPU, and may be used."""
    op = OPS["varlen_attention" if kind == "nested" else "scaled_dot_product_attention"]
    return length <= _FAST_PATH_LENGTH[kind] and not op.bound()


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` whose attention is `fused_ops.nn.MultiheadAttention`.

    y = LN(x + attention(x)); out = LN(y + W_2·act(W_1·y)); with norm_first, y = x + attention(LN(x)) and
    out = y + W_2·act(W_1·LN(y)). Constructor, parameters, state_dict, shapes, masks, errors and outputs are torch's. In
    eval mode torch's fast path (one fused op for the layer) is kept on a GPU, and on the CPU for short sequences; long
    ones in a nested tensor are packed, so that no padding is computed.

    Source: Vaswani et al. 2017, section 3.1; norm_first: Xiong et al. 2020, figure 1.
    """

    @wraps(torch.nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _adopt(self.self_attn)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masked = src_mask is not None or src_key_padding_mask is not None
        if self._torch_is_faster(src, masked):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if src.is_nested:
            return self._packed(src)
        src_key_padding_mask = F._canonical_mask(
            src_key_padding_mask, "src_key_padding_mask", F._none_or_dtype(src_mask), "src_mask", src.dtype
        )
        src_mask = F._canonical_mask(src_mask, "src_mask", None, "", src.dtype, check_other=False)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))

    def _torch_is_faster(self, src: Tensor, masked: bool) -> bool:
        """Whether torch's forward may serve this call; without its fast path it does the same as ours."""
        if self.training or src.dim() != 3 or src.layout is not torch.strided:
            return True
        if src.is_nested:
            if masked or not src.size(0) or not src.is_cpu or not self._may_pack(src):
                return True
            return _fast_path_wins("nested", int(src._nested_tensor_size()[:, 0].max()))
        # Under autocast the dtype of the fast path's result is its own.
        length = src.size(1) if src.is_cpu and not torch.is_autocast_enabled("cpu") else 0
        return _fast_path_wins("masked" if masked else "plain", length)

    def _may_pack(self, src: Tensor) -> bool:
        """Whether nobody watches the attention, which is not called then, and nothing needs a gradient."""
        if not isinstance(self.self_attn, MultiheadAttention) or torch.is_autocast_enabled("cpu"):
            return False
        if torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in self.parameters())):
            return False
        return not any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())

    def _packed(self, src: Tensor) -> Tensor:
        """A nested tensor: its sequences one after another in one (tokens, d_model)."""
        parts = src.unbind()
        lengths = [part.size(0) for part in parts]
        ends = torch.tensor([0, *accumulate(lengths)])
        x = torch.cat(parts)
        if self.norm_first:
            x = x + self.self_attn._packed(self.norm1(x), ends, max(lengths))
            x = x + self._ff_block(self.norm2(x))
        else:
            x = self.norm1(x + self.self_attn._packed(x, ends, max(lengths)))
            x = self.norm2(x + self._ff_block(x))
        return torch.nested.as_nested_tensor(x.split(lengths))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` whose attentions are `fused_ops.nn.MultiheadAttention`.

    y = LN(x + attention(x)); z = LN(y + attention(y, memory)); out = LN(z + W_2·act(W_1·z)); with norm_first each LN
    acts ahead of its block. Constructor, parameters, state_dict, shapes, masks, errors and outputs are torch's.

    Source: Vaswani et al. 2017, section 3.1; norm_first: Xiong et al. 2020, figure 1.
    """

    @wraps(torch.nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _adopt(self.self_attn)
        _adopt(self.multihead_attn)


class TransformerEncoder(torch.nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder`: `encoder_layer` copied num_layers times, one after the other, then `norm`.

    Copies of a `torch.nn.TransformerEncoderLayer` are `fused_ops.nn.TransformerEncoderLayer`s, those of any other class
    stay what they are. All else is torch's, but that `torch.compile(fullgraph=True)` takes a mask without `is_causal`.
    """

    @wraps(torch.nn.TransformerEncoder.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _adopt_layers(self)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        return super().forward(src, mask, src_key_padding_mask, _hint(is_causal))


class TransformerDecoder(torch.nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder`: `decoder_layer` copied num_layers times, one after the other, then `norm`.

    Copies of a `torch.nn.TransformerDecoderLayer` are `fused_ops.nn.TransformerDecoderLayer`s, those of any other class
    stay what they are. All else is torch's, but that `torch.compile(fullgraph=True)` takes a mask without `is_causal`.
    """

    @wraps(torch.nn.TransformerDecoder.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _adopt_layers(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            _hint(tgt_is_causal),
            memory_is_causal,
        )


def _hint(is_causal: bool | None) -> bool | None:
    """None lets torch compare the mask's values with a causal one's, on which no graph may depend."""
    return False if is_causal is None and torch.compiler.is_compiling() else is_causal


class Transformer(torch.nn.Transformer):
    """`torch.nn.Transformer` of `fused_ops.nn.TransformerEncoder` and `fused_ops.nn.TransformerDecoder`.

    out = decoder(tgt, encoder(src)). Constructor, parameters, state_dict, shapes, masks, errors and outputs are
    torch's. A custom encoder or decoder stays as it is.

    Source: Vaswani et al. 2017, section 3.
    """

    @wraps(torch.nn.Transformer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        custom = {id(argument) for argument in (*args, *kwargs.values())}
        for stack in (self.encoder, self.decoder):
            if id(stack) not in custom:
                _adopt(stack)
                _adopt_layers(stack)


_OURS = {
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.TransformerEncoder: TransformerEncoder,
    torch.nn.TransformerDecoder: TransformerDecoder,
}


def _adopt(module: torch.nn.Module) -> None:
    """Make one of torch's own, by its exact type, this package's."""
    module.__class__ = _OURS.get(type(module), type(module))


def _adopt_layers(stack: torch.nn.Module) -> None:
    for layer in stack.layers:
        if type(layer) in _OURS:
            _adopt(layer)
            for child in layer.children():
                _adopt(child)
