"""The C++ sequences: every instruction set, odd sizes, ragged rows, resets, bitwise independence of rows."""

import copy
from dataclasses import replace

import pytest
import torch

import fused_ops
from fused_ops.core.extension import has_kernel
from fused_ops.rnn.reference import Tensors
from tests.rnn.common import MODES, Case, poisoned, torch_with_lengths
from tests.rnn.test_cells import CELLS, call, check_kernel, inputs
from tests.support import assert_accurate, error, noncontiguous, poisoned_memory, randn, threads

pytestmark = pytest.mark.skipif(not has_kernel("rnn_fwd_cpu", "CPU"), reason="_C.so was not built")

SHAPES = (
    Case(time=1, batch=1, inputs=1, hidden=1),
    Case(time=3, batch=2, inputs=4, hidden=5, layers=3, bidirectional=True),
    Case(time=7, batch=9, inputs=33, hidden=16, batch_first=True),
    Case(time=5, batch=17, inputs=3, hidden=31, layers=2, bias=False),
    Case(time=12, batch=8, inputs=64, hidden=64, bidirectional=True, batch_first=True),
    Case(time=2, batch=130, inputs=20, hidden=48),
    Case(time=6, batch=1, inputs=65, hidden=257),
    Case(time=9, batch=3, inputs=16, hidden=200, layers=2, bidirectional=True),
    Case(time=4, batch=0),
)
RAGGED = (SHAPES[1], SHAPES[2], SHAPES[3], SHAPES[7])


def single(case: Case) -> list[torch.Tensor]:
    return [t.float() for t in case.tensors()]


def resets_of(case: Case) -> torch.Tensor:
    resets = torch.arange(case.time * case.batch).reshape(case.time, case.batch) % 3 == 1
    return resets.T if case.batch_first else resets


