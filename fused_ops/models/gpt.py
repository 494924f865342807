"""GPT-2: a causal language model, and generation with a cache of keys and values.

Source: Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ops
from fused_ops.core.errors import ArgumentError
from fused_ops.models import checks
from fused_ops.models.checkpoint import Pretrained
from fused_ops.models.language import ACTIVATIONS, Head
from fused_ops.models.sampling import check_sampling, sample


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`, by the names and with the defaults of transformers' GPT2Config.

    Args:
        n_positions: the longest sequence, in tokens.
        n_inner: hidden size of the perceptron; default: 4·n_embd.
        activation_function: "gelu_new" or "gelu_tanh" (one function), "gelu", "relu", "silu" or "tanh".
        scale_attn_weights: scores are divided by √(head dim).
        scale_attn_by_inverse_layer_idx: and by the layer's number, from 1.
        eos_token_id: the token or tokens that end a text, or None.
        pad_token_id: what follows the end of a text beside longer ones; default: eos_token_id.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | Sequence[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self):
        checks.check_choice("activation_function", self.activation_function, ACTIVATIONS)
        checks.check_heads("n_head", self.n_embd, self.n_head)


class Causal:
    """Attention of whole sequences: a token sees those up to it, of them only where `mask` (batch, length) is not 0."""

    drops = True

    def __init__(self, mask: Tensor | None = None):
        self.mask = mask
        if mask is not None:
            before = torch.ones(mask.size(1), mask.size(1), dtype=torch.bool, device=mask.device).tril()
            self.mask = (mask != 0)[:, None, None] & before

    def attend(self, layer: int, qkv: Tensor, heads: int, scale: float, dropout_p: float) -> Tensor:
        """Queries, keys and values (batch, length, 3·hidden) -> (batch, length, hidden)."""
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        out = fused_ops.scaled_dot_product_attention(
            q, k, v, self.mask, dropout_p, is_causal=self.mask is None, scale=scale
        )
        return out.transpose(1, 2).flatten(2)


class Cache:
    """The keys and values of the tokens so far: first those of a prompt, then one more of each row in every call.

    A layer's lie as they are computed, (batch·capacity, 2·hidden). Every row starts at place 0, however long it is:
    what the padding of a prompt leaves behind is never read, and written over.
    """

    drops = False

    def __init__(self, config: GPTConfig, lengths: Tensor, capacity: int):
        self.config, self.capacity = config, capacity
        rows = torch.arange(lengths.size(0), device=lengths.device)
        self.lengths, self.places = lengths, rows * capacity + lengths - 1
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []

    def _allocate(self, qkv: Tensor) -> None:
        batch, hidden = qkv.size(0), self.config.n_embd
        store = qkv.new_empty((batch * self.capacity, 2 * hidden))
        keys, values = store.view(batch, self.capacity, 2, self.config.n_head, -1).permute(2, 0, 3, 1, 4)
        self.layers.append((store, keys, values))

    def advance(self) -> Tensor:
        """Make room for one more token in each row; its position there, (batch,)."""
        positions, self.lengths = self.lengths, self.lengths + 1
        self.places = self.places + 1
        return positions

    def attend(self, layer: int, qkv: Tensor, heads: int, scale: float, dropout_p: float) -> Tensor:
        """Queries, keys and values (batch, length, 3·hidden), of a prompt or one token -> (batch, length, hidden)."""
        if layer == len(self.layers):
            self._allocate(qkv)
        store, keys, values = self.layers[layer]
        batch, length, width = qkv.shape
        if length > 1:
            store.view(batch, -1, store.size(1))[:, :length] = qkv[..., width // 3 :]
            return Causal().attend(layer, qkv, heads, scale, 0.0)
        store.index_copy_(0, self.places, qkv[:, 0, width // 3 :])
        q = qkv[..., : width // 3].view(batch, heads, 1, -1)
        return fused_ops.decode_attention(q, keys, values, self.lengths, scale=scale).view(batch, 1, -1)


class Conv1D(nn.Module):
    """x·W + b with W (in_features, out_features), as GPT-2's checkpoints keep it."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Block(nn.Module):
    """x += attention(LayerNorm(x)); x += W_2·act(W_1·LayerNorm(x))."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        hidden, inner = config.n_embd, config.n_inner or 4 * config.n_embd
        self.scale = (hidden // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.ln_1 = nn.LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.attn = nn.ModuleDict({"c_attn": Conv1D(hidden, 3 * hidden), "c_proj": Conv1D(hidden, hidden)})
        self.ln_2 = nn.LayerNorm(hidden, eps=config.layer_norm_epsilon)
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(hidden, inner), "c_proj": Conv1D(inner, hidden)})

    def forward(self, x: Tensor, rows: Causal | Cache) -> Tensor:
        config, drops = self.config, self.training and rows.drops
        qkv = self.attn["c_attn"](self.ln_1(x))
        heads = rows.attend(self.layer, qkv, config.n_head, self.scale, config.attn_pdrop if drops else 0.0)
        x = x + F.dropout(self.attn["c_proj"](heads), config.resid_pdrop, drops)
        inner = ACTIVATIONS[config.activation_function](self.mlp["c_fc"](self.ln_2(x)))
        return x + F.dropout(self.mlp["c_proj"](inner), config.resid_pdrop, drops)


class GPT(Pretrained):
    """GPT-2: logits of the next token at every place; `generate` continues a text.

    Args:
        config: a `GPTConfig`; default: GPT-2 small.
        fields: fields of the configuration, by keyword, instead of the config's.
    """

    config_class = GPTConfig
    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    fixed = {"add_cross_attention": False}  # noqa: RUF012
    ignored = ("*.attn.bias", "*.attn.masked_bias", "score.*", "multiple_choice_head.*")

    def __init__(self, config: GPTConfig | None = None, **fields):
        super().__init__()
        self.config = config = replace(config or GPTConfig(), **fields)
        hidden = config.n_embd
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, hidden),
                "wpe": nn.Embedding(config.n_positions, hidden),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(hidden, eps=config.layer_norm_epsilon),
            }
        )
        tied = config.tie_word_embeddings
        self.lm_head = Head(hidden, config.vocab_size, device="meta" if tied else None)
        if tied:
            self.lm_head.weight = self.transformer["wte"].weight
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights, of the layers that end in a sum smaller by √(2·n_layer) (section 2.3), and zero biases."""
        std = self.config.initializer_range
        for name, weight in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(weight, std=std / (2 * self.config.n_layer) ** 0.5)
            elif "ln_" not in name and name.endswith("weight"):
                nn.init.normal_(weight, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    @classmethod
    def renamed(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first checkpoints hold the transformer alone, without its name before the keys."""
        parts = ("wte.", "wpe.", "h.", "ln_f.")
        return {f"transformer.{key}" if key.startswith(parts) else key: tensor for key, tensor in state.items()}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """logits (batch, length, vocab_size).

        Args:
            input_ids: (batch, length) int64 or int32, tokens.
            attention_mask: (batch, length), 1 (or True) on tokens and 0 on padding, which no token sees; the logits at
                padding mean nothing. Padding on the right needs none. Default: all are tokens.
            position_ids: (batch, length) or (1, length). Default: 0, 1, 2, …

        Raises:
            ValueError: a token or position is out of range (checked on the CPU), a shape does not fit, the sequence
                is longer than the position table.
        """
        config = self.config
        checks.check_indices("input_ids", input_ids, None, config.vocab_size)
        position_ids = checks.positions(position_ids, input_ids, config.n_positions)
        if attention_mask is not None:
            checks.check_shape("attention_mask", attention_mask, *input_ids.shape)
            if checks.readable(attention_mask) and attention_mask.all():
                attention_mask = None
        return self.lm_head(self._hidden(input_ids, position_ids, Causal(attention_mask)))

    def _hidden(self, ids: Tensor, positions: Tensor, rows: Causal | Cache) -> Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](positions)
        x = F.dropout(x, self.config.embd_pdrop, self.training and rows.drops)
        for block in self.transformer["h"]:
            x = block(x, rows)
        return self.transformer["ln_f"](x)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        stream: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """ids (batch, length), continued token by token: (batch, length + n), n at most max_new_tokens.

        Each token is drawn from softmax(logits / temperature), restricted to the `top_k` most probable tokens and of
        these to the fewest whose probabilities reach `top_p`. No dropout, in whatever mode the model is.

        Args:
            attention_mask: (batch, length), 1 (or True) on tokens and 0 on padding to the left or right of them.
                Tokens count their positions from their own first one. Default: all are tokens.
            temperature: 0 takes the most probable token.
            top_k: at least 1. Default: all.
            top_p: in (0, 1]. Default: 1.
            eos_token_id: the token or tokens that end a text; a row that has ended goes on with the configuration's
                pad_token_id, or the first of these, and when all have, so does the call. Default: the configuration's;
                () for none.
            generator: of the draws, on the model's device. Default: torch's own.
            stream: called with each new token (batch,) as soon as it is chosen.

        Raises:
            ValueError: an argument is out of its range, a row holds no token or padding between tokens, or the text
                would grow longer than the position table.

        Source: top_k: Fan et al. 2018, section 5.1; top_p: Holtzman et al. 2020, section 3.1.
        """
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        checks.check_indices("ids", ids, None, self.config.vocab_size)
        prompt, lengths = left_aligned(ids, attention_mask)
        checks.check_length("ids", prompt.size(1), self.config.n_positions)
        most = self.config.n_positions + 1 - prompt.size(1)
        if max_new_tokens > most:
            wanted = f"at most {most} after {prompt.size(1)} tokens (the position table has {self.config.n_positions})"
            raise ArgumentError("max_new_tokens", wanted, max_new_tokens)
        out = torch.cat((ids, ids.new_empty(ids.size(0), max_new_tokens)), 1)
        if max_new_tokens == 0 or ids.size(0) == 0:
            return out
        ends = self.config.eos_token_id if eos_token_id is None else eos_token_id
        ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
        pad = self.config.pad_token_id if self.config.pad_token_id is not None or not ends else ends[0]
        endings = torch.tensor(ends, dtype=ids.dtype, device=ids.device)
        done = torch.zeros(ids.size(0), dtype=torch.bool, device=ids.device)

        cache = Cache(self.config, lengths, prompt.size(1) + max_new_tokens)
        places = torch.arange(prompt.size(1), device=ids.device)[None]
        x = self._hidden(prompt, places, cache)[torch.arange(ids.size(0), device=ids.device), lengths - 1]
        for place in range(ids.size(1), out.size(1)):
            token = sample(self.lm_head(x), temperature, top_k, top_p, generator).to(ids.dtype)
            shown = token
            if ends:
                shown = token.masked_fill(done, pad)
                done |= torch.isin(token, endings)
            out[:, place] = shown
            if stream is not None:
                stream(shown)
            if place + 1 == out.size(1) or (ends and done.all()):
                break
            x = self._hidden(token[:, None], cache.advance()[:, None], cache)[:, 0]
        return out[:, : place + 1]


def left_aligned(ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each row's tokens moved to its start, (batch, longest), and how many they are, (batch,)."""
    batch, length = ids.shape
    if attention_mask is None:
        if length == 0:
            raise ArgumentError("ids", "at least one token long", tuple(ids.shape))
        return ids, torch.full((batch,), length, device=ids.device)
    checks.check_shape("attention_mask", attention_mask, *ids.shape)
    mask = attention_mask != 0
    lengths, places = mask.sum(1), torch.arange(length, device=ids.device)
    starts = mask.int().argmax(1) if length else lengths
    run = (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
    broken = ((lengths == 0) | (mask != run).any(1)).nonzero()
    if len(broken):
        raise ArgumentError(
            "attention_mask", "one unbroken run of tokens in each row", f"row {broken[0].item()} without"
        )
    longest = int(lengths.max()) if batch else 0
    return ids.gather(1, (starts[:, None] + places[:longest]).clamp(max=length - 1)), lengths
