"""Layer norm inside the step in C++: values and every gradient, ragged rows, resets, bitwise independence of rows."""

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

import fused_ops
from fused_ops.core.extension import has_kernel
from fused_ops.rnn import op
from fused_ops.rnn.reference import Tensors
from tests.rnn.common import MODES, Case, poisoned
from tests.rnn.conftest import HAS
from tests.rnn.extras import with_norms
from tests.rnn.test_cpu_extras import EVERYTHING
from tests.rnn.test_cpu_extras import check as check_extras
from tests.support import assert_accurate, error, noncontiguous, poisoned_memory, randn, threads, value_and_gradients

pytestmark = pytest.mark.skipif(not has_kernel("rnn_bwd_cpu", "CPU"), reason="_C.so was not built")

SHAPES = (
    Case(time=1, batch=1, inputs=3, hidden=4),
    Case(time=3, batch=2, inputs=4, hidden=5, layers=3, bidirectional=True),
    Case(time=7, batch=9, inputs=33, hidden=16, batch_first=True),
    Case(time=5, batch=17, inputs=3, hidden=31, layers=2, bias=False),
    Case(time=9, batch=30, inputs=20, hidden=24, bidirectional=True),
    Case(time=2, batch=270, inputs=17, hidden=12),
    Case(time=6, batch=1, inputs=65, hidden=257),
    Case(time=4, batch=0),
)
RAGGED = (SHAPES[1], SHAPES[2], SHAPES[4])


def states_in(mode: str) -> int:
    return 3 if mode == "lstm" else 2


def single(case: Case) -> list[torch.Tensor]:
    """input, states and parameters, those of the norms after each cell's."""
    tensors, count = case.tensors(), states_in(case.mode)
    return [t.float().requires_grad_() for t in (*tensors[:count], *with_norms(case, tensors[count:]))]


def call(case: Case, tensors, backend: str, **keywords):
    return case.flat(*tensors, layer_norm=True, backend=backend, **keywords)


