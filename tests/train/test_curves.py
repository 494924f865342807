"""Training with this package's models and training with other people's, from the same weights, is the same training."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ops
from fused_ops.core.dispatch import record
from tests.third_party import transformers
from tests.train.material import TINY, tiny
from tests.train.runs import again, rows, train

STEPS = 200


class PlainCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(256, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class PlainLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(8, 12, 2, batch_first=True), nn.Linear(12, 10)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class Logits(nn.Module):
    """A model of transformers', called as this package's are."""

    def __init__(self, model: nn.Module, *names: str):
        super().__init__()
        self.model, self.names = model, names

    def load_state_dict(self, state, **options):
        return self.model.load_state_dict(state, **options)

    def forward(self, *inputs: Tensor):
        found = self.model(*inputs)
        values = tuple(found[name] for name in self.names)
        return values if len(values) > 1 else values[0]


def plain_gpt(model) -> nn.Module:
    config = {name: value for name, value in vars(model.config).items() if value is not None}
    return Logits(transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)), "logits")


def plain_bert(model) -> nn.Module:
    config = {name: value for name, value in vars(model.config).items() if value is not None}
    plain = transformers.BertForQuestionAnswering(transformers.BertConfig(**config))
    return Logits(plain, "start_logits", "end_logits")


PLAIN = {"image": lambda _: PlainCNN(), "sequence": lambda _: PlainLSTM(), "language": plain_gpt, "qa": plain_bert}


def losses(folder) -> Tensor:
    return torch.tensor([float(row["loss"]) for row in rows(folder / "run") if row["loss"]])


@pytest.mark.parametrize("name", TINY)
def test_loss_curves_are_those_of_plain_models(name, tmp_path):
    options = {"max_steps": STEPS, "eval_steps": STEPS, "save_steps": STEPS}
    if name != "image":
        options["dropout"] = 0.0  # each implementation draws its own
    recipe = tiny(name, tmp_path, **options)
    with record() as choices:
        train(recipe)
    fused = losses(tmp_path)
    recipe = again(name, tmp_path, **options)
    model = recipe.model

    def plain_model() -> nn.Module:
        ours = model()
        plain = PLAIN[name](ours)
        plain.load_state_dict(ours.state_dict())
        return plain

    recipe.model = plain_model
    train(recipe)
    plain = losses(tmp_path)
    assert len(fused) == len(plain) == STEPS and choices
    assert plain[-20:].mean() < 0.9 * plain[:20].mean()
    torch.testing.assert_close(fused, plain, rtol=0.01, atol=0)


@pytest.mark.parametrize("name", TINY)
def test_loss_curves_are_those_of_the_reference(name, tmp_path):
    options = {"max_steps": STEPS, "eval_steps": STEPS, "save_steps": STEPS}
    curves = []
    for backend in (None, "reference"):
        with fused_ops.use_backend(backend):
            train(again(name, tmp_path, **options))
        curves.append(losses(tmp_path))
    torch.testing.assert_close(*curves, rtol=0.01, atol=0)
