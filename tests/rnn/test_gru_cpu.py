"""The C++ GRU: every instruction set, odd sizes, ragged rows, bitwise independence of rows."""

import re
from pathlib import Path

import pytest
import torch

import fused_ops
from fused_ops.core.extension import has_kernel
from tests.rnn.common import Case, poisoned, torch_with_lengths
from tests.support import assert_accurate, error, noncontiguous, randn, value_and_gradients

pytestmark = pytest.mark.skipif(not has_kernel("gru_fwd_cpu", "CPU"), reason="_C.so was not built")

FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
HAS = {"avx512": "avx512vl" in FLAGS and "avx512dq" in FLAGS, "avx2": re.search(r"\bavx2\b", FLAGS), "portable": True}


@pytest.fixture(params=HAS)
def isa(request, monkeypatch):
    if not HAS[request.param]:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("FUSED_OPS_CPU_ISA", request.param)
    return request.param


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


def check(case: Case, lengths=None, tensors=None) -> None:
    tensors = case.tensors() if tensors is None else tensors
    single = [t.float() for t in tensors]
    exact = case.flat(*(t.double() for t in single), lengths=lengths, backend="reference")
    theirs = case.flat(*single, lengths=lengths, backend="reference")
    found = case.flat(*single, lengths=lengths, backend="cpu")
    assert [t.stride() for t in found] == [t.stride() for t in theirs]
    for value, wanted, torch_value in zip(found, exact, theirs):
        assert_accurate(value, wanted, torch_value, terms=case.inputs + case.hidden)


@torch.no_grad()
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_values(case, isa):
    check(case)


@torch.no_grad()
@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_lengths(case, isa):
    lengths = torch.arange(case.batch) * 7 % (case.time + 1)
    check(case, lengths)
    clean = [t.float() for t in case.tensors()]
    wanted = case.flat(*clean, lengths=lengths, backend="cpu")
    clean[0] = poisoned(case, clean[0], lengths)
    assert all(torch.equal(a, b) for a, b in zip(case.flat(*clean, lengths=lengths, backend="cpu"), wanted))


@torch.no_grad()
@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_packed_sequences(case, isa):
    """Through fused_ops.nn.GRU, sorted and unsorted, against torch.nn.GRU, and bit by bit against `lengths`."""
    case = case.to(torch.float32)
    module, x = case.module(), case.input()
    fused = case.module()
    fused.__class__ = fused_ops.nn.GRU
    lengths = torch.arange(case.batch) * 7 % case.time + 1
    for rows in (lengths, lengths.sort(descending=True).values):
        wanted = torch_with_lengths(case, module, x, case.states(), rows)
        with fused_ops.use_backend("cpu"):
            found = torch_with_lengths(case, fused, x, case.states(), rows)
        for value, torch_value in zip(found, wanted):
            assert_accurate(value, torch_value.double(), terms=case.inputs + case.hidden)
        padded = case.run(x, case.states(), module.parameters(), lengths=rows, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(found, padded))


@torch.no_grad()
@pytest.mark.parametrize("hidden", (5, 64, 70))
def test_a_rows_bits_do_not_depend_on_the_batch(hidden, isa):
    case = Case(time=6, batch=37, inputs=33, hidden=hidden, layers=2, bidirectional=True, dtype=torch.float32)
    x, h, *params = case.tensors()
    lengths = torch.arange(37) % 7
    output, h_n = case.flat(x, h, *params, lengths=lengths, backend="cpu")
    for rows in ([0], [3, 4], [5, 6, 7], list(range(5)), list(range(8)), list(range(1, 20)), [36, 0, 12, 12]):
        part = case.flat(x[:, rows], h[:, rows], *params, lengths=lengths[rows], backend="cpu")
        assert torch.equal(part[0], output[:, rows]) and torch.equal(part[1], h_n[:, rows])


@torch.no_grad()
def test_threads_and_repetition_change_no_bit(isa):
    threads = torch.get_num_threads()
    try:
        for case in (
            Case(time=8, batch=2, inputs=300, hidden=260),
            Case(time=5, batch=11, inputs=40, hidden=70, layers=2),
        ):
            tensors = [t.float() for t in case.tensors()]
            results = []
            for count in (1, 2, 3, 3):
                torch.set_num_threads(count)
                results.append(case.flat(*tensors, backend="cpu"))
            assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))
    finally:
        torch.set_num_threads(threads)


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
    check(case, torch.arange(50) % 21, [table[picks], h, *params])
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
        check(case, None, [x * scale, h, *params])
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


def test_gradients_by_name(isa):
    case = Case(time=4, batch=3, inputs=5, hidden=9, layers=2, bidirectional=True)
    lengths = torch.tensor([4, 0, 2])
    single = [t.float().requires_grad_() for t in case.tensors()]
    exact = [t.detach().double().requires_grad_() for t in single]
    wanted = value_and_gradients(lambda *t: case.flat(*t, lengths=lengths, backend="reference"), exact)
    theirs = value_and_gradients(lambda *t: case.flat(*t, lengths=lengths, backend="reference"), single)
    single[0] = poisoned(case, single[0].detach(), lengths).requires_grad_()
    found = value_and_gradients(lambda *t: case.flat(*t, lengths=lengths, backend="cpu"), single)
    for value, exact_value, torch_value in zip(found[1], wanted[1], theirs[1]):
        assert_accurate(value, exact_value, torch_value, factor=3, terms=50)
    (first,) = torch.autograd.grad(
        case.flat(*single, lengths=lengths, backend="cpu")[0].sum(), single[1], create_graph=True
    )
    second = torch.autograd.grad(first.square().sum(), single[2:])
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in second[:3])


