"""The four cells against torch's, and their errors."""

import pytest
import torch

import fused_ops
from fused_ops.core import extension
from fused_ops.rnn import op, reference
from tests.support import assert_accurate, leaves, noncontiguous, randn, value_and_gradients

CELLS = {"rnn_tanh_cell": 1, "rnn_relu_cell": 1, "gru_cell": 3, "lstm_cell": 4}


def inputs(cell: str, batch: int, features: int, hidden: int, bias: bool = True, dtype=torch.float64) -> list:
    """input, the states, the weights and biases: the flat arguments of `call`."""
    gates = CELLS[cell]
    states = [randn(batch, hidden, seed=1 + i) for i in range(2 if cell == "lstm_cell" else 1)]
    weights = [randn(gates * hidden, features, seed=3) * 0.7, randn(gates * hidden, hidden, seed=4) * 0.7]
    biases = [randn(gates * hidden, seed=5), randn(gates * hidden, seed=6)] if bias else []
    return [t.to(dtype) for t in (randn(batch, features), *states, *weights, *biases)]


def call(cell: str, *tensors, function=None, **keywords):
    function = function or getattr(fused_ops, cell)
    if cell == "lstm_cell":
        return function(tensors[0], tensors[1:3], *tensors[3:], **keywords)
    return function(*tensors, **keywords)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("sizes", ((3, 4, 5), (1, 1, 1), (0, 4, 5)), ids=str)
def test_values_and_gradients_are_torchs(cell, bias, sizes):
    tensors = [t.requires_grad_() for t in inputs(cell, *sizes, bias)]
    wanted = value_and_gradients(lambda *t: call(cell, *t, function=getattr(torch, cell)), tensors)
    found = value_and_gradients(lambda *t: call(cell, *t), tensors)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        value_and_gradients(lambda *t: call(cell, *map(noncontiguous, t)), tensors)[0], wanted[0]
    )


@pytest.mark.parametrize("cell", CELLS)
def test_without_a_batch(cell):
    tensors = inputs(cell, 1, 4, 5)
    states = 3 if cell == "lstm_cell" else 2
    alone = call(cell, *(t[0] for t in tensors[:states]), *tensors[states:])
    batched = call(cell, *tensors)
    if cell == "lstm_cell":
        assert all(torch.equal(a, b[0]) for a, b in zip(alone, batched, strict=True))
    else:
        assert torch.equal(alone, batched[0])


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_and_gradgradcheck(cell):
    tensors = [t.requires_grad_() for t in inputs(cell, 2, 2, 2)]
    assert torch.autograd.gradcheck(lambda *t: call(cell, *t), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: call(cell, *t), tensors)


@pytest.mark.parametrize("cell", CELLS)
def test_gates_are_the_pointwise_half_of_the_cell(cell):
    """The maths behind the GPU kernels' gradients, put together with the two projections."""
    tensors = inputs(cell, 3, 4, 5)
    states = 3 if cell == "lstm_cell" else 2
    w_ih, w_hh, b_ih, b_hh = tensors[states:]
    gi, gh = tensors[0] @ w_ih.T + b_ih, tensors[1] @ w_hh.T + b_hh
    gates = {
        "rnn_tanh_cell": lambda: reference.rnn_gates(gi, gh, False),
        "rnn_relu_cell": lambda: reference.rnn_gates(gi, gh, True),
        "gru_cell": lambda: reference.gru_gates(gi, gh, tensors[1]),
        "lstm_cell": lambda: reference.lstm_gates(gi, gh, tensors[2]),
    }[cell]
    torch.testing.assert_close(gates(), call(cell, *tensors))


