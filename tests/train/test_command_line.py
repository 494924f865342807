"""`python -m fused_ops.train`: recipes, their options, and what a wrong one says."""

import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import optuna
import pytest
import torch

from fused_ops.train.__main__ import RECIPES, main, quiet_threads
from fused_ops.train.config import Config, parse
from fused_ops.train.image import ImageConfig
from fused_ops.train.language import LanguageConfig
from fused_ops.train.qa import QuestionAnsweringConfig
from fused_ops.train.sequence import SequenceConfig
from tests.train.runs import saved

CONFIGS = {"image": ImageConfig, "language": LanguageConfig, "qa": QuestionAnsweringConfig, "sequence": SequenceConfig}
SHORT = ("--hidden-size=8", "--max-steps=2", "--num-layers=1")


def test_options_are_the_fields_of_a_dataclass():
    found = parse(
        LanguageConfig, "train", ["--batch_size", "7", "--lr=0.5", "--bf16", "--data-path", "a_b", "--opt=sgd"]
    )
    wanted = LanguageConfig(batch_size=7, lr=0.5, bf16=True, data_path=Path("a_b"), opt="sgd")
    assert found == wanted and not parse(LanguageConfig, "train", ["--no-bf16"]).bf16


@pytest.mark.parametrize("name", RECIPES)
def test_help_names_every_option_and_what_it_is(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for field in fields(CONFIGS[name]):
        assert f"--{field.name.replace('_', '-')}" in text
        if field.default is not None:
            assert f"(default: {field.default})" in text


@pytest.mark.parametrize(
    "options, message",
    (
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0 and at least min_lr, got 0.0 with min_lr 0.0"),
        ({"lr": 1e-4, "min_lr": 1e-3}, "lr must be above 0 and at least min_lr, got 0.0001 with min_lr 0.001"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must be between 0 and 1, got 1.5"),
        ({"sweep_range": 0.5}, "sweep_range must be at least 1, got 0.5"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be below 1, got 1.0"),
        ({"test_only": True}, "resume must be the checkpoint to be tested, got None"),
    ),
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


@pytest.mark.parametrize("arguments", ((), ("images",), ("--help",)))
def test_recipes_are_listed(arguments):
    with pytest.raises(SystemExit, match=r"usage: python -m fused_ops.train \{image,language,qa,sequence\}"):
        main(list(arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(SystemExit, match=r"error: device must be one that is here, got cuda"):
        main(["sequence", "--device=cuda"])


def test_an_option_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["image", "--learning-rate", "1"])
    assert stopped.value.code == 2 and "unrecognized arguments: --learning-rate 1" in capsys.readouterr().err


def test_a_checkpoint_can_be_tested_alone(tmp_path, capsys):
    main(["sequence", *SHORT, f"--output-dir={tmp_path}/run"])
    trained = capsys.readouterr().out.splitlines()[-1]
    main(["sequence", *SHORT, f"--output-dir={tmp_path}/other", "--test-only", f"--resume={tmp_path}/run/best.pt"])
    assert capsys.readouterr().out.splitlines() == [trained]
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["results.json"]


def test_a_thread_that_cannot_write_leaves_the_error_to_the_main_one(monkeypatch):
    def fail(error: Exception) -> None:
        raise error

    said = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: said.append(failed.exc_type))
    with quiet_threads():
        for error in (OSError(), KeyError()):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()
    assert said == [KeyError]


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_ops.train.image", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SystemExit, match=r"is not installed: pip install fused_ops\[train\]"):
        main(["image"])


def sweep(folder: Path, trials: int) -> list[optuna.trial.FrozenTrial]:
    main(["sequence", *SHORT, f"--output-dir={folder}", f"--sweep={trials}", "--lr=0.01", "--sweep-range=5"])
    return optuna.load_study(study_name="sequence", storage=f"sqlite:///{folder}/sweep.db").trials


def test_a_sweep_tests_the_best_of_its_trials(tmp_path, capsys):
    trials = sweep(tmp_path, 3)
    assert len({trial.params["lr"] for trial in trials}) == 3
    assert all(0.002 <= trial.params["lr"] <= 0.05 and trial.params["batch_size"] in (16, 32, 64) for trial in trials)
    best = max(trials, key=lambda trial: trial.value)
    for trial in trials:
        config = saved(tmp_path / f"trial_{trial.number}")["config"]
        assert {name: config[name] for name in trial.params} == trial.params
    out = capsys.readouterr().out
    options = f"lr {best.params['lr']:.3g}, batch_size {best.params['batch_size']}"
    assert f"best of 3: trial_{best.number}, {options}" in out
    assert f"held-out data, {tmp_path}/trial_{best.number}/best.pt of step" in out and out.count("held-out") == 1


def test_a_sweep_goes_on_where_it_was_cut_short(tmp_path):
    first = sweep(tmp_path, 1)
    trials = sweep(tmp_path, 2)
    assert len(trials) == 2 and trials[0].params == first[0].params
    assert trials[1].params["lr"] != trials[0].params["lr"]


def test_a_memory_of_a_sweep_that_is_none_is_refused(tmp_path):
    (tmp_path / "sweep.db").write_text("no database" * 100)
    with pytest.raises(SystemExit, match=r"error: cannot use .*sweep.db \(file is not a database\)"):
        sweep(tmp_path, 1)


def test_trials_that_diverge_have_failed(tmp_path):
    with pytest.raises(SystemExit, match="the loss was not finite in any trial"):
        main(["sequence", *SHORT, f"--output-dir={tmp_path}", "--sweep=2", "--lr=1e30", "--opt=sgd", "--log-steps=1",
              "--clip-grad-norm=0", "--warmup-ratio=0"])  # fmt: skip
    states = [
        trial.state.name
        for trial in optuna.load_study(study_name="sequence", storage=f"sqlite:///{tmp_path}/sweep.db").trials
    ]
    assert states == ["FAIL", "FAIL"]


def test_importing_the_package_imports_no_recipe():
    code = "import sys, fused_ops, fused_ops.models; print([name for name in sys.modules if 'fused_ops.train' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
