"""The Transformer of Vaswani et al.: an encoder that classifies, or an encoder and a decoder."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ops
from fused_ops.core.errors import ArgumentError
from fused_ops.models.checks import (
    check_choice,
    check_heads,
    check_indices,
    check_length,
    check_shape,
    check_sizes,
    readable,
)

_KINDS = ("encoder", "encoder-decoder")


@dataclass(frozen=True)
class TransformerConfig:
    """What a `Transformer` is made of.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: features of a token, d.
        num_layers: of the encoder, and of the decoder.
        num_classes: length of the logits of the form "encoder". The other's classes are the vocabulary: None.
        kind: "encoder" or "encoder-decoder".
        num_heads: a divisor of hidden_size; None: the largest of 8, 4, 2 and 1.
        dim_feedforward: hidden features of a layer's two linear maps; None: 4·hidden_size.
        dropout: probability, on embeddings, attention weights and the blocks' results.
        activation: between the two linear maps, "relu" or "gelu".
        norm_first: LayerNorm ahead of each block, not behind it (Xiong et al. 2020), and once more at the end.
        max_length: tokens that the table of positions has place for.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_classes: int | None = None
    kind: str = "encoder"
    num_heads: int | None = None
    dim_feedforward: int | None = None
    dropout: float = 0.1
    activation: str = "relu"
    norm_first: bool = False
    max_length: int = 512

    def __post_init__(self):
        check_sizes(self, "vocab_size", "hidden_size", "num_layers", "max_length")
        check_choice("kind", self.kind, _KINDS)
        check_choice("activation", self.activation, ("relu", "gelu"))
        if self.num_heads is not None:
            check_heads("num_heads", self.hidden_size, self.num_heads)
        if self.kind == "encoder" and self.num_classes is None:
            raise ArgumentError("num_classes", "a number: an encoder classifies", None)
        if self.kind == "encoder-decoder" and self.num_classes not in (None, self.vocab_size):
            raise ArgumentError("num_classes", "None: a decoder's classes are the vocabulary", self.num_classes)


def sinusoidal_positions(length: int, size: int) -> Tensor:
    """P[t, 2i] = sin(t / 10000^(2i/size)), P[t, 2i + 1] = cos(t / 10000^(2i/size)): (length, size), float32.

    Source: Vaswani et al. 2017, section 3.5.
    """
    steps = torch.arange(0, size, 2, dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * torch.exp(steps * (-math.log(10000.0) / size))
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :size].float()