def test_auto_takes_it_without_gradients_only():
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    case, short = Case(time=20, dtype=torch.float32), Case(time=1, dtype=torch.float32)
    tensors = case.tensors(requires_grad=True)
    assert fused_ops.explain(case.flat, *tensors).chosen == "reference"
    assert fused_ops.explain(short.flat, *short.tensors()).chosen == "reference"
    cell = (randn(200, 4), randn(200, 6), *tensors[2:])
    assert fused_ops.explain(fused_ops.gru_cell, *cell).chosen == "reference"
    with torch.no_grad():
        assert fused_ops.explain(case.flat, *tensors).chosen == ("cpu" if fast else "reference")
        assert fused_ops.explain(fused_ops.gru_cell, *cell).chosen == ("cpu" if fast else "reference")
        assert fused_ops.explain(fused_ops.gru_cell, *(t[:9] for t in cell[:2]), *cell[2:]).chosen == "reference"
        for keywords, reason in (
            ({"resets": torch.zeros(20, 3, dtype=torch.bool)}, "resets"),
            ({"return_all_states": True}, "all states"),
        ):
            with pytest.raises(fused_ops.BackendUnavailable, match=reason):
                case.flat(*tensors, backend="cpu", **keywords)
        with pytest.raises(fused_ops.BackendUnavailable, match="float32"):
            case.to(torch.float64).flat(*case.to(torch.float64).tensors(), backend="cpu")


def test_the_op_checks_what_it_is_given(monkeypatch):
    x, h, *params = Case(dtype=torch.float32).tensors()
    op = torch.ops.fused_ops.gru_fwd_cpu
    for call, message in (
        ((x, h, torch.tensor([1, 2, 6]), None, params, True, False), "lengths must be between 0 and input's 5 steps"),
        ((x, h, torch.tensor([1, 2]), None, params, True, False), "lengths has the wrong shape"),
        ((x, h[:, :2], None, None, params, True, False), "h0 must have input's batch"),
        ((x, h, None, None, params[:2], True, False), "params must hold 4 tensors"),
        ((x[..., :2], h, None, None, params, True, False), "params' weight has the wrong shape"),
        ((x[0], h, None, torch.tensor([3, 1]), params, True, False), "batch_sizes must add up to input's 3 rows"),
        ((x[0], h, None, torch.tensor([1, 2]), params, True, False), "batch_sizes must not grow"),
        ((x[0], h, None, torch.tensor([4, -1]), params, True, False), "batch_sizes must not grow"),
        ((x.double(), h, None, None, params, True, False), "input must be float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*call)
    monkeypatch.setenv("FUSED_OPS_CPU_ISA", "sve")
    with pytest.raises(RuntimeError, match="FUSED_OPS_CPU_ISA must be portable"):
        op(x, h, None, None, params, True, False)


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


@torch.no_grad()
@pytest.mark.parametrize("sizes", ((1, 1, 1), (3, 5, 7), (8, 64, 64), (150, 33, 48), (0, 4, 5)), ids=str)
@pytest.mark.parametrize("bias", (False, True))
def test_cell(sizes, bias, isa):
    batch, inputs, hidden = sizes
    x, h = randn(batch, inputs), randn(batch, hidden)
    weights = [randn(3 * hidden, inputs) / inputs**0.5, randn(3 * hidden, hidden) / hidden**0.5]
    weights += [randn(3 * hidden), randn(3 * hidden, seed=1)] if bias else []
    exact = fused_ops.gru_cell(*(t.double() for t in (x, h, *weights)))
    found = fused_ops.gru_cell(x, h, *weights, backend="cpu")
    assert_accurate(found, exact, torch.gru_cell(x, h, *weights), terms=inputs + hidden)
    for rows in ([0], list(range(3))):
        if batch >= len(rows):
            assert torch.equal(fused_ops.gru_cell(x[rows], h[rows], *weights, backend="cpu"), found[rows])


def test_cell_gradients_by_name():
    x, h, *weights = (randn(4, 5), randn(4, 6), randn(18, 5), randn(18, 6), randn(18), randn(18, seed=1))
    tensors = [t.requires_grad_() for t in (x, h, *weights)]
    exact = value_and_gradients(fused_ops.gru_cell, [t.detach().double().requires_grad_() for t in tensors])
    theirs = value_and_gradients(torch.gru_cell, tensors)
    found = value_and_gradients(lambda *t: fused_ops.gru_cell(*t, backend="cpu"), tensors)
    for value, wanted, torch_value in zip(found[1], exact[1], theirs[1]):
        assert_accurate(value, wanted, torch_value, factor=3, terms=11)


@torch.no_grad()
def test_a_new_weight_is_seen_at_once():
    """Weights are packed in every call: a write that bumps no version counter must show."""
    case = Case(dtype=torch.float32)
    tensors = case.tensors()
    before = case.flat(*tensors, backend="cpu")[0]
    tensors[3].numpy()[:] *= 2
    after = case.flat(*tensors, backend="cpu")[0]
    assert error(after, case.flat(*tensors, backend="reference")[0]) < 1e-5 < error(after, before)
