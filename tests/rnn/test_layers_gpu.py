"""The layers' kernels on a GPU, against plain PyTorch in float64."""

import pytest
import torch

from tests.rnn import layer_oracle
from tests.rnn.layer_oracle import layer_case, of_row, random_grads, row
from tests.support import assert_accurate

pytestmark = pytest.mark.gpu
BACKENDS = (
    pytest.param("cuda", marks=pytest.mark.kernel("rnn.layers.cuda")),
    pytest.param("triton", marks=pytest.mark.kernel("rnn.layers.triton")),
)

MODES = ("rnn_tanh", "rnn_relu", "gru", "lstm")
CASES = {
    "plain": {"time": 7, "batch": 33},
    "lengths and resets": {"time": 5, "batch": 4, "lengths": [3, 0, 5, 1], "resets": True, "directions": 2},
    "packed": {"time": 5, "lengths": [5, 4, 2], "packed": True, "directions": 2},
}
EXTRAS = {
    "packed and masked": {"time": 5, "lengths": [5, 4, 2], "packed": True, "directions": 2, "mask": True},
    "zoneout": {"time": 4, "batch": 17, "zoneout": "masks", "resets": True},
    "expected zoneout": {"time": 4, "zoneout": 0.3},
    "normed": {"time": 5, "batch": 4, "lengths": [3, 0, 5, 1], "resets": True, "directions": 2, "norm": True},
    "normed and zoned": {"time": 4, "batch": 17, "norm": True, "bias": False, "zoneout": "masks", "mask": True},
}
PROJECTED = {
    "projected": {"time": 5, "lengths": [5, 4, 2], "packed": True, "directions": 2},
    "projected and normed": {"time": 4, "batch": 17, "norm": True, "zoneout": 0.2, "mask": True, "resets": True},
}


def run(backend, layer, grads):
    forward, backward = (getattr(torch.ops.fused_ops, f"rnn_layer_{name}_{backend}") for name in ("fwd", "bwd"))
    found = dict(zip(layer_oracle.FORWARD, forward(*layer.fwd_arguments()), strict=True))
    hats = [None] * 4
    if layer.norm_hh is not None:
        device = layer.gi.device
        here = layer.to(layer.w_hh.dtype)
        hats = [h if h is None else h.to(device) for h in layer_oracle.hats(layer_oracle.forward(here), here)]
    arguments = layer.bwd_arguments(grads, found["output"], found["c_all"], found["kept"], hats)
    return found | dict(zip(layer_oracle.BACKWARD, backward(*arguments), strict=True))


def truth(layer, grads):
    with torch.enable_grad():
        found = layer_oracle.forward(layer) | layer_oracle.backward(layer, grads)
    return {name: found[name].detach() for name in (*layer_oracle.FORWARD, *layer_oracle.BACKWARD)}


def check(backend, mode, hidden, case, dtype, states=None):
    layer = layer_case(mode, hidden=hidden, dtype=dtype, states=states, **(CASES | EXTRAS | PROJECTED)[case])
    grads, places = random_grads(layer), layer.places()
    found = run(backend, layer.to(dtype, "cuda"), [g if g is None else g.cuda() for g in grads])
    exact = truth(layer.to(torch.float64), [g if g is None else g.double() for g in grads])
    own = truth(layer, grads)
    for name, value in found.items():
        value, wanted, peer = value.cpu(), exact[name], own[name].to(value.dtype)
        if name in ("c_all", "kept") and value.numel():
            value, wanted, peer = (t[:, places] for t in (value, wanted, peer))
        factor = 3.0 if name in layer_oracle.BACKWARD else 2.0
        ulps = 2.0**14 if backend == "cuda" and dtype == torch.float32 else 4.0  # it multiplies in TF32
        assert_accurate(value, wanted, peer, factor=factor, terms=hidden, ulps=ulps)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("hidden", (5, 64, 127, 128, 256, 700))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_and_dtypes(backend, mode, hidden, dtype):
    check(backend, mode, hidden, "lengths and resets", dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("hidden", (48, 320))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_case(backend, mode, hidden, case):
    check(backend, mode, hidden, case, torch.bfloat16)


@pytest.mark.parametrize("case", EXTRAS)
@pytest.mark.parametrize("hidden", (48, 320))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_extra(backend, mode, hidden, case):
    check(backend, mode, hidden, case, torch.bfloat16)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", PROJECTED)
@pytest.mark.parametrize("hidden, states", ((23, 7), (64, 32), (320, 160), (1100, 33)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_projected_states(backend, hidden, states, case, dtype):
    check(backend, "lstm", hidden, case, dtype, states)


@pytest.mark.parametrize("hidden", (23, 64, 1100))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_in_float32(backend, mode, hidden):
    check(backend, mode, hidden, "normed", torch.float32)


@pytest.mark.parametrize("hidden", (128, 320, 700))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_alone_is_what_it_is_in_a_batch(backend, mode, hidden):
    """And runs repeat bitwise."""
    layer = layer_case(mode, time=6, batch=40, hidden=hidden, dtype=torch.bfloat16).to(torch.bfloat16, "cuda")
    grads = random_grads(layer)
    whole, again = run(backend, layer, grads), run(backend, layer, grads)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    mine = [of_row(layer, name, grad, 37) for name, grad in zip(layer_oracle.FORWARD, grads)]
    for name, value in run(backend, row(layer, 37), mine).items():
        assert torch.equal(value, of_row(layer, name, whole[name], 37)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cuda_graph_captures_every_step(backend):
    layer = layer_case("lstm", time=4, batch=8, hidden=320, dtype=torch.float16).to(torch.float16, "cuda")
    grads = random_grads(layer)
    wanted = run(backend, layer, grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(backend, layer, grads)
    graph.replay()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_projection(backend, dtype):
    x, w, bias = (torch.randn(shape, device="cuda") for shape in ((1000, 130), (333, 130), (333,)))
    x, w = x.to(dtype), w.to(dtype)
    project = getattr(torch.ops.fused_ops, f"rnn_project_{backend}")
    found = project(x, w, bias)
    ulps = 2.0**14 if backend == "cuda" and dtype == torch.float32 else 4.0
    assert_accurate(found, x.double() @ w.double().t() + bias, terms=130, ulps=ulps)
    assert torch.equal(project(x[999:], w, bias), found[999:])
