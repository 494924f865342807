"""Two processes on the CPU: DDP and FSDP2 train as one process with the whole batch does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from fused_ops.models import GPT, ResNet
from fused_ops.train import parallel
from fused_ops.train.__main__ import main
from tests.support import randn
from tests.train.material import command_line, write_data
from tests.train.runs import assert_same, rows, saved

RECIPES = {"image": {}, "language": {"dropout": 0.1}, "qa": {"dropout": 0.1}, "sequence": {"dropout": 0.2}}
KINDS = ("ddp", "fsdp")
STEPS = {"max_steps": 6, "save_steps": 3, "eval_steps": 3}


def train(folder: Path) -> None:
    """Runs, each in a folder: RECIPE/one of one process, RECIPE/ddp and RECIPE/fsdp of two, on the same batches; with
    dropout, RECIPE/KIND/whole and RECIPE/KIND/cut, which was killed in step 5 and went on from step 3; wild/ddp and
    wild/fsdp, which get worse; and one in a folder that has a run, which ends them all."""
    commands = []
    for name, dropout in RECIPES.items():
        options = STEPS | write_data(name, folder)
        same = options | dict.fromkeys(dropout, 0.0) | {"gradient_accumulation_steps": 2}
        main(command_line(name, **same | {"batch_size": 8, "output_dir": folder / name / "one"}))
        for kind in KINDS:
            two = {"parallel": kind, "batch_size": 4}
            commands.append((command_line(name, **same | two | {"output_dir": folder / name / kind}), None))
            for run in ("whole", "cut"):
                more = options | dropout | two | {"output_dir": folder / name / kind / run}
                commands.append((command_line(name, **more), 5 if run == "cut" else None))
            commands.append((command_line(name, **more, resume=folder / name / kind / "cut/last.pt"), None))
    for kind in KINDS:
        wild = STEPS | {"parallel": kind, "eval_steps": 1, "lr": 0.5, "output_dir": folder / "wild" / kind}
        commands.append((command_line("sequence", **wild), None))
    commands.append(commands[-1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "tests.train.two_processes", json.dumps(commands)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    (folder / "stderr").write_text(done.stderr)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """What `train` leaves, once for all of pytest-xdist's processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            train(folder)
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
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_goes_on_in_two_processes(name, kind, runs):
    whole, cut = (saved(runs / name / kind / run) for run in ("whole", "cut"))
    for state in (whole, cut):
        state.pop("config")
    assert_same(whole, cut)
    mine, other = (state["torch"] for state in whole["random"])
    assert not torch.equal(mine, other)  # each process has its own dropout


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_after_a_validation_that_is_not_the_best(kind, runs):
    assert saved(runs / "wild" / kind, "best.pt")["step"] < saved(runs / "wild" / kind)["step"] == 6


def test_an_error_of_the_first_process_is_the_only_one(runs):
    said = (runs / "stderr").read_text()
    assert said.count("error: output_dir must be a folder without a run") == 1, said
    assert "fused_ops/train" not in said  # no traceback but torchrun's own


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
