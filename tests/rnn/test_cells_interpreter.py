"""The Triton cells on the CPU, under TRITON_INTERPRET=1."""

import pytest
import torch

import fused_ops
from fused_ops.core.device import TRITON_INTERPRETED
from tests.rnn.test_cells import CELLS, SIZES, call, check_kernel, inputs
from tests.support import noncontiguous, randn

pytestmark = pytest.mark.skipif(not TRITON_INTERPRETED, reason="needs TRITON_INTERPRET=1")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients(cell, sizes, dtype):
    check_kernel(cell, "triton", sizes, dtype, "cpu")


@pytest.mark.parametrize("cell", CELLS)
def test_a_second_derivative(cell):
    tensors = [t.float().requires_grad_() for t in inputs(cell, 3, 4, 5)]
    for backend in ("triton", "reference"):
        output = call(cell, *tensors, backend=backend)
        output = output[0] if cell == "lstm_cell" else output
        (first,) = torch.autograd.grad(output.sum(), tensors[0], create_graph=True)
        second = torch.autograd.grad(first.square().sum(), tensors[0], materialize_grads=True)[0]
        if backend == "triton":
            found = second
    torch.testing.assert_close(found, second)


def test_views_nan_and_saturation():
    gi, gh, h = randn(4, 99) * 60, randn(4, 99, seed=1), randn(4, 33)
    op = torch.ops.fused_ops.gru_cell_fwd_triton
    wanted = op(gi, gh, h)
    assert wanted.isfinite().all()
    assert torch.equal(op(noncontiguous(gi), gh.T.contiguous().T, noncontiguous(h)), wanted)
    gi[2, 5] = float("nan")
    found = op(gi, gh, h)
    assert found[2, 5].isnan() and found.isnan().sum() == 1
    relu = torch.ops.fused_ops.rnn_cell_fwd_triton(gi, gh, True)
    assert relu.isnan().sum() == 1 and relu.nan_to_num().min() == 0


def test_tanh_keeps_small_values():
    values = torch.cat([torch.logspace(-30, 1.5, 500), -torch.logspace(-30, 1.5, 500)])[None]
    found = torch.ops.fused_ops.rnn_cell_fwd_triton(values, torch.zeros_like(values), False)
    torch.testing.assert_close(found, values.tanh(), rtol=4e-7, atol=0)


def test_exchanged_gates_are_rejected():
    tensors = [t.float() for t in inputs("gru_cell", 3, 4, 5)]
    wrong = [*tensors[:2], *(t.unflatten(0, (3, 5))[[1, 0, 2]].flatten(0, 1) for t in tensors[2:])]
    assert not torch.allclose(fused_ops.gru_cell(*wrong, backend="triton"), fused_ops.gru_cell(*tensors), atol=1e-4)


def test_compile_with_gradients():
    torch._dynamo.reset()
    tensors = [t.float().requires_grad_() for t in inputs("lstm_cell", 3, 4, 5)]
    compiled = torch.compile(lambda *t: call("lstm_cell", *t, backend="triton"), fullgraph=True, backend="aot_eager")
    found, wanted = compiled(*tensors), call("lstm_cell", *tensors, backend="reference")
    torch.testing.assert_close(found, wanted)
    ours = torch.autograd.grad(found[0].sum(), tensors, materialize_grads=True)
    torch.testing.assert_close(ours, torch.autograd.grad(wanted[0].sum(), tensors, materialize_grads=True))
