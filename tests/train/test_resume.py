"""A run that is cut short and goes on ends as one that never stopped; checkpoints are whole or the ones of before."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fused_ops.train import checkpoint
from fused_ops.train.__main__ import main
from fused_ops.train.logs import writing
from fused_ops.train.loop import Trainer
from tests.train.material import TINY, command_line, tiny, write_data
from tests.train.runs import CPU, again, assert_same, rows, saved, train


def without_config(state: dict) -> dict:
    return {key: value for key, value in state.items() if key != "config"}


@pytest.mark.parametrize("name", TINY)
def test_a_run_that_is_cut_short_ends_with_the_same_weights(name, tmp_path):
    options = {"max_steps": 9, "eval_steps": 4, "save_steps": 3, "gradient_accumulation_steps": 2, "batch_size": 5}
    train(tiny(name, tmp_path, **options))
    whole, logged = saved(tmp_path / "run"), rows(tmp_path / "run")
    torch.manual_seed(1234)
    train(again(name, tmp_path, **options), kill_at=8)
    assert saved(tmp_path / "run")["step"] == 6
    torch.manual_seed(5678)
    train(tiny(name, tmp_path, resume=tmp_path / "run/last.pt", **options))
    assert_same(without_config(saved(tmp_path / "run")), without_config(whole))
    timed = {"samples_per_second": ""}
    assert [row | timed for row in rows(tmp_path / "run")] == [row | timed for row in logged]
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))


def progress(folder: Path) -> int:
    """The last step that the log has."""
    try:
        return max((int(row["step"]) for row in rows(folder)), default=0)
    except (OSError, ValueError, KeyError, csv.Error):
        return 0


@pytest.mark.parametrize("name", TINY)
def test_a_process_that_is_killed_goes_on_to_the_same_weights(name, tmp_path):
    options = write_data(name, tmp_path) | {"max_steps": 100, "save_steps": 7, "eval_steps": 50}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = command_line(name, output_dir=cut, **options)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    process = subprocess.Popen([sys.executable, "-m", "fused_ops.train", *arguments], env=environment)
    while process.poll() is None and progress(cut) < 16:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert 14 <= saved(cut)["step"] < 100
    main([*arguments, f"--resume={cut}/last.pt"])
    main(command_line(name, output_dir=whole, **options))
    assert_same(without_config(saved(cut)), without_config(saved(whole)))
    assert_same(saved(cut, "best.pt")["model"], saved(whole, "best.pt")["model"])


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run of three steps."""
    train(tiny("sequence", tmp_path, max_steps=3, save_steps=3))
    return tmp_path / "run"


def refused(tmp_path: Path, match: str, name: str = "sequence", **options) -> None:
    with pytest.raises(ValueError, match=match):
        train(tiny(name, tmp_path, **{"max_steps": 3, "save_steps": 3} | options))


def test_what_cannot_be_resumed_is_refused(run, tmp_path):
    last = run / "last.pt"
    refused(tmp_path, r"output_dir must be a folder without a run")
    refused(tmp_path, r"resume must be a checkpoint, got .*nowhere.pt, which is none", resume=run / "nowhere.pt")
    refused(tmp_path, r"resume must be a checkpoint, got .*run, which is a folder", resume=run)
    refused(tmp_path, r"resume .*recipe 'language', got .*last.pt of 'sequence'", "language", resume=last)
    refused(tmp_path, r"resume .*\(last.pt\), got .*best.pt, which has weights alone", resume=run / "best.pt")
    refused(tmp_path, r"resume .*these options, got .*with max_steps 3 instead of 5, lr 0.003 instead of 0.1",
            resume=last, max_steps=5, lr=0.1)  # fmt: skip
    refused(tmp_path, r"training_samples 1294 instead of 719", resume=last, val_split=0.5)
    refused(tmp_path, r"output_dir must be .*run, .*got .*other", resume=last, output_dir=tmp_path / "other")
    (run / "cut.pt").write_bytes(last.read_bytes()[:-1000])
    refused(tmp_path, r"resume must be a whole checkpoint, got .*cut.pt", resume=run / "cut.pt")
    torch.save({"weight": torch.ones(2)}, run / "other.pt")
    refused(tmp_path, r"other.pt, which this program did not write", resume=run / "other.pt")
    train(tiny("sequence", tmp_path, max_steps=3, save_steps=3, resume=last, log_steps=7, workers=1))


def test_weights_of_other_sizes_are_refused(run, tmp_path):
    trainer = Trainer(tiny("sequence", tmp_path, hidden_size=20), CPU)
    with pytest.raises(ValueError, match=r"resume must be a checkpoint of this model, got .*rnn.weight_ih_l0"):
        trainer.test(run / "best.pt")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """The file that a checkpoint is written to is a device where every write fails as on a full disk."""
    recipe = tiny("sequence", tmp_path, max_steps=6, save_steps=2)
    trainer = Trainer(recipe, CPU)
    save = trainer.save

    def save_on_full_disk():
        if trainer.step == 4:
            (tmp_path / "run/last.pt.partial").symlink_to("/dev/full")
        save()

    trainer.save = save_on_full_disk
    with pytest.raises(OSError, match=r"cannot save .*last.pt \(No space left on device\); .*of before is whole"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "run").glob("*pt*")) == ["last.pt"]
    assert saved(tmp_path / "run")["step"] == 2
    resumed = train(tiny("sequence", tmp_path, max_steps=6, save_steps=2, resume=tmp_path / "run/last.pt"))
    assert resumed.step == 6


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_log_that_cannot_be_written_is_named(tmp_path):
    wanted = r"cannot write .*log.csv \(No space left on device\)"
    with pytest.raises(OSError, match=wanted), writing(tmp_path / "log.csv"), open("/dev/full", "w") as file:
        file.write("step")


def test_a_disk_that_fills_up_halfway_through_a_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.write(path, {"step": 1})

    class Full:
        """A file with room for 4000 bytes."""

        def __init__(self, file):
            self.file, self.left = file, 4000

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    monkeypatch.setattr("builtins.open", lambda *arguments, open=open: Full(open(*arguments)))
    with pytest.raises(OSError, match=r"cannot save .* \(No space left on device\)"):
        checkpoint.write(path, {"step": 2, "model": {"weight": torch.ones(10_000)}})
    monkeypatch.undo()
    assert checkpoint_of(path) == {"step": 1} and os.listdir(tmp_path) == ["last.pt"]


def checkpoint_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_on_the_command_line_an_error_is_one_line(run, tmp_path, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["image", "--output-dir", str(run), "--resume", str(run / "last.pt")])
    assert str(stopped.value).startswith("error: resume must be a checkpoint of the recipe 'image'")
    assert "\n" not in str(stopped.value)