class Transformer(nn.Module):
    r"""x = embedding(tokens)·√d + positions, then num_layers Transformer layers, in one of two forms:

    "encoder": logits = W·mean(encoder(x)) + b, the mean over a sequence's own tokens.
    "encoder-decoder": logits = decoder(x_tgt, encoder(x_src))·Eᵀ, E the embedding; tokens of tgt see none behind them.

    Args:
        vocab_size, hidden_size, num_layers, num_classes: as in `TransformerConfig`.
        config: its other fields, by keyword.

    Raises:
        ValueError: a field is out of range; a token is not in the vocabulary, a sequence is longer than max_length or
            than its tensor.

    Source: Vaswani et al. 2017, section 3; embedding and logits share E as in section 3.4.
    """

    def __init__(self, vocab_size: int, hidden_size: int, num_layers: int, num_classes: int | None = None, **config):
        super().__init__()
        self.config = config = TransformerConfig(vocab_size, hidden_size, num_layers, num_classes, **config)
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.register_buffer("positions", sinusoidal_positions(config.max_length, hidden_size), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        heads = config.num_heads or math.gcd(8, hidden_size)
        layer = {
            "d_model": hidden_size,
            "nhead": heads,
            "dim_feedforward": config.dim_feedforward or 4 * hidden_size,
            "dropout": config.dropout,
            "activation": config.activation,
            "batch_first": True,
            "norm_first": config.norm_first,
        }
        self.encoder = fused_ops.nn.TransformerEncoder(
            fused_ops.nn.TransformerEncoderLayer(**layer),
            num_layers,
            self._final_norm(),
            enable_nested_tensor=heads % 2 == 0 and not config.norm_first,
        )
        if config.kind == "encoder":
            self.fc = nn.Linear(hidden_size, num_classes)
        else:
            self.decoder = fused_ops.nn.TransformerDecoder(
                fused_ops.nn.TransformerDecoderLayer(**layer), num_layers, self._final_norm()
            )
        self._reset_parameters()

    def _final_norm(self) -> nn.LayerNorm | None:
        return nn.LayerNorm(self.config.hidden_size) if self.config.norm_first else None

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.embedding.weight, std=self.config.hidden_size**-0.5)

    def forward(self, src: Tensor, tgt: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """logits (batch, num_classes) of the encoder, (batch, Lt, vocab_size) of the encoder-decoder.

        Args:
            src: (batch, Ls), tokens, 0 ≤ token < vocab_size.
            tgt: (batch, Lt), tokens; the encoder-decoder's only.
            lengths: (batch,), tokens of each row of `src`; what lies past them has no influence. Default: all.
        """
        decodes = self.config.kind == "encoder-decoder"
        if decodes != isinstance(tgt, Tensor):
            raise ArgumentError("tgt", "a Tensor of tokens" if decodes else "None: there is no decoder", tgt)
        memory, hidden = self._encoded(src, lengths)
        if decodes:
            return self._decoded(tgt, memory, hidden)
        if hidden is None:
            return self.fc(memory.mean(1))
        total = memory.masked_fill(hidden[..., None], 0.0).sum(1)
        return self.fc(total / lengths.clamp(min=1)[:, None].to(total))

    def encode(self, src: Tensor, lengths: Tensor | None = None) -> Tensor:
        """What a decoder attends to, (batch, Ls, hidden_size); arguments as in `forward`."""
        return self._encoded(src, lengths)[0]

    def decode(self, tgt: Tensor, memory: Tensor, lengths: Tensor | None = None) -> Tensor:
        """logits (batch, Lt, vocab_size) from what `encode` gave for the same `lengths`."""
        check_shape("memory", memory, "batch", "length", self.config.hidden_size)
        return self._decoded(tgt, memory, self._padding(memory, lengths))

    def _encoded(self, src: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(encoder(x_src), what is padding there). Of a row without tokens torch's encoder wants to see one."""
        x, hidden = self._embedded("src", src), self._padding(src, lengths)
        seen = None if hidden is None else F.pad(hidden[:, 1:], (1, 0))
        return self.encoder(x, src_key_padding_mask=seen), hidden

    def _decoded(self, tgt: Tensor, memory: Tensor, hidden: Tensor | None) -> Tensor:
        y = self._embedded("tgt", tgt)
        if y.size(0) != memory.size(0):
            raise ArgumentError("tgt", f"of src's batch size {memory.size(0)}", y.size(0))
        causal = torch.ones(y.size(1), y.size(1), dtype=torch.bool, device=y.device).triu(1)
        y = self.decoder(y, memory, causal, tgt_is_causal=True, memory_key_padding_mask=hidden)
        return F.linear(y, self.embedding.weight)

    def _embedded(self, name: str, tokens: Tensor) -> Tensor:
        check_indices(name, tokens, None, self.config.vocab_size)
        length = tokens.size(1)
        if length == 0:
            raise ArgumentError(name, "at least one token long", tuple(tokens.shape))
        check_length(name, length, self.config.max_length)
        x = self.embedding(tokens) * self.config.hidden_size**0.5
        return self.dropout(x + self.positions[:length].to(x.dtype))

    def _padding(self, src: Tensor, lengths: Tensor | None) -> Tensor | None:
        """(batch, Ls), True past each length; None where there is nothing past them."""
        if lengths is None:
            return None
        if not isinstance(lengths, Tensor):
            raise TypeError(f"lengths must be a Tensor or None, got {type(lengths).__name__}")
        if lengths.shape != src.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
            wanted = f"of shape ({src.size(0)},), int32 or int64"
            raise ArgumentError("lengths", wanted, f"{tuple(lengths.shape)}, {lengths.dtype}")
        longest = src.size(1)
        if lengths.numel() and readable(lengths):
            low, high = (bound.item() for bound in torch.aminmax(lengths))
            if low < 0 or high > longest:
                raise ArgumentError("lengths", f"between 0 and {longest}", low if low < 0 else high)
            if low == longest:
                return None
        return torch.arange(longest, device=src.device) >= lengths.to(src.device)[:, None]
