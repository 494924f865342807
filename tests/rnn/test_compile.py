"""torch.compile without graph breaks, with gradients, dynamic batch and time; opcheck on every op."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import fused_ops
from fused_ops.core.device import TRITON_INTERPRETED
from fused_ops.rnn import op, reference
from fused_ops.rnn.reference import Static, Tensors
from tests.rnn.common import MODES, Case
from tests.support import randn

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    """Traced without breaks for every shape at once, forward and backward."""
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


@pytest.mark.parametrize(
    ("mode", "what"),
    (("rnn_relu", "plain"), ("gru", "lengths"), ("gru", "dropout"), ("lstm", "plain"), ("lstm", "resets")),
)
def test_one_graph_serves_every_batch_and_time(mode, what):
    layers, states = 2, 2 if mode == "lstm" else 1
    case = Case(mode, layers=layers, bidirectional=True, dtype=torch.float32)
    params = case.tensors(requires_grad=True)[1 + states :]

    def call(x, lengths, resets, *rest):
        hx = rest[:2] if states == 2 else rest[0]
        dropout = 0.5 if what == "dropout" else 0.0
        return getattr(fused_ops, mode)(
            x, hx, rest[states:], True, layers, dropout, True, True, False, lengths=lengths, resets=resets
        )

    counter = CompileCounterWithBackend("aot_eager")
    traced = compiled(call, counter)
    for time, batch in ((5, 3), (7, 4), (2, 6)):
        sized = Case(mode, time, batch, layers=layers, bidirectional=True, dtype=torch.float32)
        tensors = [t.requires_grad_() for t in (sized.tensors()[: 1 + states])]
        lengths = torch.arange(batch) % (time + 1) if what == "lengths" else None
        resets = (torch.arange(time * batch).reshape(time, batch) % 3 == 0) if what == "resets" else None
        arguments = (tensors[0], lengths, resets, *tensors[1:], *params)
        wanted, found = call(*arguments), traced(*arguments)
        if what == "dropout":  # other random numbers: only that the backward meets the forward's
            (x_grad,) = torch.autograd.grad(found[0].sum(), tensors[0])
            assert x_grad.abs().max() > 0 and x_grad.shape == tensors[0].shape
            continue
        torch.testing.assert_close(found, wanted)
        leaves = [*tensors, *params]
        ours = torch.autograd.grad(sum(t.sum() for t in found), leaves)
        torch.testing.assert_close(ours, torch.autograd.grad(sum(t.sum() for t in wanted), leaves))
    assert counter.frame_count == 1


def test_the_dropout_of_a_compiled_backward_is_its_forwards():
    """With relu and positive weights each path is open or dropped, so the gradient is the output's own slope."""
    weights = [torch.full((1, 1), 1.0), torch.zeros(1, 1), torch.full((1, 1), 1.0), torch.zeros(1, 1)]

    def call(x):
        return fused_ops.rnn_relu(x, torch.zeros(2, 64, 1), weights, False, 2, 0.5, True, False, False)[0]

    x = torch.rand(4, 64, 1).add(0.5).requires_grad_()
    output = compiled(call)(x)
    (grad,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(grad, (output / x).detach())
    assert 0.2 < (output == 0).float().mean() < 0.8


@pytest.mark.parametrize(("kind", "swapped"), (("RNN", True), ("GRU", False), ("LSTM", True)))
def test_modules_compile_also_after_a_class_swap(kind, swapped):
    fused = getattr(fused_ops.nn, kind)
    module = (getattr(nn, kind) if swapped else fused)(4, 6, 2, batch_first=True, bidirectional=True)
    module.__class__ = fused
    call = compiled(module)
    for time, batch in ((5, 3), (3, 4)):
        x = randn(batch, time, 4, requires_grad=True)
        lengths = torch.arange(batch) % time + 1
        for keywords in ({}, {"lengths": lengths}):
            wanted, found = module(x, **keywords), call(x, **keywords)
            torch.testing.assert_close(found, wanted)
            leaves = [x, *module.parameters()]
            ours = torch.autograd.grad(found[0].sum(), leaves)
            torch.testing.assert_close(ours, torch.autograd.grad(wanted[0].sum(), leaves))
        with torch.no_grad():
            torch.testing.assert_close(call(x), module(x))


@pytest.mark.parametrize("kind", ("RNNCell", "GRUCell", "LSTMCell"))
def test_cells_compile_also_after_a_class_swap(kind):
    cell = getattr(nn, kind)(4, 6)
    cell.__class__ = getattr(fused_ops.nn, kind)
    call = compiled(cell)
    for batch in (3, 5):
        x = randn(batch, 4, requires_grad=True)
        wanted, found = cell(x), call(x)
        torch.testing.assert_close(found, wanted)
        first = (lambda out: out[0]) if kind == "LSTMCell" else (lambda out: out)
        ours = torch.autograd.grad(first(found).sum(), [x, *cell.parameters()])
        torch.testing.assert_close(ours, torch.autograd.grad(first(wanted).sum(), [x, *cell.parameters()]))
        with torch.no_grad():
            torch.testing.assert_close(call(x), cell(x))


def test_opcheck_of_the_reference_ops():
    case = Case("lstm", time=3, layers=2, bidirectional=True, dtype=torch.float32)
    tensors = case.tensors()
    states, params = tensors[1:3], tensors[3:]
    lengths, resets = torch.tensor([3, 0, 2]), torch.arange(9).reshape(3, 3) % 4 == 0
    packed = Tensors(torch.randn(6, 4), *states, batch_sizes=torch.tensor([3, 2, 1]))
    for call, all_states in ((Tensors(tensors[0], *states, lengths, resets), True), (packed, False)):
        inputs, static = [*call, *params], tuple(Static("lstm", True, 2, True, all_states))
        opcheck(torch.ops.fused_ops.rnn_fwd_reference.default, (inputs, *static), test_utils=OPCHECKS)
        needs = [t is not None and t.is_floating_point() for t in inputs]
        grads = [torch.randn_like(t) for t in torch.ops.fused_ops.rnn_fwd_reference(inputs, *static)]
        opcheck(op.rnn_bwd_reference, (grads, inputs, needs, *static), test_utils=OPCHECKS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ("packed", "lengths", "everything"))
def test_opcheck_of_the_cpu_ops(mode, what):
    case = Case(mode, layers=2, bidirectional=True, dtype=torch.float32)
    x, *tensors = case.tensors()
    h0, c0 = tensors[:2] if mode == "lstm" else (tensors[0], None)
    params = tensors[2 if mode == "lstm" else 1 :]
    lengths, resets, sizes, masks = torch.tensor([5, 0, 2]), None, None, None
    if what == "packed":
        x, lengths, sizes = torch.randn(6, 4), None, torch.tensor([3, 2, 1])
    elif what == "everything":
        resets, masks = torch.arange(15).reshape(5, 3) % 4 == 0, torch.rand(1, 5, 3, 12)
    call = (*Tensors(x, h0, c0, lengths, resets, sizes, masks), params)
    static = (mode, True, True, 0.0, 0.0, False)
    for keep_states, keep_gates in ((False, False), (True, False), (True, True)):
        arguments = (*call, *static, keep_states, keep_gates)
        opcheck(torch.ops.fused_ops.rnn_fwd_cpu.default, arguments, test_utils=OPCHECKS)
    output, h_n, c_n, *saved = torch.ops.fused_ops.rnn_fwd_cpu(*arguments)
    states = (torch.randn_like(h_n), torch.randn_like(c_n) if mode == "lstm" else None)
    every = [torch.randn(4, *x.shape[:-1], 6) if wanted else None for wanted in (True, mode == "lstm")]
    for grads, needs in (
        ((torch.randn_like(output), *states, *every), (True, True)),
        ((None, *states, None, None), (False, False)),
    ):
        arguments = (*grads, *call, output, *saved, *static, *needs)
        opcheck(torch.ops.fused_ops.rnn_bwd_cpu.default, arguments, test_utils=OPCHECKS)


def test_opcheck_of_the_cell_ops():
    gates, state = (randn(3, 21), randn(3, 21, seed=1)), randn(3, 7)
    opcheck(
        torch.ops.fused_ops.gru_gates_bwd_reference.default, ([state], [*gates, state], [True] * 3), test_utils=OPCHECKS
    )
    opcheck(
        torch.ops.fused_ops.rnn_gates_bwd_reference.default,
        ([gates[0]], [*gates], [True] * 2, True),
        test_utils=OPCHECKS,
    )
    gates = randn(3, 28), randn(3, 28, seed=1)
    opcheck(
        torch.ops.fused_ops.lstm_gates_bwd_reference.default,
        ([state, None], [*gates, state], [True, False, True]),
        test_utils=OPCHECKS,
    )


def test_a_reference_op_checks_its_lengths_under_compile():
    case = Case(dtype=torch.float32)
    tensors = case.tensors()
    call = compiled(lambda lengths: case.flat(*tensors, lengths=lengths, backend="reference"))
    with pytest.raises(ValueError, match="lengths must be between 0 and input's 5 steps"):
        call(torch.tensor([1, 2, 6]))


def test_the_fakes_of_the_gpu_cells():
    """Shapes, dtypes and devices of the CUDA and Triton ops, on tensors that only pretend to be on a GPU."""
    with torch._subclasses.FakeTensorMode():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            gates, state = torch.empty(3, 21, dtype=dtype, device="cuda"), torch.empty(3, 7, dtype=dtype, device="cuda")
            lstm = torch.empty(3, 28, dtype=dtype, device="cuda")
            for backend in ("cuda",) if TRITON_INTERPRETED else ("cuda", "triton"):
                ops = [getattr(torch.ops.fused_ops, f"{kind}_cell_fwd_{backend}") for kind in ("rnn", "gru", "lstm")]
                for found in (ops[0](state, state, False), ops[1](gates, gates, state), *ops[2](lstm, lstm, state)):
                    assert found.shape == state.shape and found.dtype == dtype and found.device.type == "cuda"


def test_eager_maths_of_the_gates_keep_the_dtype():
    for gates in (op._gru_maths, op._lstm_maths):
        width = 3 if gates is op._gru_maths else 4
        found = gates(
            randn(2, 5 * width, dtype=torch.bfloat16),
            randn(2, 5 * width, dtype=torch.bfloat16),
            randn(2, 5, dtype=torch.bfloat16),
        )
        assert all(t.dtype == torch.bfloat16 and t.shape == (2, 5) for t in found)
    assert reference.rnn_gates(torch.tensor(-1.0), torch.tensor(0.5), True) == 0


@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_an_exported_module_takes_every_batch_and_time(kind):
    module = getattr(fused_ops.nn, kind)(4, 6, 2, bidirectional=True, batch_first=True).eval()

    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = module

        def forward(self, x):
            return self.rnn(x)[0]

    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("time", min=2, max=512)}
    exported = torch.export.export(Output(), (torch.randn(3, 7, 4),), dynamic_shapes={"x": sizes}).module()
    for batch, time in ((5, 11), (2, 30)):
        x = torch.randn(batch, time, 4)
        torch.testing.assert_close(exported(x), module(x)[0])
