"""BERT: an encoder of text with heads for masked tokens, classes of sequences and answers in a passage.

Padding is not computed: on the CPU without gradients, the tokens of all rows run packed, one after another.
Source: Devlin et al. 2019, sections 3 and 4, https://arxiv.org/abs/1810.04805
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ops
from fused_ops.core.errors import ArgumentError
from fused_ops.models import checks
from fused_ops.models.checkpoint import Pretrained
from fused_ops.models.language import ACTIVATIONS

_POSITIONS = "*embeddings.position_ids"  # 0, 1, 2, … in checkpoints from before transformers 4.31


@dataclass(frozen=True)
class BERTConfig:
    """Sizes of a `BERT`, by the names and with the defaults of transformers' BertConfig.

    Args:
        hidden_act: "gelu", "gelu_new" or "gelu_tanh" (one function), "relu", "silu" or "tanh".
        pad_token_id: the token whose embedding starts at 0 and gets no gradient, or None.
        classifier_dropout: default: hidden_dropout_prob.
        num_labels: classes of `BERTForSequenceClassification`; `id2label` may name them.
        tie_word_embeddings: `BERTForMaskedLM` scores tokens with their embeddings.
        add_pooling_layer: whether a `BERT` has a pooler.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    num_labels: int = 2
    id2label: dict[str, str] | None = None
    tie_word_embeddings: bool = True
    add_pooling_layer: bool = True

    def __post_init__(self):
        checks.check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        checks.check_heads("num_attention_heads", self.hidden_size, self.num_attention_heads)
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ArgumentError("pad_token_id", f"in a vocabulary of {self.vocab_size}, or None", self.pad_token_id)
        if self.id2label is not None and len(self.id2label) != self.num_labels:
            object.__setattr__(self, "id2label", None)


class Padded:
    """Rows of equal length, x (batch, length, hidden), under a mask (batch, 1, 1, length) bool: True on tokens."""

    def __init__(self, shape: torch.Size, mask: Tensor | None):
        self.shape, self.mask = shape, mask

    def pack(self, x: Tensor) -> Tensor:
        return x

    def unpack(self, x: Tensor) -> Tensor:
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """(batch, length, heads, dim) each -> (batch, length, heads, dim)."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return fused_ops.scaled_dot_product_attention(q, k, v, self.mask, dropout_p).transpose(1, 2)


class Packed:
    """The tokens of all rows, x (total, hidden), without padding; unpacked, padding is 0."""

    def __init__(self, mask: Tensor):
        self.shape = mask.shape
        self.places = mask.flatten().nonzero().squeeze(1)
        lengths = mask.sum(1)
        self.ends = F.pad(lengths.cumsum(0), (1, 0))
        self.longest = int(lengths.max())

    def pack(self, x: Tensor) -> Tensor:
        return x.expand(*self.shape, *x.shape[2:]).flatten(0, 1).index_select(0, self.places)

    def unpack(self, x: Tensor) -> Tensor:
        rows = x.new_zeros((self.shape.numel(), *x.shape[1:])).index_copy_(0, self.places, x)
        return rows.unflatten(0, self.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """(total, heads, dim) each -> (total, heads, dim)."""
        ends, longest = self.ends, self.longest
        return fused_ops.varlen_attention(q, k, v, ends, ends, longest, longest, dropout_p=dropout_p)


def layout(attention_mask: Tensor | None, input_ids: Tensor) -> Padded | Packed:
    """How the rows lie. Packed only where each starts with a token: poolers read the first place."""
    if attention_mask is None:
        return Padded(input_ids.shape, None)
    checks.check_shape("attention_mask", attention_mask, *input_ids.shape)
    mask = attention_mask != 0
    if checks.readable(mask) and mask.numel():
        if mask.all():
            return Padded(mask.shape, None)
        if not torch.is_grad_enabled() and mask[:, 0].all():
            return Packed(mask)
    return Padded(mask.shape, mask[:, None, None])


class Embeddings(nn.Module):
    """LayerNorm(word[id] + token_type[type] + position[place])."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor, types: Tensor | None, places: Tensor) -> Tensor:
        kind = self.token_type_embeddings.weight[0] if types is None else self.token_type_embeddings(types)
        x = self.word_embeddings(ids) + kind + self.position_embeddings(places)
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    """softmax(Q·Kᵀ/√dim)·V of each head, over the tokens of a row."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        self.heads, self.dropout_p = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(3))

    def forward(self, x: Tensor, rows: Padded | Packed) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.query, self.key, self.value))
        return rows.attend(q, k, v, self.dropout_p if self.training else 0.0).flatten(-2)


class AddNorm(nn.Module):
    """LayerNorm(W·x + b + residual)."""

    def __init__(self, config: BERTConfig, in_features: int):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Layer(nn.Module):
    """x = AddNorm(attention(x), x); x = AddNorm(act(W·x + b), x)."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": AddNorm(config, config.hidden_size)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = AddNorm(config, config.intermediate_size)
        self.hidden_act = config.hidden_act

    def forward(self, x: Tensor, rows: Padded | Packed) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, rows), x)
        return self.output(ACTIVATIONS[self.hidden_act](self.intermediate["dense"](x)), x)