def check(case: Case, tensors=None, **keywords) -> None:
    tensors = single(case) if tensors is None else tensors
    exact = case.flat(*(t.double() for t in tensors), **keywords, backend="reference")
    theirs = case.flat(*tensors, **keywords, backend="reference")
    with poisoned_memory():
        found = case.flat(*tensors, **keywords, backend="cpu")
    if not keywords:
        assert [t.stride() for t in found] == [t.stride() for t in theirs]
    for value, wanted, torch_value in zip(found, exact, theirs, strict=True):
        assert_accurate(value, wanted, torch_value, terms=case.inputs + case.hidden)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_values(case, mode, isa):
    check(replace(case, mode=mode))


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_lengths_and_padding_full_of_nan(case, mode, isa):
    case = replace(case, mode=mode)
    lengths = torch.arange(case.batch) * 7 % (case.time + 1)
    check(case, lengths=lengths)
    clean = single(case)
    wanted = case.flat(*clean, lengths=lengths, return_all_states=True, backend="cpu")
    clean[0] = poisoned(case, clean[0], lengths)
    with poisoned_memory():
        found = case.flat(*clean, lengths=lengths, return_all_states=True, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", RAGGED[:2], ids=str)
def test_resets_and_all_states(case, mode, isa):
    case = replace(case, mode=mode)
    lengths = torch.arange(case.batch) * 5 % (case.time + 1)
    check(case, resets=resets_of(case), lengths=lengths)
    check(case, resets=resets_of(case), lengths=lengths, return_all_states=True)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", RAGGED[:3], ids=str)
def test_packed_sequences(case, mode, isa):
    """Through fused_ops.nn, sorted and unsorted, against torch.nn, and bit by bit against `lengths`."""
    case = replace(case, mode=mode, dtype=torch.float32)
    module, x = case.module(), case.input()
    double, fused, hx = copy.deepcopy(module).double(), copy.deepcopy(module), case.states()
    fused.__class__ = getattr(fused_ops.nn, type(module).__name__)
    wide = tuple(t.double() for t in hx) if mode == "lstm" else hx.double()
    lengths = torch.arange(case.batch) * 7 % case.time + 1
    for rows in (lengths, lengths.sort(descending=True).values):
        wanted = torch_with_lengths(case, double, x.double(), wide, rows)
        theirs = torch_with_lengths(case, module, x, hx, rows)
        with fused_ops.use_backend("cpu"):
            found = torch_with_lengths(case, fused, x, hx, rows)
        for value, exact, torch_value in zip(found, wanted, theirs, strict=True):
            assert_accurate(value, exact, torch_value, terms=case.inputs + case.hidden)
        padded = case.run(x, hx, module.parameters(), lengths=rows, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(found, padded, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hidden", (5, 64, 70))
def test_a_rows_bits_do_not_depend_on_the_batch(hidden, mode, isa):
    case = Case(mode, time=6, batch=37, inputs=33, hidden=hidden, layers=2, bidirectional=True, dtype=torch.float32)
    tensors, states = case.tensors(), 3 if mode == "lstm" else 2
    lengths = torch.arange(37) % 7
    whole = case.flat(*tensors, lengths=lengths, backend="cpu")
    for rows in ([0], [3, 4], [5, 6, 7], list(range(5)), list(range(8)), list(range(1, 20)), [36, 0, 12, 12]):
        part = (*(t[:, rows] for t in tensors[:states]), *tensors[states:])
        found = case.flat(*part, lengths=lengths[rows], backend="cpu")
        assert all(torch.equal(a, b[:, rows]) for a, b in zip(found, whole, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_threads_and_repetition_change_no_bit(mode, isa):
    for case in (
        Case(mode, time=8, batch=2, inputs=300, hidden=260),
        Case(mode, time=5, batch=11, inputs=40, hidden=70, layers=2),
    ):
        tensors, results = single(case), []
        for count in (1, 2, 3, 3):
            with threads(count):
                results.append(case.flat(*tensors, backend="cpu"))
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@torch.no_grad()
def test_repeated_inputs_are_projected_once_and_change_no_bit(isa):
    """Rows of an embedding: the same values in many places, some equal only in part, some of another sign of zero."""
    table = randn(9, 40)
    table[1] = table[0]
    table[1, -1] += 1
    table[2], table[3] = 0.0, -0.0
    case = Case(time=20, batch=50, inputs=40, hidden=24, dtype=torch.float32)
    _, h, *params = case.tensors()
    picks = torch.randint(0, 9, (20, 50), generator=torch.Generator().manual_seed(0))
    check(case, [table[picks], h, *params], lengths=torch.arange(50) % 21)
    output, _ = case.flat(table[picks], h, *params, backend="cpu")
    for b in (0, 17, 49):
        alone, _ = case.flat(table[picks[:, b : b + 1]], h[:, b : b + 1], *params, backend="cpu")
        assert torch.equal(alone[:, 0], output[:, b])
    expanded = table[:1, None].expand(20, 50, 40)
    assert torch.equal(
        case.flat(expanded, h, *params, backend="cpu")[0],
        case.flat(expanded.contiguous(), h, *params, backend="cpu")[0],
    )


@torch.no_grad()
def test_noncontiguous_inputs(isa):
    case = Case(time=5, batch=6, inputs=12, hidden=20, layers=2, dtype=torch.float32)
    tensors = case.tensors()
    wanted = case.flat(*tensors, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(case.flat(*map(noncontiguous, tensors), backend="cpu"), wanted))
    tensors[0] = tensors[0].flip(0).flip(0).transpose(0, 1).contiguous().transpose(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(case.flat(*tensors, backend="cpu"), wanted))


@torch.no_grad()
def test_saturated_gates_and_values_that_are_not_finite(isa):
    case = Case(time=4, batch=5, inputs=3, hidden=10, dtype=torch.float32)
    x, h, *params = case.tensors()
    for scale in (50.0, 1e4, 1e30):
        check(case, [x * scale, h, *params])
    x[1, 2, 0], x[2, 3, 1] = float("nan"), float("inf")
    found = case.flat(x, h, *params, backend="cpu")
    assert found[0][1:, 2].isnan().all() and not found[0][0].isnan().any() and not found[0][:, [0, 1, 4]].isnan().any()
    assert found[0][:, 3].isfinite().all() == case.flat(x, h, *params, backend="reference")[0][:, 3].isfinite().all()


@torch.no_grad()
def test_sigmoid_and_tanh_are_right_to_two_ulp(isa):
    """One unit without recurrence: h' = n + z·(h − n) with z = 0 is tanh, with n = 0 and h = 1 is σ."""
    values = torch.cat(
        [torch.linspace(-20, 20, 20001), torch.logspace(-30, 1.9, 5000), -torch.logspace(-30, 1.9, 5000)]
    )
    case = Case(time=1, batch=len(values), inputs=1, hidden=1, dtype=torch.float32)

    def unit(w_ih: list, b_ih: list, h: float) -> torch.Tensor:
        params = [torch.tensor(w_ih)[:, None], torch.zeros(3, 1), torch.tensor(b_ih), torch.zeros(3)]
        return case.run(values[None, :, None], torch.full((1, len(values), 1), h), params, backend="cpu")[0]

    tanh, sigmoid = unit([0.0, 0.0, 1.0], [0.0, -1e9, 0.0], 0.0), unit([0.0, 1.0, 0.0], [0.0, 0.0, 0.0], 1.0)
    for found, exact in ((tanh, values.double().tanh()), (sigmoid, values.double().sigmoid())):
        ulp = torch.finfo(torch.float32).eps * exact.abs().clamp(min=1e-37)
        assert ((found.flatten().double() - exact).abs() / ulp)[exact.abs() > 1e-36].max() < 2


def test_the_op_checks_what_it_is_given(monkeypatch):
    x, h, *params = Case(dtype=torch.float32).tensors()
    op, good = torch.ops.fused_ops.rnn_fwd_cpu, ("gru", True, False, 0.0, 0.0, False, True, True)
    short, wide = torch.zeros(5, 2, dtype=torch.bool), torch.zeros(1, 5, 3, 6)
    for tensors, weights, message in (
        (Tensors(x, h, lengths=torch.tensor([1, 2, 6])), params, "lengths must be between 0 and input's 5"),
        (Tensors(x, h, lengths=torch.tensor([1, 2])), params, "lengths has the wrong shape"),
        (Tensors(x, h[:, :2]), params, "h0 must have input's batch"),
        (Tensors(x, h), params[:2], "params must hold 4 tensors"),
        (Tensors(x[..., :2], h), params, "params' weight has the wrong shape"),
        (Tensors(x[0], h, batch_sizes=torch.tensor([3, 1])), params, "batch_sizes must add up to input's 3 rows"),
        (Tensors(x[0], h, batch_sizes=torch.tensor([1, 2])), params, "batch_sizes must not grow"),
        (Tensors(x[0], h, batch_sizes=torch.tensor([4, -1])), params, "batch_sizes must not grow"),
        (Tensors(x, h, h), params, "c0 must be given exactly for an lstm"),
        (Tensors(x, h, resets=short), params, "resets has the wrong shape"),
        (Tensors(x, h, masks=torch.ones(3)), params, "masks has the wrong shape"),
        (Tensors(x, h, recurrent_masks=torch.ones(3)), params, "recurrent_masks has the wrong shape"),
        (Tensors(x, h, recurrent_masks=h.double()), params, "recurrent_masks must be Float"),
        (Tensors(x, h, zone_h=short), params, "zone_h has the wrong shape"),
        (Tensors(x, h, zone_h=wide), params, "zone_h must be Bool"),
        (Tensors(x, h, zone_c=wide.bool()), params, "only an lstm has a c to zone"),
        (Tensors(x.double(), h), params, "input must be float32"),
        (Tensors(x, h), [p.double() for p in params], "params must be float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*tensors, weights, *good)
    call = (*Tensors(x, h), params)
    for wrong, message in (
        (("elman", *good[1:]), "mode must be rnn_tanh, rnn_relu, gru or lstm, got elman"),
        (("gru", True, False, 1.5, 0.0, False, True, True), "zoneout must be between 0 and 1, got 1.5"),
        (("gru", True, False, 0.0, 0.5, False, True, True), "only an lstm has a c to zone"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*call, *wrong)
    output, _, _, inner, c_all, kept = op(*call, *good)
    for wrong, message in (
        ((output[:4], inner, c_all, kept), "output has the wrong shape"),
        ((output, inner, c_all, kept[..., :2]), "kept has the wrong shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fused_ops.rnn_bwd_cpu(output, *[None] * 4, *call, *wrong, *good)
    monkeypatch.setenv("FUSED_OPS_CPU_ISA", "sve")
    with pytest.raises(RuntimeError, match="FUSED_OPS_CPU_ISA must be portable"):
        op(*call, *good)


@torch.no_grad()
@pytest.mark.parametrize("wrong", ("r and z exchanged", "b_hn outside r", "one weight off", "state of another row"))
def test_a_wrong_kernel_is_rejected(wrong):
    case = Case(time=5, batch=6, inputs=12, hidden=20, dtype=torch.float32)
    x, h, w_ih, w_hh, b_ih, b_hh = case.tensors()
    exact = case.flat(*(t.double() for t in (x, h, w_ih, w_hh, b_ih, b_hh)))
    if wrong == "r and z exchanged":
        order = torch.cat([torch.arange(20, 40), torch.arange(20), torch.arange(40, 60)])
        w_ih, w_hh, b_ih, b_hh = (t[order] for t in (w_ih, w_hh, b_ih, b_hh))
    elif wrong == "b_hn outside r":
        b_ih, b_hh = b_ih.clone(), b_hh.clone()
        b_ih[40:] += b_hh[40:]
        b_hh[40:] = 0
    elif wrong == "one weight off":
        w_hh = w_hh.clone()
        w_hh[59, 19] *= 1.001
    else:
        h = h.roll(1, 1)
    found = case.flat(x, h, w_ih, w_hh, b_ih, b_hh, backend="cpu")
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(found[0], exact[0], terms=32)


def states_of(result) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@torch.no_grad()
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sizes", ((1, 1, 1), (3, 5, 7), (8, 64, 64), (150, 33, 48), (0, 4, 5)), ids=str)
def test_cell(sizes, cell, isa):
    for bias in (False, True):
        tensors = inputs(cell, *sizes, bias, dtype=torch.float32)
        states = 3 if cell == "lstm_cell" else 2
        exact = states_of(call(cell, *(t.double() for t in tensors)))
        theirs = states_of(call(cell, *tensors, function=getattr(torch, cell)))
        found = states_of(call(cell, *tensors, backend="cpu"))
        for value, wanted, torch_value in zip(found, exact, theirs, strict=True):
            assert_accurate(value, wanted, torch_value, terms=sizes[1] + sizes[2])
        for rows in ([0], list(range(3))):
            if sizes[0] >= len(rows):
                part = states_of(call(cell, *(t[rows] for t in tensors[:states]), *tensors[states:], backend="cpu"))
                assert all(torch.equal(a, b[rows]) for a, b in zip(part, found, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_cell_gradients(cell, isa):
    check_kernel(cell, "cpu", (5, 9, 21), torch.float32, "cpu")


@torch.no_grad()
def test_a_new_weight_is_seen_at_once():
    """Weights are packed in every call: a write that bumps no version counter must show."""
    case = Case(dtype=torch.float32)
    tensors = case.tensors()
    before = case.flat(*tensors, backend="cpu")[0]
    tensors[3].numpy()[:] *= 2
    after = case.flat(*tensors, backend="cpu")[0]
    assert error(after, case.flat(*tensors, backend="reference")[0]) < 1e-5 < error(after, before)


def test_auto_takes_it_where_it_is_not_slower():
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    ours = "cpu" if fast else "reference"
    for mode in MODES:
        for requires_grad in (False, True):
            case = Case(mode, time=20, layers=2, dtype=torch.float32)
            assert fused_ops.explain(case.flat, *case.tensors(requires_grad)).chosen == ours
            for keywords in ({"resets": torch.zeros(20, 3, dtype=torch.bool)}, {"return_all_states": True}):
                assert fused_ops.explain(case.flat, *case.tensors(requires_grad), **keywords).chosen == ours
            short = Case(mode, time=1, dtype=torch.float32)
            chosen = fused_ops.explain(short.flat, *short.tensors(requires_grad)).chosen
            assert chosen == (ours if mode == "lstm" or (mode == "gru" and requires_grad) else "reference")
            chosen = fused_ops.explain(short.flat, *short.tensors(), lengths=torch.ones(3, dtype=torch.int64)).chosen
            assert chosen == ours
            many = Case(mode, time=20, batch=32, dtype=torch.float32)
            delegated = mode == "lstm" and not requires_grad
            chosen = fused_ops.explain(many.flat, *many.tensors(requires_grad)).chosen
            assert chosen == ("reference" if delegated else ours)
            lengths = torch.arange(32) % 21
            assert fused_ops.explain(many.flat, *many.tensors(requires_grad), lengths=lengths).chosen == ours
            cell = inputs(f"{mode}_cell", 300, 4, 64, dtype=torch.float32)
            cell = [t.requires_grad_(requires_grad) for t in cell]
            chosen = fused_ops.explain(call, f"{mode}_cell", *cell).chosen
            assert chosen == ("reference" if requires_grad else ours)
    assert fused_ops.explain(call, "gru_cell", *inputs("gru_cell", 9, 4, 64, dtype=torch.float32)).chosen == "reference"


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs AVX2")
@pytest.mark.parametrize(
    "case, chosen",
    (
        (Case("lstm", time=8, dtype=torch.float16), "cpu"),
        (Case("gru", time=8, dtype=torch.bfloat16), "cpu"),
        (Case("gru", time=7, dtype=torch.bfloat16), "reference"),
        (Case("rnn_tanh", time=8, batch=9, hidden=256, dtype=torch.bfloat16), "reference"),
        (Case("lstm", time=8, dtype=torch.bfloat16), "reference"),
        (Case("lstm", time=8, proj=2, dtype=torch.float32), "cpu"),
        (Case("lstm", time=7, proj=2, dtype=torch.float32), "reference"),
    ),
    ids=str,
)
def test_auto_takes_half_types_and_projected_states_where_torch_is_slower(case, chosen):
    assert fused_ops.explain(case.flat, *case.tensors()).chosen == chosen


def test_what_it_does_not_serve_is_refused_with_a_reason():
    double = Case("lstm")
    with pytest.raises(fused_ops.BackendUnavailable, match="takes float32, float16 and bfloat16"):
        double.flat(*double.tensors(), backend="cpu")
    assert fused_ops.explain(double.flat, *double.tensors()).chosen == "reference"
