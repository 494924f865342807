"""Trials of learning rates and batch sizes."""

import contextlib
from dataclasses import replace

import optuna
import torch
from optuna.trial import TrialState as State

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
    first = parallel.rank() == 0
    study = _open(recipe, config) if first else None
    while parallel.from_first(first and len(_done(study)) < config.sweep):
        trial = study.ask() if first else None
        options = parallel.from_first(_drawn(trial, config) if first else None)
        value, state = None, State.FAIL
        with contextlib.suppress(FloatingPointError):
            value, state = Trainer(recipe(options), device).train(), State.COMPLETE
        if first:
            study.tell(trial, value, state)
            print(f"{_described(options)}: {recipe.metric_for_best_model} {value}")
    if not parallel.from_first(first and study.get_trials(states=[State.COMPLETE])):
        raise FloatingPointError("the loss was not finite in any trial of the sweep: a lower lr may help")
    best = parallel.from_first(_drawn(study.best_trial, config) if first else None)
    if first:
        print(f"best of {config.sweep}: {_described(best)}")
    return best


def _described(options: Config) -> str:
    return f"{options.output_dir.name}, lr {options.lr:.3g}, batch_size {options.batch_size}"


def _open(recipe: type[Recipe], config: Config) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{config.output_dir / 'sweep.db'}",
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