class BERTOutput(NamedTuple):
    """last_hidden_state (batch, length, hidden) and pooler_output (batch, hidden), None without a pooler."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None


class BERTModel(Pretrained):
    """What BERT and its heads share: configuration, initial weights, names in a checkpoint."""

    config_class = BERTConfig
    model_type = "bert"
    fixed = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}  # noqa: RUF012

    def __init__(self, config: BERTConfig | None = None, **fields):
        super().__init__()
        self.config = replace(config or BERTConfig(), **fields)

    def _initialise(self, part: nn.Module) -> None:
        """Normal weights and zero biases, as in Devlin et al. 2019, appendix A.2."""
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx].detach())

    @classmethod
    def renamed(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An encoder beneath a head lies under "bert."; a LayerNorm of the oldest checkpoints has gamma and beta."""
        encoder = ("embeddings.", "encoder.", "pooler.")
        renamed = {}
        for key, tensor in state.items():
            key = key.removeprefix("bert.")
            key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            renamed[f"bert.{key}" if cls is not BERT and key.startswith(encoder) else key] = tensor
        return renamed


class BERT(BERTModel):
    """Encoder of text: hidden states of every token, and pooled = tanh(W·h_0 + b) of the first.

    Args:
        config: a `BERTConfig`; default: BERT base.
        fields: fields of the configuration, by keyword, instead of the config's.
    """

    architecture = "BertModel"
    ignored = (_POSITIONS, "pooler.*", "cls.*", "classifier.*", "qa_outputs.*")

    def __init__(self, config: BERTConfig | None = None, **fields):
        super().__init__(config, **fields)
        config = self.config
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        self.pooler = None
        if config.add_pooling_layer:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        self._initialise(self)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None) -> BERTOutput:
        """(last_hidden_state (batch, length, hidden_size), pooler_output (batch, hidden_size) or None).

        Args:
            input_ids: (batch, length) int64 or int32, tokens.
            attention_mask: (batch, length), 1 (or True) on tokens and 0 on padding, which no token sees. What the
                output holds at padding means nothing; where padding is skipped it is 0. Default: all are tokens.
            token_type_ids: (batch, length), the segment of each token. Default: 0.
            position_ids: (batch, length) or (1, length). Default: 0, 1, 2, …

        Raises:
            ValueError: a token, segment or position is out of range (checked on the CPU), a shape does not fit, the
                sequence is longer than the position table.
        """
        x, rows = self.encode(input_ids, attention_mask, token_type_ids, position_ids)
        x = rows.unpack(x)
        return BERTOutput(x, torch.tanh(self.pooler["dense"](x[:, 0])) if self.pooler is not None else None)

    def encode(self, input_ids, attention_mask, token_type_ids, position_ids) -> tuple[Tensor, Padded | Packed]:
        """The hidden states as they lie in `rows`, and `rows`, which unpacks them."""
        config = self.config
        checks.check_indices("input_ids", input_ids, None, config.vocab_size)
        if token_type_ids is not None:
            checks.check_indices("token_type_ids", token_type_ids, input_ids.shape, config.type_vocab_size)
        position_ids = checks.positions(position_ids, input_ids, config.max_position_embeddings)
        rows = layout(attention_mask, input_ids)
        types = None if token_type_ids is None else rows.pack(token_type_ids)
        x = self.embeddings(rows.pack(input_ids), types, rows.pack(position_ids))
        for layer in self.encoder["layer"]:
            x = layer(x, rows)
        return x, rows


