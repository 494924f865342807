"""The training loop that every recipe runs in."""

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from fused_ops.core.errors import ArgumentError
from fused_ops.train import checkpoint, parallel
from fused_ops.train.config import Config
from fused_ops.train.logs import Log, writing
from fused_ops.train.recipe import Recipe


def warmup_cosine(step: int, warmup: int, steps: int, floor: float) -> float:
    """Share of the learning rate: (step + 1)/(warmup + 1), then from 1 to floor along half a cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov's momentum; weight decay for matrices, not for biases and norms."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if config.opt == "sgd":
        return torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(groups, config.lr, betas=(0.9, config.adam_beta2))


class Seeded(Dataset):
    """`data` whose item i draws its augmentation from (seed, epoch, i) alone, whichever process loads it, and when."""

    def __init__(self, data: Dataset, seed: int, epoch: int):
        self.data, self.seed, self.epoch = data, seed, epoch

    def __getitem__(self, index: int):
        with torch.random.fork_rng(devices=()):
            seed = (self.seed * 1_000_003 + self.epoch) * 1_000_000_007 + index
            torch.default_generator.manual_seed(seed % 2**63)
            return self.data[index]


class Trainer:
    """Trains a recipe's model with `train`; `test` measures the weights that were best in validation.

    Attributes:
        step: optimizer steps done. Epoch and place in it follow: how the data is ordered is a function of the epoch.
        best: the best value of the recipe's metric in validation; stale: validations since.
    """

    def __init__(self, recipe: Recipe, device: torch.device):
        config = self.config = recipe.config
        self.recipe, self.device = recipe, device
        self.samples_per_step = config.batch_size * config.gradient_accumulation_steps * parallel.world()
        self.steps_per_epoch = len(recipe.train) // self.samples_per_step
        if self.steps_per_epoch == 0:
            wanted = f"such that a step takes at most the {len(recipe.train)} training samples"
            raise ArgumentError("batch_size", wanted, f"{self.samples_per_step} a step")
        self.steps = config.max_steps or config.epochs * self.steps_per_epoch
        self.eval_steps = config.eval_steps or self.steps_per_epoch
        self.save_steps = config.save_steps or self.eval_steps
        if config.use_deterministic_algorithms:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(config.seed)  # every process starts from the same weights
        self.model = parallel.wrap(recipe.model().to(device), config.parallel, device)
        torch.manual_seed(config.seed + parallel.rank())  # and has its own dropout
        random.seed(config.seed + parallel.rank())
        self.optimizer = make_optimizer(self.model, config)
        warmup, floor = round(config.warmup_ratio * self.steps), config.min_lr / config.lr
        shape = partial(warmup_cosine, warmup=warmup, steps=self.steps, floor=floor)
        self.scheduler = LambdaLR(self.optimizer, shape)
        self.step, self.best, self.stale = 0, -math.inf if recipe.greater_is_better else math.inf, 0
        self.log: Log | None = None
        self.since: tuple[float, int] | None = None  # a time and a step, for the samples per second

    def train(self) -> float:
        """Run until the last step, or until `patience` ends; returns `best`."""
        self.open()
        try:
            while not self.finished:
                for batches in self.rest_of_epoch():
                    self.update(batches)
                    if self.step % self.eval_steps == 0 or self.step == self.steps:
                        self.validate()
                    if self.step % self.save_steps == 0 or self.finished:
                        self.save()
                    if self.finished:
                        break
        finally:
            if self.log is not None:
                self.log.close()
        return self.best

    def open(self) -> None:
        """Start at step 0 in a new folder, or where a checkpoint is."""
        if self.config.resume is not None:
            self.resume()
        parallel.from_first(self.open_log)

    def open_log(self) -> None:
        config = self.config
        if config.resume is None and (config.output_dir / "last.pt").exists():
            raise ArgumentError("output_dir", "a folder without a run (or resume its last.pt)", config.output_dir)
        config.output_dir.mkdir(parents=True, exist_ok=True)
        measured = [f"valid_{name}" for name in self.recipe.reported]
        columns = ["epoch", "lr", "loss", "grad_norm", "samples_per_second", *measured]
        self.log = Log(config.output_dir, columns, self.step, self.steps)

    @property
    def finished(self) -> bool:
        return self.step >= self.steps or self.stale >= (self.config.patience or math.inf)

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    def rest_of_epoch(self) -> Iterator[tuple[list, ...]]:
        """What this process has yet to see in the epoch: each step's batches."""
        config, data = self.config, self.recipe.train
        epoch, done = divmod(self.step, self.steps_per_epoch)
        sampler = DistributedSampler(data, parallel.world(), parallel.rank(), seed=config.seed, drop_last=True)
        sampler.set_epoch(epoch)
        size = config.gradient_accumulation_steps
        indices = list(BatchSampler(sampler, config.batch_size, drop_last=True))
        ahead = indices[done * size : self.steps_per_epoch * size]
        batches = self.batches(Seeded(data, config.seed, epoch), ahead, self.recipe.collate)
        return zip(*[batches] * size)

    def batches(self, data: Dataset, indices: list[list[int]], collate: Callable) -> Iterator[list]:
        """Batches on the device."""
        loader = DataLoader(
            data,
            batch_sampler=indices,
            collate_fn=collate,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # a loader draws a number: torch's own are dropout's
        )
        for batch in loader:
            yield [x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)

    def update(self, batches: tuple[list, ...]) -> None:
        """One step of the optimizer, by the mean of the batches' gradients."""
        self.model.train()
        self.since = self.since or (time.perf_counter(), self.step)
        total = torch.zeros((), device=self.device)
        for place, batch in enumerate(batches, 1):
            with parallel.accumulating(self.model, last=place == len(batches)):
                with self.autocast():
                    loss = self.recipe.loss(self.model, batch) / len(batches)
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm or math.inf)
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.step += 1
        logged = self.step % self.config.log_steps == 0
        if logged or self.step % self.eval_steps == 0 or self.step % self.save_steps == 0 or self.finished:
            loss = parallel.add_up(total).item() / parallel.world()
            norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
            self.check_finite(loss=loss, grad_norm=norm)  # nothing else is ever kept
        if logged:
            (start, step), self.since = self.since, None
            rate = self.samples_per_step * (self.step - step) / (time.perf_counter() - start)
            self.write(epoch=self.epoch, lr=lr, loss=loss, grad_norm=norm, samples_per_second=rate)
        if self.log is not None:
            self.log.bar.update()

    def check_finite(self, **values: float) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} is {value} in step {self.step}: a lower lr may help")

    def write(self, **values: float) -> None:
        if self.log is not None:
            self.log.write(self.step, values)

    @torch.no_grad()
    def evaluate(self, data: Dataset) -> dict[str, float]:
        """The recipe's metrics over `data`, of which each process takes every world-th batch."""
        self.since = None
        parallel.average_statistics(self.model)
        self.model.eval()
        batches = list(BatchSampler(range(len(data)), self.config.batch_size, drop_last=False))
        rank, world = parallel.rank(), parallel.world()
        turns = math.ceil(len(batches) / world)  # as many for every process: fsdp gathers weights in each
        mine = [batches[(rank + turn * world) % len(batches)] for turn in range(turns)]
        sums: dict[str, Tensor] = {}
        for turn, batch in enumerate(self.batches(data, mine, self.recipe.collate_measured)):
            with self.autocast():
                found = self.recipe.measure(self.model, batch)
            own = rank + turn * world < len(batches)
            for name, pair in found.items():
                pair = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self.device) for x in pair])
                sums[name] = sums.get(name, 0.0) + pair * own
        parallel.reshard(self.model)
        totals = parallel.add_up(torch.stack(list(sums.values()))).tolist()
        return self.recipe.metrics({name: total / count for name, (total, count) in zip(sums, totals)})

    def validate(self) -> None:
        """Measure the model; of the best weights the last are kept as best.pt."""
        found = self.evaluate(self.recipe.valid)
        self.check_finite(**found)
        value = found[self.recipe.metric_for_best_model]
        gain = value - self.best if self.recipe.greater_is_better else self.best - value
        self.best, self.stale = (value, 0) if gain > 0 else (self.best, self.stale + 1)
        self.write(**{f"valid_{name}": value for name, value in found.items()})
        if self.log is not None:
            self.log.say(f"step {self.step}, epoch {self.epoch:.2f}: {described(found)}{', best' * (gain >= 0)}")
        if gain >= 0:
            self.keep("best.pt", metrics=found)

    def save(self) -> None:
        """Keep all that the rest of the run depends on as last.pt."""
        parallel.average_statistics(self.model)
        self.keep(
            "last.pt",
            optimizer=checkpoint.optimizer_state(self.model, self.optimizer),
            scheduler=self.scheduler.state_dict(),
            random=parallel.gather(checkpoint.random_state(self.device)),
            best=self.best,
            stale=self.stale,
            **self.facts,
        )

    @property
    def facts(self) -> dict[str, int]:
        """What a run has to have in common with the one it goes on from, besides options."""
        return {"processes": parallel.world(), "training_samples": len(self.recipe.train)}

    def keep(self, name: str, **more) -> None:
        state = {"recipe": self.recipe.name, "config": self.config.values(), "step": self.step}
        state |= {"model": checkpoint.weights(self.model), **more}
        parallel.from_first(partial(checkpoint.write, self.config.output_dir / name, state))

    def resume(self) -> None:
        """Go on from the checkpoint that the options name."""
        state = self.read(self.config.resume, goes_on=True)
        checkpoint.set_optimizer_state(self.model, self.optimizer, state.pop("optimizer", {}))
        state = parallel.from_first(lambda: state)
        self.scheduler.load_state_dict(state["scheduler"])
        checkpoint.set_random_state(state["random"][parallel.rank()], self.device)
        self.step, self.best, self.stale = state["step"], state["best"], state["stale"]

    def read(self, path: Path, goes_on: bool = False) -> dict:
        """Give the model a checkpoint's weights; what else is in it, in the first process, which reads it."""
        state = {}

        def read() -> None:
            state.update(checkpoint.read(path, self.recipe.name))
            if goes_on:
                checkpoint.check_same_run(state, self.config, path, self.facts)
            checkpoint.check_fits(state["model"], self.model, path)

        parallel.from_first(read)
        checkpoint.set_weights(self.model, state.pop("model", {}))
        return state

    def test(self, path: Path) -> dict[str, float]:
        """The metrics of a checkpoint's weights on held-out data, kept beside the logs as results.json."""
        state = self.read(path)
        found = self.evaluate(self.recipe.test)
        if parallel.rank() == 0:
            self.config.output_dir.mkdir(parents=True, exist_ok=True)
            results = {"checkpoint": str(path), "step": state["step"], **found}
            with writing(kept := self.config.output_dir / "results.json"):
                kept.write_text(json.dumps(results, indent=2) + "\n")
            print(f"held-out data, {path} of step {state['step']}: {described(found)}")
        return found

    def save_pretrained(self) -> None:
        """Write what `from_pretrained` reads into output_dir, if the model has such a form."""
        weights, folder = checkpoint.weights(self.model), self.config.output_dir

        def write() -> None:
            model = self.recipe.model()
            model.load_state_dict(weights)
            try:
                self.recipe.save(model, folder)
            except SafetensorError as error:
                raise OSError(f"cannot write into {folder} ({error})") from error

        parallel.from_first(write)


def described(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