def check(case: Case, tensors=None, **keywords) -> None:
    """Values and every gradient on every instruction set this processor has."""
    tensors = single(case) if tensors is None else tensors
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = value_and_gradients(lambda *t: call(case, t, "reference", **keywords), exact)
    theirs = value_and_gradients(lambda *t: call(case, t, "reference", **keywords), tensors)
    if "lengths" in keywords:
        tensors[0] = poisoned(case, tensors[0].detach(), keywords["lengths"]).requires_grad_()
    for isa in [name for name, there in HAS.items() if there]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FUSED_OPS_CPU_ISA", isa)
            with poisoned_memory():
                found = value_and_gradients(lambda *t: call(case, t, "cpu", **keywords), tensors)
            with torch.no_grad(), poisoned_memory():
                again = call(case, tensors, "cpu", **keywords)
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))
        for factor, values in zip((2, 3), zip(wanted, theirs, found)):
            for exactly, torch_value, value in zip(*values, strict=True):
                terms = case.inputs + case.hidden + case.time * case.batch * (factor - 2)
                assert_accurate(value, exactly, torch_value, factor=factor, terms=terms, ulps=8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_values_and_gradients(case, mode):
    check(replace(case, mode=mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_ragged_rows_with_nan_in_their_padding_and_resets(case, mode):
    case = replace(case, mode=mode)
    resets = torch.arange(case.time * case.batch).reshape(case.time, case.batch) % 3 == 1
    resets = resets.T if case.batch_first else resets
    lengths = torch.arange(case.batch) * 7 % (case.time + 1)
    check(case, lengths=lengths)
    if case.layers > 1:
        check(case, lengths=torch.zeros_like(lengths))
    check(case, resets=resets, lengths=lengths, return_all_states=True)
    if case.batch_first:
        check(case, resets=torch.ones_like(resets), return_all_states=True)


COMPOSED = (("norm", "masks", "zoneout"), EVERYTHING)
COMPOSITIONS = (
    *(Case(mode, time=5, batch=3, hidden=5, layers=2, bidirectional=True) for mode in MODES),
    *(Case(mode, time=4, batch=70, inputs=5, hidden=18, bias=mode != "gru") for mode in MODES),
    Case("lstm", time=6, batch=3, inputs=4, hidden=21, layers=2, bidirectional=True, proj=17),
    Case("lstm", time=8, batch=40, inputs=9, hidden=40, bias=False, proj=5),
    Case("lstm", time=2, batch=1, inputs=1, hidden=3, proj=1),
)


@pytest.mark.parametrize("extras", COMPOSED, ids="+".join)
@pytest.mark.parametrize("case", COMPOSITIONS, ids=str)
def test_with_masks_zoneout_and_a_projection(case, extras, isa):
    """Of several layers and directions, ragged, with resets and all states; chunks of steps with more than one step."""
    check_extras(case, extras)


@pytest.mark.parametrize("extras", (("norm",), ("norm", "masks"), ("norm", "zones"), ("norm", "zoneout")), ids="+".join)
@pytest.mark.parametrize("case", (*(Case(mode, time=3) for mode in MODES), Case("lstm", time=3, proj=4)), ids=str)
def test_each_beside_the_norm_alone(case, extras):
    check_extras(case, extras, ragged=False)


def module(mode: str, layers: int = 2, dropout: float = 0.0):
    keywords = {"nonlinearity": mode.removeprefix("rnn_")} if mode.startswith("rnn") else {}
    kind = getattr(fused_ops.nn, {"gru": "GRU", "lstm": "LSTM"}.get(mode, "RNN"))
    found = kind(9, 21, layers, bidirectional=True, dropout=dropout, layer_norm=True, **keywords)
    with torch.no_grad():
        for i, param in enumerate(found.parameters()):
            param.add_(0.2 * randn(*param.shape, seed=40 + i))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences_are_lengths_bit_by_bit(mode):
    ours, x = module(mode), randn(11, 6, 9, requires_grad=True)
    leaves = [x, *ours.parameters()]
    for lengths in (torch.tensor([11, 9, 9, 4, 2, 1]), torch.tensor([2, 11, 9, 1, 9, 4])):
        with fused_ops.use_backend("cpu"):
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            output = torch.nn.utils.rnn.pad_packed_sequence(ours(packed)[0])[0]
            wanted = ours(x, lengths=lengths)[0]
        assert torch.equal(output, wanted)
        seed = randn(*output.shape)
        found = torch.autograd.grad(output, leaves, seed)
        for grad, exact in zip(found, torch.autograd.grad(wanted, leaves, seed), strict=True):
            assert grad.abs().max() > 0 and torch.equal(grad, exact)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_between_layers_is_the_forwards(mode):
    ours, x = module(mode, 3, 0.5), randn(6, 5, 9, requires_grad=True)
    lengths, leaves, results = torch.tensor([6, 0, 3, 6, 1]), [x, *ours.parameters()], []
    for backend in ("cpu", "reference"):
        torch.manual_seed(4)
        with fused_ops.use_backend(backend):
            output = ours(x, lengths=lengths)[0]
        results.append([output, *torch.autograd.grad(output, leaves, randn(*output.shape))])
    for value, wanted in zip(*results, strict=True):
        assert_accurate(value, wanted.double(), terms=100, ulps=8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hidden", (5, 70))
def test_a_rows_bits_do_not_depend_on_the_batch(hidden, mode, isa):
    case = Case(mode, time=6, batch=23, inputs=33, hidden=hidden, layers=2, bidirectional=True, dtype=torch.float32)
    tensors, count = single(case), states_in(mode)
    lengths, weights = torch.arange(23) % 7, randn(6, 23, 2 * hidden)

    def run(rows):
        part = [t.detach()[:, rows].requires_grad_() for t in tensors[:count]]
        found = call(case, (*part, *tensors[count:]), "cpu", lengths=lengths[rows])
        return [*found, *torch.autograd.grad((found[0] * weights[:, rows]).sum(), part)]

    whole = run(list(range(23)))
    for rows in ([0], [3, 4], [5, 6, 7], list(range(8)), list(range(1, 20)), [22, 0, 12, 12]):
        assert all(torch.equal(a, b[:, rows]) for a, b in zip(run(rows), whole, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "size", ({"batch": 21, "hidden": 40, "bidirectional": True}, {"batch": 2, "hidden": 330}), ids=str
)
def test_threads_and_repetition_change_no_bit(mode, size):
    """The second shape's panels are shared between threads."""
    case = Case(mode, time=6, inputs=30, **size, dtype=torch.float32)
    tensors, results = single(case), []
    for count in (2, 1, 2, 3):
        with threads(count):
            found = call(case, tensors, "cpu")
            results.append([*found, *torch.autograd.grad(sum(t.square().sum() for t in found), tensors)])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_every_subset_of_inputs_and_outputs(mode):
    case = Case(mode, layers=2, dtype=torch.float32)
    everything = single(case)
    keywords = {"return_all_states": True}
    wanted = torch.autograd.grad(sum(t.sum() for t in call(case, everything, "reference", **keywords)), everything)
    for only in range(len(everything)):
        tensors = [t.detach().requires_grad_(i == only) for i, t in enumerate(everything)]
        found = call(case, tensors, "cpu", **keywords)
        (grad,) = torch.autograd.grad(sum(t.sum() for t in found), [tensors[only]])
        torch.testing.assert_close(grad, wanted[only], atol=1e-4, rtol=1e-4)
    for only in range(len(found)):
        results = []
        for backend in ("cpu", "reference"):
            value = call(case, everything, backend, **keywords)[only]
            results.append(torch.autograd.grad(value.square().sum(), everything, materialize_grads=True))
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_noncontiguous_inputs_and_the_second_derivative(mode):
    case = Case(mode, bidirectional=True, dtype=torch.float32)
    tensors = single(case)
    check(case, [noncontiguous(t) for t in tensors])
    penalties = []
    for backend in ("cpu", "reference"):
        output = call(case, tensors, backend)[0]
        (first,) = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)
        penalties.append(torch.autograd.grad(first.square().sum(), tensors[: states_in(mode) + 2]))
    for value, wanted in zip(*penalties, strict=True):
        assert_accurate(value, wanted.double(), ulps=4000)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ("packed", "everything"))
def test_opcheck(mode, what):
    case = Case(mode, layers=2, bidirectional=True, dtype=torch.float32)
    x, h0, *params = (t.detach() for t in single(case))
    c0 = params.pop(0) if mode == "lstm" else None
    lengths, resets, sizes, masks = torch.tensor([5, 0, 2]), torch.arange(15).reshape(5, 3) % 4 == 0, None, None
    if what == "packed":
        x, lengths, resets, sizes = torch.randn(6, 4), None, None, torch.tensor([3, 2, 1])
    else:
        masks = torch.rand(1, 5, 3, 12)
    given, how = (*Tensors(x, h0, c0, lengths, resets, sizes, masks), params), (mode, True, True, 0.0, 0.0, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for keeps in ((False, False), (True, False), (True, True)):
        opcheck(torch.ops.fused_ops.rnn_fwd_cpu.default, (*given, *how, *keeps), test_utils=checks)
    output, h_n, c_n, *saved = torch.ops.fused_ops.rnn_fwd_cpu(*given, *how, True, True)
    grads = (torch.randn_like(output), torch.randn_like(h_n), torch.randn_like(c_n) if mode == "lstm" else None)
    for needs in ((True, True), (False, False)):
        arguments = (*grads, None, None, *given, output, *saved, *how, *needs)
        opcheck(torch.ops.fused_ops.rnn_bwd_cpu.default, arguments, test_utils=checks)


def test_a_module_compiles_to_one_graph():
    ours, x = module("lstm"), randn(5, 3, 9)
    traced = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    leaves = list(ours.parameters())
    with fused_ops.use_backend("cpu"):
        for part in (x, x[:3, :2]):
            wanted, found = ours(part)[0], traced(part)[0]
            assert torch.equal(found, wanted)
            grads = [torch.autograd.grad(output.square().sum(), leaves) for output in (found, wanted)]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("bad", "message"),
    (("missing", "must hold 6 tensors"), ("long", "norm has the wrong shape"), ("double", "must be float32")),
)
def test_the_op_checks_its_norms(bad, message):
    case = Case(dtype=torch.float32)
    x, h0, *params = single(case)
    if bad == "missing":
        params.pop()
    else:
        params[5] = params[5].double() if bad == "double" else torch.cat([params[5], params[5]])
    with pytest.raises(RuntimeError, match=f"params.* {message}"):
        torch.ops.fused_ops.rnn_fwd_cpu(*Tensors(x, h0), params, "gru", True, False, 0.0, 0.0, True, False, False)


WRONG = {
    "the kept rstd": lambda saved: saved[3][..., -4:-2].mul_(1.01),
    "the kept W_hh·h": lambda saved: saved[3][..., -10:-4].mul_(1.05),
    "the kept gates": lambda saved: saved[3][..., :6].mul_(1.05),
    "c": lambda saved: saved[2].mul_(1.05),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_backward_is_rejected(wrong, monkeypatch):
    forward = op._cpu_forward

    def broken(*arguments, **keywords):
        found, saved = forward(*arguments, **keywords)
        WRONG[wrong](saved)
        return found, saved

    check(Case("lstm", time=4, hidden=6))
    monkeypatch.setattr(op, "_cpu_forward", broken)
    with pytest.raises(AssertionError):
        check(Case("lstm", time=4, hidden=6))


@pytest.mark.parametrize("mode", MODES)
def test_one_unit_and_one_input(mode):
    """Almost nothing comes through the norm of so few values: what is left of the gradients is rounding."""
    case = Case(mode, time=2, batch=2, inputs=1, hidden=1)
    tensors, results = single(case), []
    for backend in ("cpu", "reference"):
        found = call(case, tensors, backend)
        results.append([*found, *torch.autograd.grad(sum(t.square().sum() for t in found), tensors)])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)


def test_errors_stay_small_where_the_mean_is_large():
    """The variance is summed from distances to the mean: a mean of 1000 costs no more than it does PyTorch."""
    case = Case("lstm", time=3, hidden=32, dtype=torch.float32)
    tensors = single(case)
    with torch.no_grad():
        tensors[3].add_(300.0), tensors[0].abs_()
    exact = call(case, [t.detach().double() for t in tensors], "reference")[0]
    found, theirs = (error(call(case, tensors, backend)[0], exact) for backend in ("cpu", "reference"))
    assert found <= 2 * theirs
