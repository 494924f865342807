"""The GPU driver, fused_ops/rnn/layers.py, with plain PyTorch in the place of the kernels."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_ops.core.library import define
from fused_ops.rnn import layers, reference
from fused_ops.rnn.reference import Static, Tensors
from tests.rnn import layer_oracle
from tests.rnn.common import MODES, Case
from tests.rnn.extras import LENGTHS, RESETS, flat_call, packed
from tests.rnn.layer_oracle import Layer, backward, forward
from tests.support import randn, value_and_gradients

_layers: dict[int, Layer] = {}  # by their output's address


def _project(x, weight, bias):
    found = x @ weight.t()
    return found if bias is None else found + bias


def _forward(*arguments):
    *layer, keep = arguments
    found = forward(Layer(*layer))
    found = {name: t.clone() if keep or name not in ("c_all", "kept") else t.new_zeros(0) for name, t in found.items()}
    _layers[found["output"].data_ptr()] = Layer(*layer)
    return tuple(found[name] for name in layer_oracle.FORWARD)


def _backward(grad_output, grad_h_n, grad_c_n, grad_c_all, *rest):
    output = rest[-5]
    with torch.enable_grad():
        found = backward(_layers[output.data_ptr()], (grad_output, grad_h_n, grad_c_n, grad_c_all))
    return tuple(found[name].detach().clone() for name in layer_oracle.BACKWARD)


for _like, _run, _fake in (
    ("rnn_project", _project, layers._project_fake),
    ("rnn_layer_fwd", _forward, layers._layer_fwd_fake),
    ("rnn_layer_bwd", _backward, layers._layer_bwd_fake),
):
    _schema = str(getattr(torch.ops.fused_ops, f"{_like}_triton").default._schema).removeprefix("fused_ops::")
    define(_schema.replace("_triton", "_oracle", 1), _fake, _run, ("CPU",))


def _call(mode, layers_, directions, *, time=4, batch=3, inputs=3, hidden=2, bias=True, all_states=False):
    """(tensors, params, static) of float64 leaves."""
    static = Static(mode, bias, layers_, directions == 2, all_states)
    cells, rows = layers_ * directions, static.gates * hidden
    states = [randn(cells, batch, hidden, dtype=torch.float64, seed=i, requires_grad=True) for i in (1, 2)]
    params = []
    for cell in range(cells):
        width = inputs if cell < directions else hidden * directions
        shapes = [(rows, width), (rows, hidden), *([(rows,), (rows,)] if bias else [])]
        params += [randn(*s, dtype=torch.float64, seed=9 + cell + i, requires_grad=True) for i, s in enumerate(shapes)]
    x = randn(time, batch, inputs, dtype=torch.float64, seed=5, requires_grad=True)
    return Tensors(x, states[0], states[1] if static.is_lstm else None), tuple(params), static


def _check(tensors, params, static):
    head = len(tensors)

    def ours(*inputs):
        return layers.sequence("oracle", Tensors(*inputs[:head]), inputs[head:], static)

    def theirs(*inputs):
        return reference.sequence(*inputs, *static)

    values, grads = value_and_gradients(ours, [*tensors, *params])
    exact, exact_grads = value_and_gradients(theirs, [*tensors, *params])
    for got, wanted in zip((*values, *grads), (*exact, *exact_grads), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


def _variants(tensors: Tensors):
    time, batch = tensors.input.shape[:2]
    lengths = torch.tensor([time, 0, 2][:batch])
    past = torch.arange(time)[:, None] >= lengths
    poisoned = tensors.input.detach().masked_fill(past[..., None], float("nan")).requires_grad_()
    resets = torch.rand(time, batch, generator=torch.Generator().manual_seed(3)) < 0.4
    return {
        "plain": tensors,
        "resets": tensors._replace(resets=resets),
        "lengths": tensors._replace(input=poisoned, lengths=lengths),
        "lengths and resets": tensors._replace(input=poisoned, lengths=lengths, resets=resets),
    }


@pytest.mark.parametrize("variant", ("plain", "resets", "lengths", "lengths and resets"))
@pytest.mark.parametrize("shape", ((1, 1), (2, 2)), ids=("1x1", "2x2"))
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients(mode, shape, variant):
    tensors, params, static = _call(mode, *shape, all_states=variant != "plain")
    _check(_variants(tensors)[variant], params, static)


def _reference(tensors, params, static):
    return reference.sequence(*tensors, *params, *static)


@pytest.mark.parametrize("sequence", (partial(layers.sequence, "oracle"), _reference), ids=("layers", "reference"))
@pytest.mark.parametrize("mode", MODES)
def test_a_state_that_nobody_takes_leaks_into_no_gradient(mode, sequence):
    """Rows that begin with a reset in both directions, and one without steps."""
    tensors, params, static = _call(mode, 1, 2)
    lengths = torch.tensor([4, 0, 2])
    resets = (torch.arange(4)[:, None] == 0) | (torch.arange(4)[:, None] == lengths - 1)

    def run(value):
        states = [t if t is None else torch.full_like(t, value).requires_grad_() for t in tensors[1:3]]
        call = [tensors.input, *states, lengths, resets, *params]
        return value_and_gradients(lambda *call: sequence(Tensors(*call[:5]), call[5:], static), call)

    (output, *_), grads = run(float("nan"))
    (wanted, *_), wanted_grads = run(0.0)
    torch.testing.assert_close((output, grads), (wanted, wanted_grads))


@pytest.mark.parametrize("mode", MODES)
def test_packed(mode):
    tensors, params, static = _call(mode, 2, 2, bias=mode != "gru")
    data = randn(7, 3, dtype=torch.float64, seed=6, requires_grad=True)
    _check(tensors._replace(input=data, batch_sizes=torch.tensor([3, 2, 1, 1])), params, static)


@pytest.mark.parametrize("mode", MODES)
def test_masks_and_zoneout(mode):
    tensors, params, static = _call(mode, 2, 2)
    places, generator = tensors.input.shape[:-1], torch.Generator().manual_seed(1)

    def coin(*shape):
        return torch.rand(shape, generator=generator) < 0.4

    tensors = tensors._replace(
        masks=(~coin(1, *places, 4)).double() / 0.6,
        recurrent_masks=(~coin(4, 3, 2)).double() / 0.6,
        zone_h=coin(4, *places, 2),
        zone_c=coin(4, *places, 2) if static.is_lstm else None,
    )
    _check(tensors, params, static)
    rates = {"zoneout_h": 0.3} | ({"zoneout_c": 0.2} if static.is_lstm else {})
    _check(tensors._replace(zone_h=None, zone_c=None), params, static._replace(**rates))


@pytest.mark.parametrize("how", ("padded", "packed"))
@pytest.mark.parametrize("mode, proj", [*((mode, 0) for mode in MODES), ("lstm", 2)])
def test_layer_norm_and_projection_with_every_extra(mode, proj, how):
    case = Case(mode, hidden=3, layers=2, bidirectional=True, bias=how == "padded", proj=proj)
    for extras in ({"norm"}, {"norm", "masks", "zones"}, {"norm", "masks", "zoneout"}, {"masks", "zoneout"}):
        resets = RESETS if how == "padded" else None
        tensors, params, static = flat_call(case, extras, LENGTHS, resets, all_states=how == "padded")
        tensors = packed(tensors) if how == "packed" else tensors
        leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors[:3]]
        masks = [t if t is None or not t.requires_grad else t.detach() for t in tensors[3:]]
        _check(Tensors(*leaves, *masks), tuple(p.requires_grad_() for p in params), static)


@pytest.mark.parametrize("mode", ("gru", "lstm"))
def test_second_derivatives(mode):
    tensors, params, static = _call(mode, 1, 1, time=2, batch=1)

    def run(x, h0):
        found = layers.sequence("oracle", tensors._replace(input=x, h0=h0), params, static)
        return found[0]

    torch.autograd.gradgradcheck(run, (tensors.input, tensors.h0), atol=1e-4, rtol=1e-4)


def test_only_what_is_asked_for_is_differentiated():
    tensors, params, static = _call("lstm", 2, 1)
    tensors = tensors._replace(input=tensors.input.detach())
    frozen = (params[0].detach(), *params[1:])
    output = layers.sequence("oracle", tensors, frozen, static)[0]
    grads = torch.autograd.grad(output.sum(), [tensors.h0, *frozen[1:]])
    exact = torch.autograd.grad(reference.sequence(*tensors, *frozen, *static)[0].sum(), [tensors.h0, *frozen[1:]])
    for got, wanted in zip(grads, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_one_graph_serves_every_batch_and_time():
    torch._dynamo.reset()

    def run(x, h0, c0, lengths, *params):
        static = Static("lstm", True, 1, True, True)
        return layers.sequence("oracle", Tensors(x, h0, c0, lengths), params, static)

    counter, frames = CompileCounterWithBackend("aot_eager"), []
    traced = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for time, batch in ((7, 11), (8, 5)):
        tensors, params, _ = _call("lstm", 1, 2, time=time, batch=batch)
        call = [t.float().detach().requires_grad_() for t in (*tensors[:3], *params)]
        call.insert(3, torch.arange(batch) % (time + 1))
        values, grads = value_and_gradients(traced, call)
        exact, exact_grads = value_and_gradients(run, call)
        torch.testing.assert_close((values, grads), (exact, exact_grads))
        frames.append(counter.frame_count)
    assert frames[0] == frames[1]


@pytest.mark.parametrize("backend", ("triton", "cuda"))
@pytest.mark.parametrize("packs", (False, True), ids=("padded", "packed"))
@pytest.mark.parametrize("extras", ((), ("norm", "masks", "zoneout")), ids=("plain", "normed"))
@pytest.mark.parametrize("mode", MODES)
def test_shapes_on_a_gpu_that_is_not_there(mode, extras, packs, backend):
    case = Case(mode, layers=2, bidirectional=True, proj=4 if mode == "lstm" and extras else 0)
    tensors, params, static = flat_call(case, extras, LENGTHS, all_states=not packs)
    tensors = packed(tensors) if packs else tensors
    shapes = [t.shape for t in reference.sequence(*tensors, *params, *static)]
    with FakeTensorMode():

        def fake(t):
            dtype = torch.bfloat16 if t.is_floating_point() else t.dtype
            return torch.empty(t.shape, dtype=dtype, device="cuda")

        there = [t if t is None or t is tensors.batch_sizes else fake(t) for t in tensors]
        tensors, params = Tensors(*there), tuple(fake(p) for p in params)
        if packs:
            tensors = tensors._replace(batch_sizes=torch.tensor(tensors.batch_sizes.tolist()))
        found = layers.sequence(backend, tensors, params, static)
        assert [t.shape for t in found] == shapes
        assert all(t.dtype == torch.bfloat16 and t.is_cuda for t in found)
        call = (*tensors, *params, *static)
        found, saved = layers._forward(backend, call, keep=True)
        inputs = call[: -len(static)]
        needs = [i in (0, 1, 2) or i >= len(tensors) for i in range(len(inputs))]
        grads = layers._backward(backend, call, saved, found, tuple(needs))
        for grad, tensor, need in zip(grads, inputs, needs, strict=True):
            if need and tensor is not None:
                assert grad.shape == tensor.shape and grad.dtype == tensor.dtype and grad.is_cuda
