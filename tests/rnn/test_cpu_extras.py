"""The C++ sequences with a projected state, recurrent masks, zoneout and a layer norm: values, gradients, bits."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch.library import opcheck

from fused_ops.core.extension import has_kernel
from fused_ops.rnn import op, reference
from fused_ops.rnn.reference import Static, Tensors
from tests.rnn.common import MODES, Case
from tests.rnn.extras import LENGTHS, SIZES, flat_call, packed
from tests.support import assert_accurate, poisoned_memory, threads, value_and_gradients

pytestmark = pytest.mark.skipif(not has_kernel("rnn_bwd_cpu", "CPU"), reason="_C.so was not built")

EXTRAS = (("masks",), ("zones",), ("zoneout",), ("masks", "zones"), ("masks", "zoneout"))
SHAPES = (
    Case(time=1, batch=1, inputs=1, hidden=1),
    Case(time=5, batch=3, inputs=4, hidden=5, layers=3, bidirectional=True),
    Case(time=8, batch=90, inputs=9, hidden=18, layers=2, bias=False),
    Case(time=3, batch=70, inputs=5, hidden=33, bidirectional=True),
    Case(time=4, batch=1, inputs=7, hidden=230),
    Case(time=3, batch=0),
)
EVERYTHING = ("norm", "masks", "zones")
PROJECTED = (
    Case("lstm", time=2, batch=1, inputs=1, hidden=3, proj=1),
    Case("lstm", time=6, batch=3, inputs=4, hidden=21, layers=3, bidirectional=True, proj=17),
    Case("lstm", time=8, batch=90, inputs=9, hidden=40, layers=2, bias=False, proj=5),
    Case("lstm", time=4, batch=1, inputs=7, hidden=230, proj=100),
    Case("lstm", time=3, batch=0, hidden=6, proj=2),
)


def call_of(case: Case, extras=(), ragged: bool = True) -> tuple[Tensors, list, Static]:
    """In float64, from what float32 holds; weights small enough that the masks do not make the recurrence chaotic."""
    steps = torch.arange(case.time * case.batch).reshape(case.time, case.batch)
    lengths, resets = steps[0] * 7 % (case.time + 1) if case.time else None, steps % 5 == 1
    tensors, params, static = flat_call(case, set(extras), *((lengths, resets) if ragged else (None, None)))
    params = [0.6 * p for p in params]
    return converted(tensors, torch.float32, torch.float64), converted(params, torch.float32, torch.float64), static


def converted(tensors, *dtypes):
    found = []
    for t in tensors:
        for dtype in dtypes if t is not None and t.is_floating_point() else ():
            t = t.to(dtype)
        found.append(t)
    return Tensors(*found) if isinstance(tensors, Tensors) else found


def run(function, tensors: Tensors, params, static: Static, dtype=torch.float64) -> tuple[list, list]:
    """Values, and gradients by input, states and parameters. A kernel's input is NaN in its padding."""
    tensors, params = converted(tensors, dtype), converted(params, dtype)
    if tensors.lengths is not None and function is op.sequence_cpu:
        past = torch.arange(tensors.input.size(0))[:, None] >= tensors.lengths
        tensors = tensors._replace(input=tensors.input.masked_fill(past[..., None], float("nan")))
    states = [t for t in (tensors.h0, tensors.c0) if t is not None]
    leaves = [t.detach().clone().requires_grad_() for t in (tensors.input, *states, *params)]

    def call(input, *rest):
        held = tensors._replace(input=input, h0=rest[0], c0=rest[1] if len(states) == 2 else None)
        weights = rest[len(states) :]
        if function is op.sequence_cpu:
            return function(held, weights, static, 0.0)
        return function(*held, *weights, *static)

    return value_and_gradients(call, leaves)


@lru_cache(None)
def oracles(case: Case, extras: tuple[str, ...], ragged: bool):
    """What `maths` makes of the call in float64, and in float32."""
    call = call_of(case, extras, ragged)
    return run(reference.maths, *call), run(reference.maths, *call, torch.float32)


