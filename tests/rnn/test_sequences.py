"""rnn_tanh, rnn_relu, gru and lstm against torch.nn, against themselves in pieces, and against wrong ones."""

import pytest
import torch
from torch import Tensor

import fused_ops
from fused_ops.rnn import reference
from tests.rnn.common import MODES, Case, flat, poisoned, torch_with_lengths
from tests.support import assert_accurate, noncontiguous, value_and_gradients

SHAPES = (
    Case(),
    Case(layers=2, bidirectional=True),
    Case(layers=2, bias=False, batch_first=True),
    Case(bidirectional=True, batch_first=True, layers=3),
    Case(time=1, batch=1, inputs=1, hidden=1),
    Case(batch=0),
)
CASES = [Case(**{**vars(shape), "mode": mode}) for mode in MODES for shape in SHAPES]
CASES += [
    Case("lstm", proj=2, layers=2, bidirectional=bidirectional, bias=bias)
    for bidirectional in (False, True)
    for bias in (False, True)
]
RAGGED = [case for case in CASES if case.batch == 3]
LENGTHS = torch.tensor([2, 5, 1])


def same(found, wanted) -> None:
    assert len(found) == len(wanted)
    for value, exact in zip(found, wanted):
        assert_accurate(value, exact, terms=16)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_strides_and_gradients_are_torchs(case):
    module, tensors = case.module(), case.tensors(requires_grad=True)
    wanted, wanted_grads = value_and_gradients(
        lambda x, *rest: flat(module(x, rest[:2] if case.mode == "lstm" else rest[0])), tensors
    )
    module_grads = [g for g in wanted_grads[: len(tensors) - len(list(module.parameters()))]]
    found, grads = value_and_gradients(case.flat, tensors)
    same(found, wanted)
    same(grads[: len(module_grads)], module_grads)
    assert [t.stride() for t in found] == [t.stride() for t in wanted]
    total = sum((t * torch.ones_like(t)).sum() for t in flat(module(tensors[0].detach(), case.states())))
    theirs = torch.autograd.grad(total, list(module.parameters()))
    ours = torch.autograd.grad(sum(t.sum() for t in case.flat(*tensors)), tensors[-len(theirs) :])
    same(ours, theirs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extra", ("plain", "lengths", "resets"))
def test_low_precision_is_as_accurate_as_torch(mode, dtype, extra):
    case = Case(mode, layers=2, bidirectional=True, inputs=33, hidden=40)
    keywords = {
        "plain": {},
        "lengths": {"lengths": LENGTHS},
        "resets": {"resets": torch.arange(15).reshape(5, 3) % 4 == 0},
    }[extra]
    low = case.to(dtype)
    tensors = [t.to(dtype) for t in case.tensors()]
    exact = case.flat(*(t.double() for t in tensors), **keywords)
    theirs = flat(low.module()(low.input(), low.states())) if extra == "plain" else [None] * len(exact)
    for value, wanted, torch_value in zip(low.flat(*tensors, **keywords), exact, theirs):
        assert value.dtype == dtype
        assert_accurate(value, wanted, torch_value, terms=73)


@pytest.mark.parametrize("case", RAGGED, ids=str)
@pytest.mark.parametrize("path", ("packing", "maths"))
def test_lengths_replace_a_packed_sequence_and_padding_is_never_read(case, path, monkeypatch):
    if path == "maths":
        monkeypatch.setattr(reference, "_by_packing", lambda *parts: reference.maths(*parts[0], *parts[1], *parts[2]))
    lengths = LENGTHS.clamp(max=case.time)
    module, tensors = case.module(), case.tensors(requires_grad=True)
    clean = tensors[0]
    wanted = torch_with_lengths(case, module, clean, case.states(), lengths)
    with torch.no_grad():
        tensors[0] = poisoned(case, clean, lengths)
    tensors[0].requires_grad_()
    found, grads = value_and_gradients(lambda *t: case.flat(*t, lengths=lengths), tensors)
    same(found, wanted)
    assert all(not grad.isnan().any() for grad in grads)
    total, params = sum(t.sum() for t in wanted), [clean, *module.parameters()]
    theirs = torch.autograd.grad(total, params)
    ours = torch.autograd.grad(
        sum(t.sum() for t in case.flat(*tensors, lengths=lengths)), [tensors[0], *tensors[-len(params) + 1 :]]
    )
    same(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", ([0, 5, 0], [0, 0, 0]), ids=str)
def test_length_zero_keeps_the_first_state(mode, lengths):
    case = Case(mode, layers=2, bidirectional=True)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    tensors = case.tensors(requires_grad=True)
    output, *finals = case.flat(*tensors, lengths=lengths)
    alone = case.flat(
        tensors[0][:, 1:2], *(t[:, 1:2] for t in tensors[1 : len(finals) + 1]), *tensors[len(finals) + 1 :]
    )
    for b, length in enumerate(lengths.tolist()):
        if length == 0:
            assert not output[:, b].any()
            assert all(torch.equal(final[:, b], first[:, b]) for final, first in zip(finals, tensors[1:]))
        else:
            same([output[:, b : b + 1], *(f[:, b : b + 1] for f in finals)], alone)
    grads = torch.autograd.grad(output.sum() + sum(f.sum() for f in finals), tensors, materialize_grads=True)
    assert all(not grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", (False, True))
def test_a_reset_begins_a_new_sequence(mode, batch_first):
    """One row, one direction, one layer: resets at 0, 2 and the last step are three separate runs from zero."""
    case = Case(mode, time=6, batch=1, batch_first=batch_first)
    tensors = case.tensors()
    resets = torch.tensor([True, False, True, False, False, True])[:, None]
    states = 2 if mode == "lstm" else 1
    found = case.flat(*tensors, resets=resets.T if batch_first else resets)
    axis, pieces = 1 if batch_first else 0, []
    for begin, end in ((0, 2), (2, 5), (5, 6)):
        zeros = [torch.zeros_like(t) for t in tensors[1 : 1 + states]]
        pieces.append(case.flat(tensors[0].narrow(axis, begin, end - begin), *zeros, *tensors[1 + states :]))
    same(found, [torch.cat([piece[0] for piece in pieces], axis), *pieces[-1][1:]])


@pytest.mark.parametrize("mode", MODES)
def test_resets_act_in_each_directions_order_in_every_layer(mode):
    """Layer by layer and direction by direction, the reverse one run forward on the flipped sequence."""
    case = Case(mode, layers=2, bidirectional=True, time=7)
    tensors, states = case.tensors(), 2 if mode == "lstm" else 1
    resets = torch.rand(7, 3, generator=torch.Generator().manual_seed(5)) < 0.3
    lengths = torch.tensor([7, 0, 4])
    x, per_cell, finals = tensors[0], 4, []
    for layer in range(2):
        outputs = []
        for direction in range(2):
            cell = 2 * layer + direction
            single = Case(mode, inputs=x.size(-1), time=7)
            params = tensors[1 + states + cell * per_cell :][:per_cell]
            start = [t[cell : cell + 1] for t in tensors[1 : 1 + states]]
            turn = flipped if direction else (lambda t, lengths: t)
            y, *final = single.flat(
                turn(x, lengths), *start, *params, lengths=lengths, resets=turn(resets[..., None], lengths)[..., 0]
            )
            outputs.append(turn(y, lengths))
            finals.append(final)
        x = torch.cat(outputs, -1)
    found = case.flat(*tensors, lengths=lengths, resets=resets)
    same(found, [x, *(torch.cat(final) for final in zip(*finals))])


def flipped(x: Tensor, lengths: Tensor) -> Tensor:
    """Each row's steps below its length in reverse order."""
    found = x.clone()
    for b, length in enumerate(lengths.tolist()):
        found[:length, b] = x[:length, b].flip(0)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", (False, True))
def test_all_states_are_those_of_a_loop_over_steps(mode, batch_first):
    case = Case(mode, batch_first=batch_first)
    tensors, states = case.tensors(), 2 if mode == "lstm" else 1
    lengths = torch.tensor([5, 0, 3])
    found = case.flat(*tensors, lengths=lengths, return_all_states=True)
    assert len(found) == 1 + 2 * states
    now, axis = tensors[1 : 1 + states], 1 if batch_first else 0
    for t in range(case.time):
        _, *now = case.flat(tensors[0].narrow(axis, t, 1), *now, *tensors[1 + states :])
        live = (t < lengths)[:, None]
        for every, state in zip(found[1 + states :], now):
            assert every.shape == (1, case.time, case.batch, case.hidden)
            same([every[0, t]], [state[0] * live])
    same([found[1 + states][-1]], [found[0].transpose(0, 1) if batch_first else found[0]])


@pytest.mark.parametrize("mode", MODES)
def test_all_states_have_gradients_and_one_per_layer_and_direction(mode):
    case = Case(mode, layers=2, bidirectional=True, proj=2 if mode == "lstm" else 0)
    tensors = case.tensors(requires_grad=True)
    found = case.flat(*tensors, return_all_states=True)
    every = found[len(found) // 2 + 1 :]
    assert every[0].shape == (4, case.time, case.batch, case.proj or case.hidden)
    same([torch.cat([every[0][2], every[0][3]], -1)], [found[0]])
    if mode == "lstm":
        assert every[1].shape == (4, case.time, case.batch, case.hidden)
        same([torch.stack([every[1][i][-1 if i % 2 == 0 else 0] for i in range(4)])], [found[2]])
    grads = torch.autograd.grad(every[-1].sum(), tensors, materialize_grads=True)
    assert all(grad.abs().max() > 0 for grad in grads if grad.numel() and grad is not grads[-1])


@pytest.mark.parametrize("mode", MODES)
def test_noncontiguous_and_expanded_inputs(mode):
    case = Case(mode, layers=2)
    tensors = case.tensors()
    wanted = case.flat(*tensors)
    same(case.flat(*(noncontiguous(t) for t in tensors)), wanted)
    tensors[0] = tensors[0][:, :1].expand(-1, 3, -1)
    same(case.flat(*tensors), case.flat(*(t.contiguous() for t in tensors)))


@pytest.mark.parametrize("mode", MODES)
def test_dropout_draws_what_torch_draws(mode):
    case = Case(mode, layers=3, bidirectional=True, dtype=torch.float32)
    module, tensors = case.module(), case.tensors()
    module.dropout = 0.5
    states, params = (tensors[1:3], tensors[3:]) if mode == "lstm" else (tensors[1], tensors[2:])
    call = (tensors[0], states, params, True, 3, 0.5, True, True, False)
    torch.manual_seed(3)
    wanted = flat(module(tensors[0], case.states()))
    torch.manual_seed(3)
    same(getattr(fused_ops, mode)(*call), wanted)
    torch.manual_seed(3)
    same(getattr(fused_ops, mode)(*call, lengths=torch.full((3,), 5)), wanted)
    torch.manual_seed(4)
    assert not torch.equal(getattr(fused_ops, mode)(*call)[0], wanted[0])


BAD = {
    "input of two dimensions": (lambda a: a.update(input=a["input"][0]), "input must be 3-dimensional"),
    "no steps": (lambda a: a.update(input=a["input"][:0]), "input must be of at least one step"),
    "features": (lambda a: a.update(input=a["input"][..., :2]), "params.0. must be of shape .*, got"),
    "batch of hx": (lambda a: a.update(hx=a["hx"][:, :2]), "hx must be of shape"),
    "layers of hx": (lambda a: a.update(hx=a["hx"][:0]), "hx must be of shape"),
    "params": (lambda a: a.update(params=a["params"][:3]), "params must be 4 tensors"),
    "shape of a param": (lambda a: a["params"].__setitem__(1, a["params"][1][:, :2]), "params.1. must be of shape"),
    "dtype": (lambda a: a.update(hx=a["hx"].float()), "hx must be of input's dtype"),
    "dropout": (lambda a: a.update(dropout=1.5), "dropout must be between 0 and 1, got 1.5"),
    "lengths shape": (lambda a: a.update(lengths=torch.tensor([1, 2])), "lengths must be of shape"),
    "lengths value": (lambda a: a.update(lengths=torch.tensor([1, 2, 6])), "lengths must be between 0 and input's 5"),
    "lengths negative": (lambda a: a.update(lengths=torch.tensor([1, 2, -1])), "lengths must be between 0 and input"),
    "resets shape": (lambda a: a.update(resets=torch.zeros(3, 5, dtype=torch.bool)), "resets must be of shape"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_named(what):
    case = Case()
    arguments = dict(input=case.input(), hx=case.states(), params=list(case.module().parameters()), dropout=0.0)
    change, message = BAD[what]
    change(arguments)
    dropout = arguments.pop("dropout")
    rest = dict(has_biases=True, num_layers=1, dropout=dropout, train=True, bidirectional=False, batch_first=False)
    with pytest.raises(ValueError, match=message):
        fused_ops.gru(**arguments, **rest)


def test_wrong_types_are_type_errors():
    case = Case()
    tensors = case.tensors()
    for keywords, message in (
        ({"lengths": torch.tensor([1.0, 2.0, 3.0])}, "lengths must be integers"),
        ({"lengths": [1, 2, 3]}, "lengths must be a Tensor"),
        ({"resets": torch.zeros(5, 3)}, "resets must be bool"),
    ):
        with pytest.raises(TypeError, match=message):
            case.flat(*tensors, **keywords)
    with pytest.raises(TypeError, match="hx must be a Tensor"):
        case.run(tensors[0], None, tensors[2:])
    with pytest.raises(ValueError, match="hx must be a pair"):
        Case("lstm").run(tensors[0], tensors[1], tensors[2:])


def reset_before_the_product(gi, gh, h):
    (r_i, z_i, n_i), (r_h, z_h, n_h) = gi.chunk(3, -1), gh.chunk(3, -1)
    n = torch.tanh(torch.sigmoid(r_i + r_h) * (n_i + n_h))
    return n + torch.sigmoid(z_i + z_h) * (h - n)


def gates_in_another_order(gi, gh, h):
    (z_i, r_i, n_i), (z_h, r_h, n_h) = gi.chunk(3, -1), gh.chunk(3, -1)
    n = torch.tanh(n_i + torch.sigmoid(r_i + r_h) * n_h)
    return n + torch.sigmoid(z_i + z_h) * (h - n)


def update_turned_round(gi, gh, h):
    (r_i, z_i, n_i), (r_h, z_h, n_h) = gi.chunk(3, -1), gh.chunk(3, -1)
    n = torch.tanh(n_i + torch.sigmoid(r_i + r_h) * n_h)
    return h + torch.sigmoid(z_i + z_h) * (n - h)


@pytest.mark.parametrize("mutant", (reset_before_the_product, gates_in_another_order, update_turned_round))
def test_a_wrong_cell_is_rejected(mutant, monkeypatch):
    case = Case()
    wanted = flat(case.module()(case.input(), case.states()))
    same(case.flat(*case.tensors(), lengths=torch.full((3,), 5), resets=torch.zeros(5, 3, dtype=torch.bool)), wanted)
    monkeypatch.setattr(reference, "gru_gates", mutant)
    with pytest.raises(AssertionError, match="error"):
        same(
            case.flat(*case.tensors(), lengths=torch.full((3,), 5), resets=torch.zeros(5, 3, dtype=torch.bool)), wanted
        )


def lengths_one_short(tensors):
    return torch.arange(tensors.input.size(0))[:, None] < tensors.lengths - 1


def lengths_ignored(tensors):
    return torch.ones(tensors.input.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("mutant", (lengths_one_short, lengths_ignored))
@pytest.mark.parametrize("which", (0, 1), ids=("output", "h_n"))
def test_wrong_lengths_are_rejected(mutant, which, monkeypatch):
    case = Case(bidirectional=True)
    wanted = torch_with_lengths(case, case.module(), case.input(), case.states(), LENGTHS)[which]
    keywords = dict(lengths=LENGTHS, return_all_states=True)
    assert_accurate(case.flat(*case.tensors(), **keywords)[which], wanted, terms=16)
    monkeypatch.setattr(reference, "_valid", mutant)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(case.flat(*case.tensors(), **keywords)[which], wanted, terms=16)