def test_bad_arguments_are_named():
    x, h, w_ih, w_hh, b_ih, b_hh = inputs("gru_cell", 3, 4, 5)
    for arguments, message in (
        ((x[None], h, w_ih, w_hh), "input must be 1D or 2D, got 3D"),
        ((x[:, :2], h, w_ih, w_hh), "input must be of 4 features like w_ih"),
        ((x, h[:2], w_ih, w_hh), r"hx must be of shape \(3, 5\) \(batch, hidden\), got \(2, 5\)"),
        ((x, h[:, :4], w_ih, w_hh), r"hx must be of shape \(3, 5\)"),
        ((x, h, w_ih[:14], w_hh), r"w_ih must be of shape \(15, 4\)"),
        ((x, h, w_ih, w_hh[:14]), r"w_hh must be of shape \(15, 5\)"),
        ((x, h, w_ih, w_hh, b_ih[:3], b_hh), r"b_ih must be of shape \(15,\)"),
        ((x, h, w_ih, w_hh, b_ih), "b_hh must be given exactly when b_ih is"),
        ((x, h.float(), w_ih, w_hh), "hx must be of input's dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_ops.gru_cell(*arguments)
    with pytest.raises(TypeError, match="w_ih must be a Tensor, got NoneType"):
        fused_ops.gru_cell(x, h, None, w_hh)
    with pytest.raises(ValueError, match="hx must be a pair"):
        fused_ops.lstm_cell(x, h, w_ih, w_hh)


@pytest.mark.skipif(not (extension.host and extension.host.nvcc_version), reason="built without nvcc")
def test_the_cuda_cells_are_registered():
    for kind in ("rnn", "gru", "lstm"):
        assert extension.has_kernel(f"{kind}_cell_fwd_cuda", "CUDA")


def test_the_cuda_cells_refuse_the_cpu():
    tensors = inputs("gru_cell", 3, 4, 5, dtype=torch.float32)
    with pytest.raises(fused_ops.BackendUnavailable, match="needs a tensor on a GPU"):
        fused_ops.gru_cell(*tensors, backend="cuda")
    with pytest.raises(fused_ops.BackendUnavailable, match="takes float32"):
        call("rnn_tanh_cell", *inputs("rnn_tanh_cell", 3, 4, 5), backend="cpu")


SIZES = ((3, 4, 5), (1, 1, 1), (7, 16, 64), (5, 9, 129), (2, 8, 1030), (0, 4, 5), (300, 64, 256))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_kernel(cell: str, backend: str, sizes: tuple, dtype: torch.dtype, device: str) -> None:
    """Values against the oracle and torch's own cell in the same dtype, gradients likewise."""
    low = [t.to(device=device, dtype=dtype).requires_grad_() for t in inputs(cell, *sizes)]
    exact = value_and_gradients(lambda *t: call(cell, *t), leaves(*low, dtype=torch.float64, device="cpu"))
    theirs = value_and_gradients(lambda *t: call(cell, *t, function=getattr(torch, cell)), low)
    found = value_and_gradients(lambda *t: call(cell, *t, backend=backend), low)
    for part, factor in ((0, 2.0), (1, 3.0)):
        for value, wanted, torch_value in zip(found[part], exact[part], theirs[part], strict=True):
            assert value.dtype == dtype
            assert_accurate(value, wanted, torch_value, factor=factor, terms=sizes[1] + sizes[2])


def check_views_and_nan(backend: str, device: str) -> None:
    """The kernels take any strides, and one NaN makes one NaN."""
    for kind, gates in (("rnn", 1), ("gru", 3), ("lstm", 4)):
        function = getattr(torch.ops.fused_ops, f"{kind}_cell_fwd_{backend}")
        gi, gh = (randn(4, gates * 33, seed=i, device=device) for i in range(2))
        state = randn(4, 33, device=device)
        last = (True,) if kind == "rnn" else (state,)
        gi[2, 5] = float("nan")
        wanted = function(gi, gh, *last)
        views = (noncontiguous(gi), gh.T.contiguous().T, *((noncontiguous(state),) if kind != "rnn" else last))
        for found, value in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (function(*views), wanted))):
            assert torch.equal(found.nan_to_num(9.0), value.nan_to_num(9.0)) and value[2, 5].isnan()
            assert value.isnan().sum() == 1


def test_every_cell_has_both_gpu_backends():
    assert set(op.CELLS) == {"cuda", "triton"}
    for cell in CELLS:
        rows = fused_ops.explain(call, cell, *inputs(cell, 2, 3, 4)).rows
        assert [row[0] for row in rows] == ["cuda", "triton", "cpu", "reference"]