def check(case: Case, extras=(), ragged: bool = True) -> None:
    """Few values are normalised with a rounding error larger than theirs."""
    ulps = 8 if "norm" in extras else 4
    exact, theirs = oracles(case, extras, ragged)
    with poisoned_memory():
        found = run(op.sequence_cpu, *call_of(case, extras, ragged), torch.float32)
    terms = case.inputs + case.hidden
    for value, wanted, rounded in zip(found[0], exact[0], theirs[0], strict=True):
        assert_accurate(value, wanted, rounded, terms=terms, ulps=ulps)
    for value, wanted, rounded in zip(found[1], exact[1], theirs[1], strict=True):
        assert_accurate(value, wanted, rounded, factor=3, terms=terms + case.time * case.batch, ulps=ulps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_masks_and_zoneout(case, mode, isa):
    for extras in EXTRAS:
        check(replace(case, mode=mode), extras, ragged=extras != ("masks", "zones"))


@pytest.mark.parametrize("extras", ((), *EXTRAS[2:4]), ids="+".join)
@pytest.mark.parametrize("case", PROJECTED, ids=str)
def test_projected_state(case, extras, isa):
    check(case, extras)


@pytest.mark.parametrize("case", (*(Case(mode) for mode in MODES), Case("lstm", proj=4)), ids=str)
@pytest.mark.parametrize("extras", (("zoneout",), ("masks", "zones"), EVERYTHING), ids="+".join)
def test_packed_rows_are_those_of_lengths(case, extras):
    case = replace(case, layers=2, bidirectional=True)
    tensors, params, static = flat_call(case, set(extras), LENGTHS, all_states=False)
    tensors, params = converted(tensors, torch.float32), converted(params, torch.float32)
    output, *finals = op.sequence_cpu(tensors, params, static, 0.0)
    data, *states = op.sequence_cpu(packed(tensors), params, static, 0.0)
    starts = SIZES.cumsum(0) - SIZES
    for place, row in enumerate((0, 2)):
        length = int(LENGTHS[row])
        assert torch.equal(data[starts[:length] + place], output[:length, row])
    assert all(torch.equal(state, final[:, [0, 2]]) for state, final in zip(states, finals, strict=True))


def rows_of(tensors: Tensors, rows: list[int]) -> Tensors:
    part = Tensors(*(t if t is None or t.dim() < 3 else t[..., rows, :] for t in tensors))
    return part._replace(lengths=tensors.lengths[rows], resets=tensors.resets[:, rows])


@pytest.mark.parametrize("extras", (("masks", "zones"), EVERYTHING), ids="+".join)
@pytest.mark.parametrize("case", (*(Case(mode) for mode in MODES), Case("lstm", proj=19)), ids=str)
def test_a_rows_bits_do_not_depend_on_the_batch_nor_on_threads(case, extras, isa):
    case = replace(case, time=6, batch=37, inputs=9, hidden=38, layers=2, bidirectional=True)
    tensors, params, static = call_of(case, extras)
    tensors, params = converted(tensors, torch.float32), converted(params, torch.float32)

    def bits(rows: list[int]) -> list[torch.Tensor]:
        part = rows_of(tensors, rows)
        leaves = [t.detach().requires_grad_() for t in (part.input, part.h0, part.c0) if t is not None]
        held = part._replace(**dict(zip(("input", "h0", "c0"), leaves)))
        found = op.sequence_cpu(held, params, static, 0.0)
        return [*found, *torch.autograd.grad(sum(t.square().sum() for t in found), leaves)]

    whole = bits(list(range(37)))
    for rows in ([0], [3, 4], list(range(8)), [36, 0, 12, 12]):
        assert all(torch.equal(a, b[..., rows, :]) for a, b in zip(bits(rows), whole, strict=True))
    for count in (1, 3):
        with threads(count):
            assert all(torch.equal(a, b) for a, b in zip(bits(list(range(37))), whole, strict=True))


@pytest.mark.parametrize("extras", (("masks", "zones"), EVERYTHING), ids="+".join)
@pytest.mark.parametrize("case", (*(Case(mode) for mode in MODES), Case("lstm", proj=140)), ids=str)
def test_panels_shared_between_threads_change_no_bit(case, extras):
    case = replace(case, time=4, batch=2, inputs=9, hidden=330)
    tensors, params, static = call_of(case, extras)
    results = []
    for count in (1, 2, 2):
        with threads(count):
            results.append(run(op.sequence_cpu, tensors, params, static, torch.float32))
    for part in range(2):
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other[part], results[0][part], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_state_that_zoneout_keeps_whole_is_the_first(mode):
    """Bit by bit, by mask and in expectation, and its gradient arrives unchanged."""
    tensors, params, static = call_of(Case(mode, time=7, batch=4, hidden=19), ragged=False)
    tensors, params = converted(tensors, torch.float32), converted(params, torch.float32)
    lstm = mode == "lstm"
    ones = torch.ones(1, 7, 4, 19, dtype=torch.bool)
    by_mask = tensors._replace(zone_h=ones, zone_c=ones if lstm else None), static
    expected = tensors, static._replace(zoneout_h=1.0, zoneout_c=float(lstm))
    for held, how in (by_mask, expected):
        h0 = held.h0.clone().requires_grad_()
        output, h_n, *_ = op.sequence_cpu(held._replace(h0=h0), params, how, 0.0)
        assert torch.equal(output, held.h0.expand_as(output)) and torch.equal(h_n, held.h0)
        (grad,) = torch.autograd.grad(output.sum(), h0)
        assert torch.equal(grad, torch.full_like(grad, 7.0))


@pytest.mark.parametrize("extras", (("masks", "zones"), EVERYTHING), ids="+".join)
@pytest.mark.parametrize("case", (Case("gru"), Case("lstm"), Case("lstm", proj=4)), ids=str)
def test_the_second_derivative_is_the_references(case, extras):
    tensors, params, static = call_of(replace(case, time=3, layers=2), extras)

    def penalty(function, dtype):
        held, weights = converted(tensors, dtype), converted(params, dtype)
        h0, w_hh = held.h0.clone().requires_grad_(), weights[1].clone().requires_grad_()
        held, weights = held._replace(h0=h0), [weights[0], w_hh, *weights[2:]]
        output = function(held, weights)[0]
        (first,) = torch.autograd.grad(output.square().sum(), h0, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (h0, w_hh))

    exact = penalty(lambda held, weights: reference.maths(*held, *weights, *static), torch.float64)
    found = penalty(lambda held, weights: op.sequence_cpu(held, weights, static, 0.0), torch.float32)
    for value, wanted in zip(found, exact, strict=True):
        assert wanted.abs().max() > 0
        assert_accurate(value, wanted, terms=100)


@pytest.mark.parametrize("case", (Case("rnn_tanh"), Case("lstm", proj=4)), ids=str)
@pytest.mark.parametrize("extras", (("zoneout",), ("masks", "zones"), EVERYTHING), ids="+".join)
def test_opcheck(case, extras):
    tensors, params, static = call_of(replace(case, layers=2, bidirectional=True), extras)
    tensors, params = converted(tensors, torch.float32), converted(params, torch.float32)
    how = op._cpu_static(static)
    forward, backward = (getattr(torch.ops.fused_ops, f"rnn_{way}_cpu").default for way in ("fwd", "bwd"))
    output, h_n, c_n, *saved = forward(*tensors, params, *how, True, True)
    grads = (output, h_n, c_n if static.is_lstm else None, None, None)
    for function, arguments in (
        (forward, (*tensors, params, *how, True, True)),
        (backward, (*grads, *tensors, params, output, *saved, *how, True, True)),
    ):
        opcheck(function, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("norm", ((), ("norm",)), ids=str)
@pytest.mark.parametrize("wrong", ("mask", "zone_h", "zone_c", "zoneout", "W_hr"))
def test_a_wrong_backward_is_rejected(wrong, norm, monkeypatch):
    case = Case("lstm", time=5, batch=4, inputs=7, hidden=12, layers=2, proj=7)
    extras = (*norm, "zoneout") if wrong == "zoneout" else (*norm, "masks", "zones")
    check(case, extras)
    right = torch.ops.fused_ops.rnn_bwd_cpu
    names = [argument.name for argument in right.default._schema.arguments]

    def mutant(*arguments):
        held = dict(zip(names, arguments, strict=True))
        if wrong == "mask":
            held["recurrent_masks"] = held["recurrent_masks"].roll(1, 1)
        elif wrong == "zoneout":
            held["zoneout_c"] *= 1.01
        elif wrong == "W_hr":
            held["params"] = [*held["params"][:4], held["params"][4] * 1.01, *held["params"][5:]]
        else:
            held[wrong] = held[wrong].clone()
            held[wrong][0, 1, 3, 3] ^= True
        return right(*held.values())

    monkeypatch.setattr(torch.ops.fused_ops, "rnn_bwd_cpu", mutant)
    with pytest.raises(AssertionError, match="error"):
        check(case, extras)
