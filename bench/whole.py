"""Whole models, fused or built on this package, against the same model in PyTorch's best form: rows as data."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ops
from bench.pretrained import minilm, text
from bench.pretrained.weights import locate
from fused_ops import models
from tests.support import randn

Calls = dict[str, Callable[[], Tensor]]

TOLERANCE = 2e-4  # of the largest output: float32 through a whole network


@dataclass(frozen=True)
class Rivals:
    """Calls that give one tensor, to `tolerance` of its largest value: ours, PyTorch's eager forms, torch.compile's."""

    ours: Calls
    eager: Calls
    compiled: Calls = field(default_factory=dict)
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Model:
    """A line of the model table. `build(device)` makes the models and their input."""

    name: str
    build: Callable[[str], Rivals]
    devices: tuple[str, ...] = ("cpu", "cuda")


def _layouts(name: str, model: nn.Module, images: Tensor) -> Calls:
    """A call of the model, and one in channels_last."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)
    return {name: lambda: model(images), f"{name} channels_last": lambda: last(images_last)}


def resnet50(batch: int):
    def build(device):
        from tests.third_party import torchvision

        torch.manual_seed(0)
        plain = torchvision.models.resnet50().eval().requires_grad_(False).to(device)
        images = randn(batch, 3, 224, 224, device=device)
        fused = copy.deepcopy(plain)
        fused_ops.fuse(fused)
        compiled = torch.compile(copy.deepcopy(plain), options={"freezing": True})
        ours, eager = (_layouts(name, model, images) for name, model in (("fused", fused), ("eager", plain)))
        return Rivals(ours, eager, {"compile": lambda: compiled(images)})

    return build


def ragged_minilm(device: str) -> Rivals:
    """Sentence vectors of 16 sentences between 4 and 49 tokens long."""
    from tests.third_party import transformers

    folder = locate(minilm.DISTRIBUTION, "model.safetensors").parent
    ids, mask = (t.to(device) for t in minilm.tokenise(text.sentences(16)))
    ours = models.BERT.from_pretrained(folder).requires_grad_(False).to(device)
    theirs = transformers.BertModel.from_pretrained(folder).eval().requires_grad_(False).to(device)
    long = mask.long()

    def vectors(model: nn.Module, mask: Tensor) -> Tensor:
        x = model(ids, attention_mask=mask)[0]
        return F.normalize((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)

    return Rivals({"BERT": lambda: vectors(ours, mask)}, {"transformers, SDPA": lambda: vectors(theirs, long)})


def stacked_lstm(device: str) -> Rivals:
    torch.manual_seed(0)
    plain = nn.LSTM(40, 256, 3, batch_first=True).eval().requires_grad_(False).to(device)
    fused, x = copy.deepcopy(plain), randn(8, 160, 40, device=device)
    fused_ops.fuse(fused)
    return Rivals({"fused": lambda: fused(x)[0]}, {"eager": lambda: plain(x)[0]})


class PlainCNN(nn.Module):
    """`fused_ops.models.CNN` in torch.nn, with the same state_dict."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(64 * 7 * 7, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def _step(loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    @torch.enable_grad()
    def call() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def training_step(batch: int):
    """Forward, backward and a step of SGD; the result is the loss."""

    def build(device):
        torch.manual_seed(0)
        images, labels = randn(batch, 3, 28, 28, device=device), torch.arange(batch, device=device) % 10
        plain = PlainCNN().to(device)
        ours = models.CNN().to(device)
        ours.load_state_dict(plain.state_dict())

        def step(model: nn.Module, layout: torch.memory_format) -> Callable[[], Tensor]:
            model, x = copy.deepcopy(model).to(memory_format=layout), images.contiguous(memory_format=layout)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
            return _step(lambda: F.cross_entropy(model(x), labels), optimizer)

        layouts = {"": torch.contiguous_format, " channels_last": torch.channels_last}
        return Rivals(
            {f"CNN{name}": step(ours, layout) for name, layout in layouts.items()},
            {f"eager{name}": step(plain, layout) for name, layout in layouts.items()},
        )

    return build


def generation(prompt: int, tokens: int):
    """GPT-2 small with a cache of keys and values, greedily; the result is the text's tokens."""

    def build(device):
        from tests.third_party import transformers

        torch.manual_seed(0)
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().requires_grad_(False).to(device)
        ours = models.GPT().eval().requires_grad_(False).to(device)
        ours.load_state_dict(theirs.state_dict())
        ids = torch.randint(0, 50257, (1, prompt), device=device)
        greedy = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
        greedy |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens}
        return Rivals(
            {"GPT": lambda: ours.generate(ids, tokens, temperature=0.0, eos_token_id=()).float()},
            {"transformers, SDPA": lambda: theirs.generate(ids, **greedy).float()},
        )

    return build


def language_training(ours: type, theirs: str, config: str, batch: int, length: int, **sizes):
    """A step of fused AdamW on a token each under bfloat16 autocast, without dropout; the result is the loss."""

    def build(device):
        from tests.third_party import transformers

        torch.manual_seed(0)
        plain = getattr(transformers, theirs)(getattr(transformers, config)(**sizes)).eval().to(device)
        own = ours(**sizes).eval().to(device)
        own.load_state_dict(plain.state_dict(), strict=False)
        ids = torch.randint(0, own.config.vocab_size, (batch, length), device=device)
        labels = ids.roll(-1, 1).flatten()

        def step(model: nn.Module, compiled: bool = False) -> Callable[[], Tensor]:
            model = copy.deepcopy(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
            forward = torch.compile(model) if compiled else model

            def loss() -> Tensor:
                with torch.autocast(device, torch.bfloat16):
                    logits = forward(ids)
                    logits = logits if isinstance(logits, Tensor) else logits.logits
                    return F.cross_entropy(logits.flatten(0, 1), labels)

            return _step(loss, optimizer)

        return Rivals(
            {ours.__name__: step(own), f"{ours.__name__}, compiled": step(own, True)},
            {"transformers, SDPA": step(plain)},
            {"transformers, compiled": step(plain, True)},
            tolerance=2**-8,
        )

    return build


MODELS = (
    Model("ResNet-50, batch 1", resnet50(1)),
    Model("ResNet-50, batch 8", resnet50(8)),
    Model("MiniLM-L6, 16 ragged sentences", ragged_minilm),
    Model("LSTM 40→256, 3 layers, batch 8, T=160", stacked_lstm),
    Model("CNN training step, batch 64", training_step(64)),
    Model("GPT-2 small, 32 tokens after 32", generation(32, 32)),
    Model(
        "GPT-2 small training step, 8×1024, bf16",
        language_training(models.GPT, "GPT2LMHeadModel", "GPT2Config", 8, 1024),
        ("cuda",),
    ),
    Model(
        "BERT base training step, 32×512, bf16",
        language_training(models.BERTForMaskedLM, "BertForMaskedLM", "BertConfig", 32, 512),
        ("cuda",),
    ),
)
