"""The loop: what a step is, what is logged, which weights are kept, when it ends."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from fused_ops.train.loop import Trainer, make_optimizer, warmup_cosine
from tests.train.material import TINY, tiny
from tests.train.runs import CPU, again, rows, saved, train


def test_the_learning_rate_rises_then_falls_as_a_cosine():
    shares = [warmup_cosine(step, warmup=4, steps=14, floor=0.1) for step in range(14)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[9] == pytest.approx(0.1 + 0.9 / 2)
    assert shares[4:] == sorted(shares[4:], reverse=True) and 0.1 < shares[-1] < 0.15
    assert [warmup_cosine(step, 0, 10, 0.0) for step in (0, 10, 11)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("opt, kind", (("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)))
def test_weights_decay_and_biases_do_not(opt, kind, tmp_path):
    recipe = tiny("image", tmp_path, opt=opt, weight_decay=0.3)
    model = recipe.model()
    optimizer = make_optimizer(model, recipe.config)
    assert type(optimizer) is kind
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.3, 0.0] * 4


def test_accumulated_batches_are_one_batch(tmp_path):
    plain = train(tiny("image", tmp_path, batch_size=16, max_steps=4, save_steps=100))
    parts = again("image", tmp_path, batch_size=4, gradient_accumulation_steps=4, max_steps=4, save_steps=100)
    torch.testing.assert_close(train(parts).model.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("limit", (0.0, 0.5))
def test_gradients_are_clipped(limit, tmp_path):
    trainer = Trainer(tiny("image", tmp_path, clip_grad_norm=limit, opt="sgd", momentum=0.0, weight_decay=0.0), CPU)
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    trainer.update(next(trainer.rest_of_epoch()))
    lr = trainer.config.lr * warmup_cosine(0, round(0.05 * trainer.steps), trainer.steps, 0.0)
    moved = sum((old - new.detach()).square().sum() for old, new in zip(before, trainer.model.parameters())) ** 0.5
    if limit:
        assert float(moved) / lr == pytest.approx(limit, rel=5e-3)
    else:
        assert moved / lr > 0.6


@pytest.mark.parametrize("name", TINY)
def test_bf16_changes_rounding_only(name, tmp_path):
    losses = []
    for bf16 in (False, True):
        train(again(name, tmp_path, bf16=bf16, max_steps=3))
        losses.append([float(row["loss"]) for row in rows(tmp_path / "run") if row["loss"]])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.03)


def test_every_sample_of_an_evaluation_counts_once(tmp_path):
    recipe = tiny("image", tmp_path, batch_size=50)
    trainer = Trainer(recipe, CPU)
    found = trainer.evaluate(recipe.test)
    images, labels = (torch.stack([torch.as_tensor(x) for x in column]) for column in zip(*recipe.test))
    with torch.no_grad():
        logits = trainer.model(images)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_an_epoch_takes_every_sample_once_and_no_two_epochs_are_alike(tmp_path):
    trainer = Trainer(tiny("sequence", tmp_path, batch_size=8), CPU)
    trainer.recipe.train.noise = 0.0
    seen = []
    for step in (0, trainer.steps_per_epoch):
        trainer.step = step
        seen.append(torch.cat([batch[0] for (batch,) in trainer.rest_of_epoch()]).flatten(1))
    assert len(seen[0]) == trainer.steps_per_epoch * 8 > len(trainer.recipe.train) - 8
    assert not torch.equal(*seen)
    assert len(seen[0].unique(dim=0)) >= len(seen[0]) - 1  # two of the digits are equal
    trainer.step = 5
    (rest,) = next(trainer.rest_of_epoch())
    assert torch.equal(rest[0].flatten(1), seen[0][40:48])


def test_augmentation_does_not_depend_on_who_loads(tmp_path):
    alone, helped = (Trainer(tiny("image", tmp_path, workers=workers), CPU) for workers in (0, 2))
    for _, (one,), (other,) in zip(range(3), alone.rest_of_epoch(), helped.rest_of_epoch()):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_the_best_weights_are_kept_and_patience_ends_a_run(tmp_path, capsys):
    recipe = tiny("sequence", tmp_path, epochs=100, eval_steps=2, patience=3)
    trainer, values = Trainer(recipe, CPU), iter((0.2, 0.5, 0.5, 0.4, 0.1))
    trainer.evaluate = lambda data: {"loss": 1.0, "accuracy": next(values)}
    assert trainer.train() == 0.5
    assert trainer.step == 10 and saved(tmp_path / "run")["step"] == 10
    best = saved(tmp_path / "run", "best.pt")
    assert best["step"] == 6 and best["metrics"] == {"loss": 1.0, "accuracy": 0.5}
    assert [line.endswith("best") for line in capsys.readouterr().out.splitlines()] == [True, True, True, False, False]


def test_a_lower_perplexity_is_better(tmp_path):
    trainer, values = Trainer(tiny("language", tmp_path, max_steps=3, eval_steps=1), CPU), iter((9.0, 7.0, 8.0))
    trainer.evaluate = lambda data: {"loss": 1.0, "perplexity": next(values)}
    assert trainer.train() == 7.0 and saved(tmp_path / "run", "best.pt")["step"] == 2


def test_logs_hold_every_step_and_validation(tmp_path):
    recipe = tiny("sequence", tmp_path, max_steps=4, eval_steps=2, lr=0.1, warmup_ratio=0.5, min_lr=0.05)
    train(recipe)
    found = rows(tmp_path / "run")
    assert [(row["step"], bool(row["loss"]), bool(row["valid_accuracy"])) for row in found] == [
        ("1", True, False),
        ("2", True, False),
        ("2", False, True),
        ("3", True, False),
        ("4", True, False),
        ("4", False, True),
    ]
    assert [float(row["lr"]) for row in found if row["lr"]] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.075])
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("valid_accuracy")] == [2, 4]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    recipe = tiny("sequence", tmp_path, lr=1e30, warmup_ratio=0.0, clip_grad_norm=0.0, opt="sgd", max_steps=5)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in step \d"):
        train(recipe)
    trainer = Trainer(again("sequence", tmp_path, max_steps=1), CPU)
    trainer.evaluate = lambda data: {"loss": math.nan, "accuracy": 0.1}
    with pytest.raises(FloatingPointError, match=r"the loss is nan in step 1: a lower lr may help"):
        trainer.train()


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    """Neither logs nor validation see the step in which they come about."""
    recipe = tiny("sequence", tmp_path, max_steps=10, save_steps=2, eval_steps=10, log_steps=10)
    trainer, loss = Trainer(recipe, CPU), recipe.loss
    recipe.loss = lambda model, batch: loss(model, batch) * (math.nan if trainer.step == 4 else 1)
    with pytest.raises(FloatingPointError, match="the loss is nan in step 6"):
        trainer.train()
    state = saved(tmp_path / "run")
    assert state["step"] == 4 and all(weight.isfinite().all() for weight in state["model"].values())


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size .*at most the 185 training samples.* 400 a step"):
        Trainer(tiny("language", tmp_path, batch_size=100, gradient_accumulation_steps=4), CPU)


def test_results_are_of_the_best_weights_on_held_out_data(tmp_path, capsys):
    recipe = tiny("sequence", tmp_path, max_steps=6, eval_steps=3)
    trainer = train(recipe)
    best = saved(tmp_path / "run", "best.pt")
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.zero_()
    found = trainer.test(tmp_path / "run/best.pt")
    trainer.model.load_state_dict(best["model"])
    assert found == trainer.evaluate(recipe.test) and found["accuracy"] > 0.05
    assert f"held-out data, {tmp_path}/run/best.pt of step {best['step']}: loss" in capsys.readouterr().out
    assert '"accuracy": ' in (tmp_path / "run/results.json").read_text()
