"""Options: a dataclass a recipe, each field of it an option on the command line."""

import argparse
import re
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fused_ops.core.errors import ArgumentError


@dataclass(frozen=True)
class Config:
    """What every recipe can be told. A recipe adds fields and sets defaults of its own.

    Attributes:
        output_dir: where checkpoints, logs and results go.
        resume: a checkpoint (last.pt) to go on from: same options, same weights as a run that never stopped.
        test_only: evaluate the checkpoint that --resume names on the held-out data, and stop.
        epochs: passes over the training data.
        max_steps: optimizer steps, instead of epochs.
        batch_size: samples a process takes at once.
        gradient_accumulation_steps: batches whose gradients are averaged for one optimizer step.
        opt: the optimizer.
        lr: its learning rate, after warm-up.
        min_lr: where the cosine ends.
        warmup_ratio: share of the steps in which the learning rate rises to lr.
        weight_decay: of matrices; biases and norms have none.
        momentum: Nesterov's, of sgd.
        adam_beta2: of adamw.
        clip_grad_norm: the largest norm of the gradient; 0 for no limit.
        bf16: autocast to bfloat16.
        eval_steps: optimizer steps between two validations; default: an epoch.
        save_steps: optimizer steps between two checkpoints; default: eval_steps.
        log_steps: optimizer steps between two lines of the logs.
        patience: validations without progress after which training stops.
        seed: of initial weights, order, augmentation and dropout.
        workers: processes that load data; 0: the training process itself.
        device: default: cuda if there is one.
        parallel: under torchrun, whether each process has the whole model (ddp) or a part of it (fsdp).
        use_deterministic_algorithms: on a GPU, what makes two runs equal bit for bit.
        sweep: trials of other learning rates and batch sizes; the best one's model is what is tested.
        sweep_range: trials draw lr between lr / sweep_range and lr · sweep_range, and batch_size halved, kept, doubled.
    """

    output_dir: Path = Path("run")
    resume: Path | None = None
    test_only: bool = False
    epochs: int = 10
    max_steps: int | None = None
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    opt: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup_ratio: float = 0.05
    weight_decay: float = 0.01
    momentum: float = 0.9
    adam_beta2: float = 0.999
    clip_grad_norm: float = 1.0
    bf16: bool = False
    eval_steps: int | None = None
    save_steps: int | None = None
    log_steps: int = 10
    patience: int | None = None
    seed: int = 0
    workers: int = 0
    device: Literal["cpu", "cuda"] | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"
    use_deterministic_algorithms: bool = False
    sweep: int = 0
    sweep_range: float = 10.0

    # Fields that may differ from the run that a checkpoint is of.
    free = frozenset(
        ("output_dir", "resume", "test_only", "log_steps", "workers", "device", "parallel", "sweep", "sweep_range")
    )

    # The least that a number may be, and what has to be a share.
    least = dict.fromkeys(("epochs", "batch_size", "gradient_accumulation_steps", "log_steps", "sweep_range"), 1)
    least |= dict.fromkeys(("max_steps", "eval_steps", "save_steps", "patience"), 1)
    least |= dict.fromkeys(("weight_decay", "clip_grad_norm", "workers", "sweep"), 0)
    shares = frozenset(("warmup_ratio", "momentum", "adam_beta2"))

    def __post_init__(self):
        for name, bound in self.least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ArgumentError(name, f"at least {bound}", value)
        for name in sorted(self.shares):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(name, "between 0 and 1", getattr(self, name))
        if not 0 <= self.min_lr <= self.lr or self.lr == 0:
            raise ArgumentError("lr", "above 0 and at least min_lr", f"{self.lr} with min_lr {self.min_lr}")
        if self.adam_beta2 == 1:
            raise ArgumentError("adam_beta2", "below 1", self.adam_beta2)
        if not 0 <= self.seed < 2**32:
            raise ArgumentError("seed", "between 0 and 2**32 - 1", self.seed)
        if self.test_only and self.resume is None:
            raise ArgumentError("resume", "the checkpoint to be tested", None)

    def values(self) -> dict[str, str | int | float | bool | None]:
        """The fields as a checkpoint keeps them."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}


def parse(config: type[Config], prog: str, arguments: list[str]) -> Config:
    """A command line as a `config`. --batch-size may be written --batch_size; what is a bool has a --no- form."""
    usage, purpose = f"{prog} [options]; --help lists them", config.__doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog, usage, purpose, allow_abbrev=False)
    kinds, helps = get_type_hints(config), _helps(config)
    for field in fields(config):
        text = helps[field.name] + ("" if field.default is None else f" (default: {field.default})")
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, default=field.default, help=text.replace("%", "%%"), **_kind(kinds[field.name]))
    dashed = [re.sub(r"^--[\w-]+", _dashed, argument) for argument in arguments]
    return config(**vars(parser.parse_args(dashed)))


def _dashed(option: re.Match) -> str:
    return option[0].replace("_", "-")


def _kind(hint: Any) -> dict[str, Any]:
    """How argparse reads a field of this type; `T | None` is read as T."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    return {"action": argparse.BooleanOptionalAction} if hint is bool else {"type": hint}


def _helps(config: type[Config]) -> dict[str, str]:
    """What the docstrings of `config` and its bases say of each field."""
    found = {}
    for base in (base for base in reversed(config.__mro__) if base.__doc__):
        for names, text in re.findall(r"^ {8}(\w+(?:, \w+)*): (.+(?:\n {12}.+)*)", base.__doc__, re.M):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found
