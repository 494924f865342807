"""g2p-en: a GRU encoder and a GRU-cell decoder that spell an English word as ARPAbet phonemes.

Source: Park and Kim 2019, https://github.com/Kyubyong/g2p; sequence to sequence as in Sutskever et al. 2014
(https://arxiv.org/abs/1409.3215).
"""

import ast
import string
import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from . import text
from .weights import locate, require

DISTRIBUTION = "g2p-en"
GRAPHEMES = ("<pad>", "<unk>", "</s>", *string.ascii_lowercase)
START, END = 2, 3  # <s> and </s> among the phonemes
STEPS = 20
TRUTH = {
    "kernel": "K ER1 N AH0 L",
    "convolution": "K AA2 N V AH0 L UW1 SH AH0 N",
    "transformer": "T R AE0 N S F AO1 R M ER0",
}


class G2P(nn.Module):
    """h = encoder(word); then, greedily, h = decoder(embed(phoneme), h), phoneme = argmax fc(h)."""

    def __init__(self, graphemes: int = len(GRAPHEMES), phonemes: int = 74, hidden: int = 256):
        super().__init__()
        self.enc_emb = nn.Embedding(graphemes, hidden)
        self.encoder = nn.GRU(hidden, hidden, batch_first=True)
        self.dec_emb = nn.Embedding(phonemes, hidden)
        self.decoder = nn.GRUCell(hidden, hidden)
        self.fc = nn.Linear(hidden, phonemes)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """words (words, longest) int64, lengths (words,) int64 -> logits (words, 20, phonemes).

        A word's logits end with the step that says </s> and are 0 after it, whatever the words beside it do.
        """
        letters = pack_padded_sequence(self.enc_emb(words), lengths.cpu(), batch_first=True, enforce_sorted=False)
        h = self.encoder(letters)[1][0]
        logits = h.new_zeros(len(words), STEPS, self.fc.out_features)
        phoneme = torch.full_like(lengths, START, device=h.device)
        speaking = torch.ones_like(phoneme, dtype=torch.bool)
        for step in range(STEPS):
            h = self.decoder(self.dec_emb(phoneme), h)
            logits[:, step] = self.fc(h) * speaking[:, None]
            phoneme = logits[:, step].argmax(-1)
            speaking &= phoneme != END
            if not speaking.any():
                break
        return logits


PLACES = {
    "enc_emb": "enc_emb.weight",
    "enc_w_ih": "encoder.weight_ih_l0",
    "enc_w_hh": "encoder.weight_hh_l0",
    "enc_b_ih": "encoder.bias_ih_l0",
    "enc_b_hh": "encoder.bias_hh_l0",
    "dec_emb": "dec_emb.weight",
    "dec_w_ih": "decoder.weight_ih",
    "dec_w_hh": "decoder.weight_hh",
    "dec_b_ih": "decoder.bias_ih",
    "dec_b_hh": "decoder.bias_hh",
    "fc_w": "fc.weight",
    "fc_b": "fc.bias",
}


def convert(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint under G2P's names; a tensor without a place is a KeyError."""
    return {PLACES[key]: tensor for key, tensor in checkpoint.items()}


def checkpoint() -> dict[str, Tensor]:
    """The published tensors under their own names."""
    path = locate(DISTRIBUTION, "checkpoint20.npz")
    with require("numpy").load(path) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def build() -> G2P:
    """The pretrained model in eval mode, without gradients."""
    model = G2P()
    model.load_state_dict(convert(checkpoint()))
    return model.eval().requires_grad_(False)


def phonemes() -> list[str]:
    """The 74 phonemes in the order of the logits, as the package's source lists them (parsed, never run)."""
    source = locate(DISTRIBUTION, "g2p.py").read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the source has invalid escapes
        tree = ast.parse(source)
    (value,) = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "self.phonemes"
    )
    return [node.value for node in ast.walk(value) if isinstance(node, ast.Constant)]


def encode(words: list[str]) -> tuple[Tensor, Tensor]:
    """Lower-case words -> their graphemes, </s> last, (words, longest) padded with 0, and their lengths (words,)."""
    rows = [torch.tensor([GRAPHEMES.index(grapheme) for grapheme in (*word, "</s>")]) for word in words]
    return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def decode(logits: Tensor) -> list[str]:
    """logits (words, steps, phonemes) -> each word's phonemes up to </s>, separated by spaces."""
    names = phonemes()
    spoken = []
    for row in logits.argmax(-1).tolist():
        end = row.index(END) if END in row else len(row)
        spoken.append(" ".join(names[index] for index in row[:end]))
    return spoken


def inputs() -> tuple[Tensor, Tensor]:
    """A few hundred words of real text: graphemes (words, longest) and lengths (words,)."""
    return encode(text.words())


def truth(model: nn.Module) -> list[tuple[str, bool]]:
    """Three words and how they are pronounced."""
    words, lengths = encode(list(TRUTH))
    device = next(model.parameters()).device
    with torch.no_grad():
        spoken = decode(model(words.to(device), lengths.to(device)))
    return [(f"{word} is {want}", got == want) for (word, want), got in zip(TRUTH.items(), spoken, strict=True)]
