"""Checkpoints: one file each, written aside and renamed, so that what has the name is always whole."""

import os
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fused_ops.core.errors import ArgumentError
from fused_ops.train import parallel
from fused_ops.train.config import Config

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SCATTERED = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def weights(model: nn.Module) -> dict[str, Any]:
    """Every weight, whole, on the CPU of the first process; a call of all processes."""
    return get_model_state_dict(model, options=_GATHERED)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As `weights`: what the optimizer keeps of each."""
    return get_optimizer_state_dict(model, optimizer, options=_GATHERED)


def set_weights(model: nn.Module, state: dict[str, Any]) -> None:
    set_model_state_dict(model, state, options=_SCATTERED if parallel.world() > 1 else _GATHERED)


def set_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    set_optimizer_state_dict(model, optimizer, state, options=_SCATTERED if parallel.world() > 1 else _GATHERED)


def random_state(device: torch.device) -> dict[str, Any]:
    """Where this process's random numbers are."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def write(path: Path, state: dict[str, Any]) -> None:
    """`state` becomes `path` once all of it is on the disk; until then, and if that fails, `path` is what it was.

    Raises:
        OSError: it cannot be written; the message says what is kept.
    """
    scratch = path.with_name(f"{path.name}.partial")
    try:
        with open(scratch, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:
        scratch.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides the first behind its own
        if not isinstance(cause, OSError):
            raise
        kept = f"{path} of before is whole" if path.exists() else "there is none of before"
        raise OSError(cause.errno, f"cannot save {path} ({cause.strerror}); {kept}") from error


def read(path: Path, recipe: str) -> dict[str, Any]:
    """A checkpoint of `recipe`.

    Raises:
        ValueError: there is none, or it is truncated or another recipe's.
    """
    if not path.is_file():
        raise ArgumentError("resume", "a checkpoint", f"{path}, which {'is a folder' if path.exists() else 'is none'}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn pickle raises whatever it likes
        got = f"{path}, which torch.load cannot read ({type(error).__name__})"
        raise ArgumentError("resume", "a whole checkpoint", got) from error
    found = state.get("recipe") if isinstance(state, dict) else None
    if found != recipe:
        got = f"{path} of {found!r}" if found else f"{path}, which this program did not write"
        raise ArgumentError("resume", f"a checkpoint of the recipe {recipe!r}", got)
    return state


def check_same_run(state: dict[str, Any], config: Config, path: Path, facts: dict[str, int]) -> None:
    """That going on from `state` continues the run that `config` describes, on as many processes and samples."""
    if "optimizer" not in state:
        raise ArgumentError("resume", "a checkpoint to go on from (last.pt)", f"{path}, which has weights alone")
    if path.parent.resolve() != config.output_dir.resolve():
        raise ArgumentError("output_dir", f"{path.parent}, the folder of the run to go on with", config.output_dir)
    ours = {name: value for name, value in config.values().items() if name not in config.free} | facts
    theirs = state["config"] | {name: state[name] for name in facts}
    other = [name for name, value in ours.items() if theirs.get(name) != value]
    changed = [f"{name} {theirs.get(name)} instead of {ours[name]}" for name in other]
    if changed:
        raise ArgumentError("resume", "a checkpoint of a run with these options", f"{path} with {', '.join(changed)}")


def check_fits(weights: dict[str, Any], model: nn.Module, path: Path) -> None:
    """That `weights` are those of `model`."""
    ours = {name: tuple(weight.shape) for name, weight in get_model_state_dict(model).items()}
    theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
    unlike = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if unlike:
        name, more = unlike[0], len(unlike) - 1
        got = f"{path} with {name} {theirs.get(name)} instead of {ours.get(name)}, and {more} more differences"
        raise ArgumentError("resume", "a checkpoint of this model", got)
