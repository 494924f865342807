"""Two processes on the CPU: DDP and FSDP2 train as one process with the whole batch does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_ops.models import GPT, ResNet
from fused_ops.train import parallel
from fused_ops.train.__main__ import main
from tests.support import randn
from tests.train.material import TINY, write_bert, write_squad
from tests.train.runs import assert_same, rows, saved

RECIPES = ("sequence", "language", "qa")
KINDS = ("ddp", "fsdp")
STEPS = ("--max-steps", "6", "--save-steps", "3", "--eval-steps", "3", "--log-steps", "1")


def arguments(name: str, folder: Path, batch: int, *more: str, **options) -> list[str]:
    options = TINY[name] | options | {"batch_size": batch, "output_dir": folder}
    return [name, *(f"--{key}={value}" for key, value in options.items()), *STEPS, *more]


def torchrun(*command: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    done = subprocess.run(launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folders of runs: RECIPE/one of one process, RECIPE/ddp and RECIPE/fsdp of two; with dropout, whole/ddp and
    whole/fsdp, and cut/ddp and cut/fsdp, which were killed in step 5 and went on from step 3."""
    folder = tmp_path_factory.mktemp("runs")
    accumulate, commands = "--gradient-accumulation-steps=2", []
    for name in RECIPES:
        options = {"dropout": 0.0}
        if name == "qa":
            options |= {"model_path": write_bert(folder / "bert"), "train_file": write_squad(folder / "squad.json")}
        main(arguments(name, folder / name / "one", 8, accumulate, **options))
        for kind in KINDS:
            two = arguments(name, folder / name / kind, 4, accumulate, f"--parallel={kind}", **options)
            commands.append((two, None))
    for kind in KINDS:
        whole, cut = (arguments("sequence", folder / run / kind, 4, f"--parallel={kind}") for run in ("whole", "cut"))
        commands += [(whole, None), (cut, 5), ([*cut, f"--resume={folder}/cut/{kind}/last.pt"], None)]
    torchrun("-m", "tests.train.two_processes", json.dumps(commands))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_are_one(name, kind, runs):
    one, two = (saved(runs / name / folder) for folder in ("one", kind))
    for state in (one, two):  # all of a span's scores may shift: this gradient is rounding, which Adam scales up
        state["model"].pop("qa_outputs.bias", None), state["optimizer"]["state"].pop("qa_outputs.bias", None)
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(two["optimizer"]["state"], one["optimizer"]["state"], rtol=1e-3, atol=1e-6)
    for mine, other in zip(rows(runs / name / "one"), rows(runs / name / kind), strict=True):
        for column in set(mine) - {"samples_per_second"}:
            assert float(mine[column] or 0) == pytest.approx(float(other[column] or 0), rel=1e-3), column


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_in_two_processes(kind, runs):
    whole, cut = (saved(runs / folder / kind) for folder in ("whole", "cut"))
    for state in (whole, cut):
        state.pop("config")
    assert_same(whole, cut)
    mine, other = (state["torch"] for state in whole["random"])
    assert not torch.equal(mine, other)  # each process has its own dropout


def test_what_fsdp_gathers_at_a_time_is_a_layer():
    sizes = {"vocab_size": 8, "n_positions": 4, "n_embd": 4, "n_layer": 3, "n_head": 1}
    assert len(list(parallel._blocks(GPT(**sizes)))) == 3
    assert len(list(parallel._blocks(ResNet(depth=18)))) == 8


def test_batch_norms_share_their_statistics(monkeypatch):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3, track_running_stats=False))
    model(randn(4, 3, 2, 2))
    mean, var, count = (buffer.clone() for buffer in model.buffers())
    parallel.average_statistics(model)
    assert torch.equal(model[0].running_mean, mean)
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda values: values.add_(5.0))
    parallel.average_statistics(model)
    torch.testing.assert_close(model[0].running_mean, (mean + 5) / 2)
    torch.testing.assert_close(model[0].running_var, (var + 5) / 2)
    assert model[0].num_batches_tracked == count
