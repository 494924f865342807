"""Trials of learning rates and batch sizes."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState as State
from sqlalchemy.exc import SQLAlchemyError

from fused_ops.core.errors import ArgumentError
from fused_ops.train import parallel
from fused_ops.train.config import Config
from fused_ops.train.loop import Trainer
from fused_ops.train.recipe import Recipe


def sweep(recipe: type[Recipe], config: Config, device: torch.device) -> Config:
    """The options of the best trial, by the metric in validation, of as many as `config.sweep` says.

    Each has a folder of its own in output_dir, whose sweep.db remembers them all: called again, a sweep that was cut
    short runs the trials that it lacks. A trial whose loss is not finite has failed.

    Source of the draws: Bergstra et al. 2011, section 4, as Optuna has it.
    """
    if config.resume is not None:
        raise ArgumentError("resume", "None in a sweep (sweep.db remembers what is done)", config.resume)
    parallel.from_first(partial(config.output_dir.mkdir, parents=True, exist_ok=True))
    with _remembering(config.output_dir / "sweep.db") as path:
        return _best(recipe, config, device, path)


def _best(recipe: type[Recipe], config: Config, device: torch.device, path: Path) -> Config:
    first = parallel.rank() == 0
    study = _open(recipe, config, path) if first else None
    while parallel.from_first(lambda: len(_done(study)) < config.sweep):
        trial = study.ask() if first else None
        options = parallel.from_first(partial(_drawn, trial, config))
        value, state = None, State.FAIL
        with suppress(FloatingPointError):
            value, state = Trainer(recipe(options), device).train(), State.COMPLETE
        if first:
            study.tell(trial, value, state)
            print(f"{_described(options)}: {recipe.metric_for_best_model} {value}", flush=True)
    if not parallel.from_first(lambda: bool(study.get_trials(states=[State.COMPLETE]))):
        raise FloatingPointError("the loss was not finite in any trial of the sweep: a lower lr may help")
    best = parallel.from_first(lambda: _drawn(study.best_trial, config))
    if first:
        print(f"best of {config.sweep}: {_described(best)}")
    return best


@contextmanager
def _remembering(path: Path) -> Iterator[Path]:
    """What a database raises is an OSError that names its file."""
    try:
        yield path
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise OSError(f"cannot use {path} ({cause})") from error


def _described(options: Config) -> str:
    return f"{options.output_dir.name}, lr {options.lr:.3g}, batch_size {options.batch_size}"


def _open(recipe: type[Recipe], config: Config, path: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{path}",
        study_name=recipe.name,
        direction="maximize" if recipe.greater_is_better else "minimize",
        load_if_exists=True,
    )
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))  # not the same draws again
    return study


def _done(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=[State.COMPLETE, State.FAIL])


def _drawn(trial: optuna.trial.BaseTrial, config: Config) -> Config:
    """The options of a trial, drawn if they are not yet."""
    sizes = sorted({max(1, config.batch_size // 2), config.batch_size, 2 * config.batch_size})
    lr = trial.suggest_float("lr", config.lr / config.sweep_range, config.lr * config.sweep_range, log=True)
    size = trial.suggest_categorical("batch_size", sizes)
    folder = config.output_dir / f"trial_{trial.number}"
    return replace(config, lr=lr, min_lr=config.min_lr * lr / config.lr, batch_size=size, output_dir=folder)