class MaskedLMHead(nn.Module):
    """logits = E·LayerNorm(act(W·x + b)) + c, E the word embeddings.

    Untied, `decoder` has an E and a c of its own, and `bias`, which transformers writes all the same, is not used.
    """

    def __init__(self, config: BERTConfig):
        super().__init__()
        hidden = config.hidden_size
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": nn.Linear(hidden, hidden), "LayerNorm": norm})
        self.decoder = nn.Linear(hidden, config.vocab_size, device="meta" if config.tie_word_embeddings else None)
        if config.tie_word_embeddings:
            self.decoder.bias = self.bias
        self.hidden_act = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform["LayerNorm"](ACTIVATIONS[self.hidden_act](self.transform["dense"](x))))


class BERTForMaskedLM(BERTModel):
    """BERT that scores every token of the vocabulary at every place."""

    architecture = "BertForMaskedLM"
    ignored = (_POSITIONS, "bert.pooler.*", "cls.seq_relationship.*", "classifier.*", "qa_outputs.*")

    def __init__(self, config: BERTConfig | None = None, **fields):
        super().__init__(config, **fields)
        self.bert = BERT(self.config, add_pooling_layer=False)
        head = MaskedLMHead(self.config)
        self._initialise(head)
        if self.config.tie_word_embeddings:
            head.decoder.weight = self.bert.embeddings.word_embeddings.weight
        self.cls = nn.ModuleDict({"predictions": head})

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None) -> Tensor:
        """logits (batch, length, vocab_size); arguments and errors of `BERT.forward`."""
        x, rows = self.bert.encode(input_ids, attention_mask, token_type_ids, position_ids)
        return rows.unpack(self.cls["predictions"](x))


class BERTForSequenceClassification(BERTModel):
    """BERT whose pooled output is classified."""

    architecture = "BertForSequenceClassification"
    ignored = (_POSITIONS, "cls.*", "qa_outputs.*")

    def __init__(self, config: BERTConfig | None = None, **fields):
        super().__init__(config, **fields)
        config = self.config
        if not config.add_pooling_layer:
            raise ArgumentError("add_pooling_layer", "True for a classifier", False)
        self.bert = BERT(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self._initialise(self.classifier)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None) -> Tensor:
        """logits (batch, num_labels); arguments and errors of `BERT.forward`."""
        pooled = self.bert(input_ids, attention_mask, token_type_ids, position_ids).pooler_output
        return self.classifier(self.dropout(pooled))


class Spans(NamedTuple):
    """Where an answer starts and ends: start_logits and end_logits, (batch, length) each."""

    start_logits: Tensor
    end_logits: Tensor


class BERTForQuestionAnswering(BERTModel):
    """BERT that scores every place as the start and as the end of the answer."""

    architecture = "BertForQuestionAnswering"
    ignored = (_POSITIONS, "bert.pooler.*", "cls.*", "classifier.*")

    def __init__(self, config: BERTConfig | None = None, **fields):
        super().__init__(config, **fields)
        self.bert = BERT(self.config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(self.config.hidden_size, 2)
        self._initialise(self.qa_outputs)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None) -> Spans:
        """(start_logits, end_logits), (batch, length) each; arguments and errors of `BERT.forward`."""
        x, rows = self.bert.encode(input_ids, attention_mask, token_type_ids, position_ids)
        return Spans(*(t.contiguous() for t in rows.unpack(self.qa_outputs(x)).unbind(-1)))
