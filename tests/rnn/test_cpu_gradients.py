"""Backpropagation through time in C++: every gradient of every kind, ragged rows, resets, chunks, repeatability."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fused_ops
from fused_ops.core.extension import has_kernel
from tests.rnn.common import MODES, Case, poisoned
from tests.support import assert_accurate, noncontiguous, poisoned_memory, randn, threads, value_and_gradients

pytestmark = pytest.mark.skipif(not has_kernel("rnn_bwd_cpu", "CPU"), reason="_C.so was not built")

SHAPES = (
    Case(time=1, batch=1, inputs=1, hidden=1),
    Case(time=3, batch=2, inputs=4, hidden=5, layers=3, bidirectional=True),
    Case(time=7, batch=9, inputs=33, hidden=16, batch_first=True),
    Case(time=5, batch=17, inputs=3, hidden=31, layers=2, bias=False),
    Case(time=90, batch=7, inputs=20, hidden=24, bidirectional=True),
    Case(time=2, batch=300, inputs=17, hidden=12),
    Case(time=6, batch=1, inputs=65, hidden=257),
    Case(time=4, batch=0),
)


def single(case: Case) -> list[torch.Tensor]:
    return [t.float().requires_grad_() for t in case.tensors()]


def states_in(mode: str) -> int:
    return 3 if mode == "lstm" else 2


def check(case: Case, tensors=None, **keywords) -> None:
    tensors = single(case) if tensors is None else tensors
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = value_and_gradients(lambda *t: case.flat(*t, **keywords, backend="reference"), exact)[1]
    theirs = value_and_gradients(lambda *t: case.flat(*t, **keywords, backend="reference"), tensors)[1]
    if "lengths" in keywords:
        tensors[0] = poisoned(case, tensors[0].detach(), keywords["lengths"]).requires_grad_()
    with poisoned_memory():
        found = value_and_gradients(lambda *t: case.flat(*t, **keywords, backend="cpu"), tensors)[1]
    for value, exact_value, torch_value in zip(found, wanted, theirs, strict=True):
        terms = case.inputs + case.hidden + case.time * case.batch
        assert_accurate(value, exact_value, torch_value, factor=3, terms=terms)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_gradients(case, mode, isa):
    check(replace(case, mode=mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", (SHAPES[1], SHAPES[2], SHAPES[4]), ids=str)
def test_ragged_rows_with_nan_in_their_padding(case, mode, isa):
    case = replace(case, mode=mode)
    check(case, lengths=torch.arange(case.batch) * 7 % (case.time + 1))
    check(case, lengths=torch.zeros(case.batch, dtype=torch.int64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", (SHAPES[1], SHAPES[2], SHAPES[4]), ids=str)
def test_resets_and_all_states(case, mode, isa):
    case = replace(case, mode=mode)
    resets = torch.arange(case.time * case.batch).reshape(case.time, case.batch) % 3 == 1
    resets = resets.T if case.batch_first else resets
    lengths = torch.arange(case.batch) * 5 % (case.time + 1)
    check(case, resets=resets)
    check(case, return_all_states=True)
    check(case, resets=resets, lengths=lengths, return_all_states=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("enforce_sorted", (True, False))
def test_packed_sequences_have_the_gradients_of_lengths(mode, enforce_sorted, isa):
    case = Case(mode, time=11, batch=6, inputs=9, hidden=21, layers=2, bidirectional=True, dtype=torch.float32)
    lengths = torch.tensor([11, 9, 9, 4, 2, 1] if enforce_sorted else [2, 11, 9, 1, 9, 4])
    module, x = case.module(), case.input().requires_grad_()
    module.__class__ = getattr(fused_ops.nn, type(module).__name__)
    leaves = [x, *module.parameters()]
    with fused_ops.use_backend("cpu"):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
        output = nn.utils.rnn.pad_packed_sequence(module(packed, case.states())[0])[0]
        wanted = module(x, case.states(), lengths=lengths)[0]
    seed = randn(*output.shape)
    found = torch.autograd.grad(output, leaves, seed)
    for grad, exact in zip(found, torch.autograd.grad(wanted, leaves, seed), strict=True):
        assert grad.abs().max() > 0 and torch.equal(grad, exact)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_is_the_forwards(mode, isa):
    case = Case(mode, time=6, batch=5, inputs=7, hidden=18, layers=3, bidirectional=True, dtype=torch.float32)
    tensors, count = single(case), states_in(mode)
    for keywords in ({}, {"lengths": torch.tensor([6, 0, 3, 6, 1])}):

        def run(*t, backend, keywords=keywords):
            torch.manual_seed(5)
            hx = t[1:count] if count == 3 else t[1]
            settings = (True, 3, 0.4, True, True, False)
            return getattr(fused_ops, mode)(t[0], hx, t[count:], *settings, **keywords, backend=backend)

        theirs = value_and_gradients(lambda *t: run(*t, backend="reference"), tensors)
        found = value_and_gradients(lambda *t: run(*t, backend="cpu"), tensors)
        for part in range(2):
            for value, wanted in zip(found[part], theirs[part], strict=True):
                assert_accurate(value, wanted.double(), terms=200)


@pytest.mark.parametrize("mode", MODES)
def test_every_subset_of_inputs_and_outputs(mode):
    case = Case(mode, time=6, batch=3, inputs=5, hidden=19, layers=2)
    everything = single(case)
    outputs = case.flat(*everything, return_all_states=True, backend="cpu")
    exact = [t.detach().double().requires_grad_() for t in everything]
    wanted = case.flat(*exact, return_all_states=True, backend="reference")
    for out, exact_out in zip(outputs, wanted, strict=True):
        seed = randn(*out.shape)
        found = torch.autograd.grad(out, everything, seed, retain_graph=True)
        for grad, value in zip(found, torch.autograd.grad(exact_out, exact, seed.double(), retain_graph=True)):
            assert_accurate(grad, value, terms=100)
    full = torch.autograd.grad(sum(t.sum() for t in outputs), everything)
    for chosen in ([0], [1], [2], [len(everything) - 1], [0, 1], list(range(2, len(everything)))):
        tensors = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(everything)]
        results = case.flat(*tensors, return_all_states=True, backend="cpu")
        found = torch.autograd.grad(sum(t.sum() for t in results), [tensors[i] for i in chosen])
        assert all(torch.equal(grad, full[i]) for i, grad in zip(chosen, found, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_threads_and_repetition_change_no_bit(mode, isa):
    for case in (
        Case(mode, time=8, batch=2, inputs=150, hidden=260),
        Case(mode, time=40, batch=11, inputs=40, hidden=70, layers=2, bidirectional=True),
    ):
        tensors, results = single(case), []
        for count in (1, 2, 3, 3):
            with threads(count):
                results.append(value_and_gradients(lambda *t: case.flat(*t, backend="cpu"), tensors)[1])  # noqa: B023
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hidden", (5, 70))
def test_a_rows_gradients_do_not_depend_on_the_batch(mode, hidden, isa):
    case = Case(mode, time=12, batch=37, inputs=33, hidden=hidden, layers=2, bidirectional=True)
    tensors, count = single(case), states_in(mode)
    lengths = torch.arange(37) * 5 % 13

    def run(rows):
        part = [t[:, rows].detach().requires_grad_() for t in tensors[:count]]
        seed = randn(case.time, case.batch, 2 * hidden)[:, rows]
        output = case.flat(*part, *tensors[count:], lengths=lengths[rows], backend="cpu")[0]
        return torch.autograd.grad(output, part, seed)

    whole = run(list(range(37)))
    for rows in ([0], [3, 4], list(range(8)), [36, 0, 12, 12]):
        assert all(torch.equal(a, b[:, rows]) for a, b in zip(run(rows), whole, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_noncontiguous_inputs_and_gradients(mode, isa):
    case = Case(mode, time=5, batch=6, inputs=12, hidden=20, layers=2, batch_first=True)
    tensors = single(case)
    output = case.flat(*tensors, backend="cpu")[0]
    seed = randn(*output.shape)
    wanted = torch.autograd.grad(output, tensors, seed, retain_graph=True)
    again = torch.autograd.grad(output, tensors, noncontiguous(seed), retain_graph=True)
    sums = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    ones = torch.autograd.grad(output, tensors, torch.ones_like(output))
    views = [noncontiguous(t) for t in tensors]
    strided = torch.autograd.grad(case.flat(*views, backend="cpu")[0], views, seed)
    for a, b, c, d, e in zip(wanted, again, strided, sums, ones, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(d, e)


@pytest.mark.parametrize("mode", MODES)
def test_the_second_derivative_is_the_references(mode):
    case = Case(mode, time=4, batch=3, inputs=5, hidden=9, layers=2, bidirectional=True)
    lengths = torch.tensor([4, 0, 2])

    def penalty(tensors, backend):
        output = case.flat(*tensors, lengths=lengths, backend=backend)[0]
        (first,) = torch.autograd.grad(output.sum(), tensors[1], create_graph=True)
        return torch.autograd.grad(first.square().sum(), tensors[:4])

    tensors = single(case)
    exact = penalty([t.detach().double().requires_grad_() for t in tensors], "reference")
    found = penalty(tensors, "cpu")
    assert found[3].abs().max() > 0
    for value, wanted in zip(found, exact, strict=True):
        assert_accurate(value, wanted, terms=100)


@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
@pytest.mark.parametrize("fused_optimizer", (False, True))
def test_a_module_trains_as_torchs_does(kind, fused_optimizer):
    """The weights after ten steps; those of an optimizer with fused=True change without a new version."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(6, 20, 2, bidirectional=True)
    ours = getattr(fused_ops.nn, kind)(6, 20, 2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, target = randn(9, 4, 6), randn(9, 4, 40, seed=1)
    losses = []
    for module in (theirs, ours):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, fused=fused_optimizer)
        with fused_ops.use_backend("cpu"):
            for _ in range(10):
                optimizer.zero_grad()
                loss = (module(x)[0] - target).square().mean()
                loss.backward()
                optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_a_changed_output_is_noticed():
    case = Case("lstm", dtype=torch.float32)
    tensors = single(case)
    output = case.flat(*tensors, backend="cpu")[0]
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("wrong", ("gates exchanged", "states one step late", "no gradient of h_n", "a mask left out"))
@pytest.mark.parametrize("mode", ("gru", "lstm"))
def test_a_wrong_backward_is_rejected(wrong, mode, monkeypatch):
    case = Case(mode, time=5, batch=4, inputs=7, hidden=12, layers=2)
    check(case)
    right = torch.ops.fused_ops.rnn_bwd_cpu

    def mutant(*arguments):
        arguments = list(arguments)
        if wrong == "gates exchanged":
            arguments[19] = arguments[19].unflatten(-1, (4, 12))[..., [1, 0, 2, 3], :].flatten(-2)
        elif wrong == "states one step late":
            arguments[16] = arguments[16].roll(1, 0)
        elif wrong == "no gradient of h_n":
            arguments[1] = None
        else:
            arguments[11] = torch.full((1, 5, 4, 12), 0.99)
        return right(*arguments)

    monkeypatch.setattr(torch.ops.fused_ops, "rnn_bwd_cpu", mutant)
    with pytest.raises(AssertionError, match="error"):
        check(case)
