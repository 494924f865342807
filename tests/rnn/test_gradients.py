"""First and second derivatives, in float64 against finite differences, and where PyTorch's own op has none."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fused_ops
from fused_ops.rnn import reference
from fused_ops.rnn.reference import Static, Tensors
from tests.rnn.common import MODES, Case
from tests.support import assert_accurate

TINY = dict(time=3, batch=2, inputs=2, hidden=2)
LENGTHS = torch.tensor([3, 1])
LENGTHS3 = torch.tensor([5, 2, 3])
RESETS = torch.tensor([[False, True], [True, False], [False, False]])


def keywords(what: str) -> dict:
    return {
        "plain": {},
        "lengths": {"lengths": LENGTHS},
        "resets": {"resets": RESETS},
        "everything": {"lengths": LENGTHS, "resets": RESETS, "return_all_states": True},
    }[what]


@pytest.mark.parametrize("what", ("plain", "lengths", "resets", "everything"))
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_and_gradgradcheck(mode, what):
    case = Case(mode, **TINY, bidirectional=True, proj=1 if mode == "lstm" else 0)
    tensors = case.tensors(requires_grad=True)

    def call(*tensors):
        return case.flat(*tensors, **keywords(what))

    assert gradcheck(call, tensors, fast_mode=True)
    assert gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_two_layers_with_dropout_can_be_differentiated_twice(mode):
    case = Case(mode, **TINY, layers=2)
    tensors = case.tensors(requires_grad=True)

    def call(*tensors):
        torch.manual_seed(0)
        states, params = (tensors[1:3], tensors[3:]) if mode == "lstm" else (tensors[1], tensors[2:])
        return getattr(fused_ops, mode)(tensors[0], states, params, True, 2, 0.5, True, False, False)

    assert gradcheck(call, tensors, fast_mode=True)
    assert gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size", ({}, {"layers": 2, "bidirectional": True}, {"bias": False}, {"proj": 3}), ids=str)
def test_the_second_derivative_of_a_onednn_lstm(dtype, size):
    """oneDNN's LSTM serves these dtypes on the CPU; in half types its own second derivative raises."""
    case = Case("lstm", inputs=8, hidden=16, **size)
    tensors = [t.to(dtype) for t in case.tensors()]
    exact = gradient_penalty(case, [t.double() for t in tensors])
    for value, wanted in zip(gradient_penalty(case.to(dtype), tensors), exact, strict=True):
        assert value.abs().max() > 0
        assert_accurate(value, wanted, terms=24, ulps=8)


def gradient_penalty(case: Case, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    tensors = [t.detach().requires_grad_() for t in tensors]
    output = case.flat(*tensors)[0]
    (first,) = torch.autograd.grad(output.sum(), tensors[0], create_graph=True)
    return list(torch.autograd.grad(first.square().sum(), tensors[:5]))


@pytest.mark.parametrize("mode", MODES)
def test_every_subset_of_gradients(mode):
    case = Case(mode)
    everything = case.tensors(requires_grad=True)
    wanted = torch.autograd.grad(sum(t.sum() for t in case.flat(*everything)), everything)
    for only in range(len(everything)):
        tensors = [t.detach().requires_grad_(i == only) for i, t in enumerate(everything)]
        (grad,) = torch.autograd.grad(sum(t.sum() for t in case.flat(*tensors)), [tensors[only]])
        torch.testing.assert_close(grad, wanted[only])
    for only in range(len(case.flat(*everything))):
        grads = torch.autograd.grad(case.flat(*everything)[only].sum(), everything, materialize_grads=True)
        assert grads[0].abs().max() > 0


@pytest.mark.parametrize("mode", MODES)
def test_backward_in_eval_mode_and_twice_over_one_graph(mode):
    case = Case(mode, dtype=torch.float32)
    tensors = case.tensors(requires_grad=True)
    total = sum(t.sum() for t in case.flat(*tensors))
    first = torch.autograd.grad(total, tensors, retain_graph=True)
    again = torch.autograd.grad(total, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_sizes", ([2, 2, 1], [2]), ids=str)
def test_packed_maths_agree_with_torchs_packed_op(mode, batch_sizes):
    """`maths` gives the second derivative of packed sequences; here its values."""
    case = Case(mode, **TINY, layers=2, bidirectional=True)
    tensors, sizes = case.tensors(), torch.tensor(batch_sizes)
    data = torch.randn(sum(batch_sizes), case.inputs, dtype=case.dtype)
    states = 2 if mode == "lstm" else 1
    h0, c0 = (tensors[1], tensors[2]) if states == 2 else (tensors[1], None)
    masks = torch.rand(1, len(data), 2 * case.hidden, dtype=case.dtype)
    held = Tensors(data, h0, c0, batch_sizes=sizes, masks=masks)
    call = (*held, *tensors[1 + states :], *Static(mode, True, 2, True))
    for value, wanted in zip(reference.maths(*call), reference.sequence(*call), strict=True):
        assert_accurate(value, wanted, terms=16)


@pytest.mark.parametrize("mode", MODES)
def test_forward_mode_and_vmap_run_on_the_reference(mode):
    case = Case(mode)
    tensors = case.tensors()
    tangent = torch.randn_like(tensors[0])
    _, found = torch.func.jvp(lambda x: case.flat(x, *tensors[1:], lengths=LENGTHS3)[0], (tensors[0],), (tangent,))
    step = 1e-6
    ahead, behind = (case.flat(tensors[0] + s * tangent, *tensors[1:], lengths=LENGTHS3)[0] for s in (step, -step))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), atol=1e-7, rtol=1e-6)
    stacked = torch.randn(4, *tensors[0].shape, dtype=case.dtype)
    batched = torch.func.vmap(lambda x: case.flat(x, *tensors[1:], resets=torch.zeros(5, 3, dtype=torch.bool))[0])
    torch.testing.assert_close(batched(stacked), torch.stack([case.flat(x, *tensors[1:])[0] for x in stacked]))
