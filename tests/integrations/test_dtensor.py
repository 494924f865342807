"""Ops and modules on DTensors in two gloo processes: values and gradients of the unsharded ones.

The processes start once and run every case; each test reports one.
"""

import subprocess
import sys
import traceback
from datetime import timedelta

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fused_ops
from fused_ops.core import dispatch
from fused_ops.core.errors import ArgumentError
from fused_ops.integrations import dtensor  # noqa: F401 - it registers the rules
from tests.support import randn

WORLD = 2
CASES = {}
WHOLE = Replicate()


def case(function):
    CASES[function.__name__] = function
    return function


def tensors(value) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in tensors(part)]


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def backward(results: list[Tensor]) -> None:
    """From fixed random gradients, placed like the results."""
    heads = [(result, randn(*result.shape, seed=7 + i)) for i, result in enumerate(results) if result.requires_grad]
    grads = [distribute_tensor(g, r.device_mesh, r.placements) if isinstance(r, DTensor) else g for r, g in heads]
    torch.autograd.backward([result for result, _ in heads], grads)


def check(mesh, call, inputs: list[Tensor], placements: list, results: list, backends: set | None = None) -> None:
    """`call` of the inputs distributed by `placements` (None: left plain) gives the results and the gradients of the
    plain call. The results lie as `results` says, gradients as their inputs, and the ranks' parts ran on `backends`."""
    plain = [t.detach().clone() for t in inputs]
    placed = [t.clone() if where is None else distribute_tensor(t, mesh, where) for t, where in zip(plain, placements)]
    for tensor in (*plain, *placed):
        tensor.requires_grad_(tensor.is_floating_point())
    wanted = tensors(call(*plain))
    with dispatch.record() as choices:
        found = tensors(call(*placed))
    backward(wanted)
    backward(found)
    for want, got, where in zip(wanted, found, results, strict=True):
        torch.testing.assert_close(got.full_tensor(), want)
        assert list(got.placements) == where
    for want, got in zip(plain, placed):
        if want.requires_grad:
            torch.testing.assert_close(whole(got.grad), want.grad, rtol=1e-4, atol=1e-5)
            assert not isinstance(got, DTensor) or got.grad.placements == got.placements
    assert backends is None or {choice.backend for choice in choices} == backends


class Attention(nn.Module):
    """Grouped, causal, with a window, a softcap and sinks, as a model writes it."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, dim: int = 8):
        super().__init__()
        self.dim = dim
        self.q, self.k, self.v = (nn.Linear(16, n * dim) for n in (heads, kv_heads, kv_heads))
        self.o = nn.Linear(heads * dim, 16)
        self.sinks = nn.Parameter(randn(heads))

    def forward(self, x, sinks: bool = True):
        q, k, v = (project(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for project in (self.q, self.k, self.v))
        score = {"window": (3, 0), "softcap": 2.0, "sinks": self.sinks if sinks else None}
        out = fused_ops.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, **score)
        return self.o(out.transpose(1, 2).flatten(2))


def tensor_parallel(mesh, local: bool, sinks=None) -> None:
    torch.manual_seed(0)
    plain, parallel, x = Attention(), Attention(), randn(2, 6, 16)
    parallel.load_state_dict(plain.state_dict())
    columns = ColwiseParallel(use_local_output=local)
    parallelize_module(parallel, mesh, {"q": columns, "k": columns, "v": columns, "o": RowwiseParallel()})
    if sinks is not None:
        parallel.sinks = nn.Parameter(distribute_tensor(parallel.sinks.detach(), mesh, [sinks]))
    want, got = (model(x, sinks=not local) for model in (plain, parallel))
    torch.testing.assert_close(got, want)
    for out in (want, got):
        out.square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), parallel.parameters()):
        if p.grad is not None:
            torch.testing.assert_close(whole(q.grad), p.grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: n + text)


@case
def tensor_parallel_attention_on_dtensors(mesh):
    tensor_parallel(mesh, local=False, sinks=Shard(0))


@case
def tensor_parallel_attention_with_replicated_sinks(mesh):
    tensor_parallel(mesh, local=False, sinks=WHOLE)


@case
def tensor_parallel_attention_with_plain_sinks(mesh):
    tensor_parallel(mesh, local=False)


@case
def tensor_parallel_attention_on_local_tensors(mesh):
    tensor_parallel(mesh, local=True)


def attention(q, k, v, *rest):
    return fused_ops.scaled_dot_product_attention(q, k, v, *rest, enable_gqa=True, return_lse=True)


QKV = [randn(4, 4, 5, 8), randn(4, 2, 6, 8, seed=1), randn(4, 2, 6, 8, seed=2)]


@case
def attention_sharded_by_batch_with_a_plain_bias(mesh):
    check(mesh, attention, [*QKV, randn(4, 1, 5, 6)], [[Shard(0)]] * 3 + [None], [[Shard(0)]] * 2)


@case
def attention_sharded_by_heads_with_a_bias_of_each(mesh):
    check(mesh, attention, [*QKV, randn(4, 5, 6)], [[Shard(1)]] * 3 + [[Shard(0)]], [[Shard(1)]] * 2)


@case
def attention_sharded_by_heads_over_one_key_head(mesh):
    one = [QKV[0], *(t[:, :1] for t in QKV[1:])]
    check(mesh, attention, one, [[Shard(1)], [WHOLE], [WHOLE]], [[Shard(1)]] * 2)


@case
def attention_follows_whichever_tensor_is_sharded(mesh):
    check(mesh, attention, QKV, [[WHOLE], [WHOLE], [Shard(1)]], [[Shard(1)]] * 2)


@case
def attention_gathers_lengths_and_uneven_heads(mesh):
    check(mesh, attention, QKV, [[Shard(2)]] * 3, [[WHOLE]] * 2)
    check(mesh, attention, [t[:, :1].expand(4, 3, *t.shape[2:]) for t in QKV], [[Shard(1)]] * 3, [[WHOLE]] * 2)


@case
def attention_sharded_by_batch_and_heads_of_a_mesh(mesh):
    grid = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "tensor"))
    check(grid, attention, QKV, [[Shard(0), Shard(1)]] * 3, [[Shard(0), Shard(1)]] * 2)


@case
def varlen_attention_sharded_by_heads(mesh):
    def call(q, k, v, slopes, sinks, ends):
        how = {"alibi_slopes": slopes, "sinks": sinks, "is_causal": True, "return_lse": True}
        return fused_ops.varlen_attention(q, k, v, ends, ends, 5, 5, **how)

    inputs = [randn(7, 4, 8), randn(7, 2, 8, seed=1), randn(7, 2, 8, seed=2), randn(4), randn(4, seed=1)]
    placements = [*[[Shard(1)]] * 3, [WHOLE], [Shard(0)], None]
    check(mesh, call, [*inputs, torch.tensor([0, 2, 7], dtype=torch.int32)], placements, [[Shard(1)], [Shard(0)]])


@case
def decode_attention_sharded_by_batch_or_heads(mesh):
    def call(q, k, v, lengths, sinks):
        return fused_ops.decode_attention(q, k, v, lengths, sinks=sinks)

    inputs = [*QKV, torch.tensor([6, 5, 5, 6], dtype=torch.int32), randn(4)]
    check(mesh, call, inputs, [*[[Shard(0)]] * 4, [WHOLE]], [[Shard(0)]])
    check(mesh, call, inputs, [*[[Shard(1)]] * 3, None, [Shard(0)]], [[Shard(1)]])
    with torch.no_grad(), dispatch.record() as choices:
        call(*(distribute_tensor(t, mesh, [Shard(1)]) for t in QKV), inputs[3], None)
    assert {choice.backend for choice in choices} == {"cpu"}


@case
def conv2d_sharded_by_batch(mesh):
    def call(x, weight, bias, scale, shift, residual):
        how = {"scale": scale, "shift": shift, "residual": residual, "activation": "relu"}
        return fused_ops.conv2d(x, weight, bias, padding=1, **how)

    inputs = [randn(4, 3, 6, 6), randn(5, 3, 3, 3), randn(5), randn(5, seed=1), randn(5, seed=2), randn(4, 5, 6, 6)]
    check(mesh, call, inputs, [[Shard(0)], *[[WHOLE]] * 4, [Shard(0)]], [[Shard(0)]])
    check(mesh, call, [*inputs[:5], randn(1, 5, 1, 6)], [[Shard(0)], [Shard(0)], *[[WHOLE]] * 3, None], [[Shard(0)]])


@case
def conv1d_and_causal_conv1d_sharded_by_batch(mesh):
    def causal(x, weight, state):
        return fused_ops.causal_conv1d(x, weight, initial_state=state, return_final_state=True)

    check(mesh, fused_ops.conv1d, [randn(4, 3, 9), randn(5, 3, 3)], [[Shard(0)], [WHOLE]], [[Shard(0)]])
    inputs = [randn(4, 3, 9), randn(3, 4), randn(4, 3, 3)]
    check(mesh, causal, inputs, [[Shard(0)], [WHOLE], [Shard(0)]], [[Shard(0)]] * 2)


@case
def max_pool2d_sharded_by_batch(mesh):
    def call(x):
        return fused_ops.max_pool2d(x, 2, return_indices=True)

    check(mesh, call, [randn(4, 3, 6, 6)], [[Shard(0)]], [[Shard(0)]] * 2)


@case
def batch_norm_sharded_by_batch(mesh):
    """In training the whole batch's statistics are taken and written to the buffers; a sharded buffer is refused."""

    def call(x, mean, var, weight, training):
        return fused_ops.batch_norm_act(x, mean, var, weight, training=training, activation="relu")

    def evaluate(x, weight):
        return call(x, torch.zeros(3), torch.ones(3), weight, False)

    def train(x, weight):
        return call(x, None, None, weight, True)

    inputs = [randn(4, 3, 6, 6), randn(3)]
    check(mesh, evaluate, inputs, [[Shard(0)], [WHOLE]], [[Shard(0)]])
    check(mesh, train, inputs, [[Shard(0)], [WHOLE]], [[WHOLE]])
    wanted = torch.zeros(3), torch.ones(3)
    call(inputs[0], *wanted, None, True)
    for place in (lambda t: t, lambda t: distribute_tensor(t, mesh, [WHOLE])):
        found = [place(t) for t in (torch.zeros(3), torch.ones(3))]
        call(distribute_tensor(inputs[0], mesh, [Shard(0)]), *found, None, True)
        for want, got in zip(wanted, found):
            torch.testing.assert_close(whole(got), want)
    x, *buffers = (distribute_tensor(randn(*shape), mesh, [Shard(0)]) for shape in ((4, 4, 2, 2), (4,), (4,)))
    with pytest.raises(ArgumentError, match="running_mean must be replicated"):
        call(x, *buffers, None, True)


@case
def gru_sharded_by_batch(mesh):
    gru = fused_ops.nn.GRU(6, 8, num_layers=2, bidirectional=True)

    def call(x, lengths, *params):
        return torch.func.functional_call(gru, dict(zip(names, params)), (x,), {"lengths": lengths})

    names, params = zip(*gru.named_parameters())
    inputs = [randn(7, 4, 6), torch.tensor([7, 3, 5, 1]), *params]
    check(mesh, call, inputs, [[Shard(1)], None, *[[WHOLE]] * len(params)], [[Shard(1)]] * 2, {"cpu"})


@case
def lstm_sharded_by_batch_first_with_every_state(mesh):
    lstm = fused_ops.nn.LSTM(6, 8, batch_first=True)

    def call(x, h, c, resets, *params):
        how = {"resets": resets, "return_all_states": True}
        return torch.func.functional_call(lstm, dict(zip(names, params)), (x, (h, c)), how)

    names, params = zip(*lstm.named_parameters())
    inputs = [randn(4, 7, 6), randn(1, 4, 8), randn(1, 4, 8, seed=1), torch.rand(4, 7) < 0.3, *params]
    states = [[Shard(0)], [Shard(1)], [Shard(1)], [Shard(0)], *[[WHOLE]] * len(params)]
    check(mesh, call, inputs, states, [[Shard(0)], [Shard(1)], [Shard(1)], [Shard(2)], [Shard(2)]], {"cpu"})


@case
def cells_sharded_by_batch(mesh):
    def lstm_cell(x, h, c, *weights):
        return fused_ops.lstm_cell(x, (h, c), *weights)

    for cell, gates, states in ((fused_ops.gru_cell, 3, 1), (lstm_cell, 4, 2)):
        inputs = [randn(4, 6), *(randn(4, 8, seed=i) for i in range(states))]
        weights = [randn(gates * 8, 6), randn(gates * 8, 8), randn(gates * 8), randn(gates * 8, seed=1)]
        placements = [[Shard(0)]] * len(inputs) + [[WHOLE]] * 4
        check(mesh, cell, [*inputs, *weights], placements, [[Shard(0)]] * states)


@case
def a_redistribution_under_way_is_waited_for(mesh):
    inputs = [randn(4, 6), randn(4, 8), randn(24, 6), randn(24, 8)]
    gathered = [distribute_tensor(t, mesh, [Shard(0)]).redistribute(placements=[WHOLE], async_op=True) for t in inputs]
    found = fused_ops.gru_cell(*gathered, backend="cpu")  # which takes plain tensors only
    torch.testing.assert_close(found.to_local(), fused_ops.gru_cell(*inputs))


@case
def a_backend_asked_for_by_name_runs_each_part(mesh):
    x, h = (distribute_tensor(t, mesh, [Shard(0)]) for t in (randn(4, 6), randn(4, 8)))
    weights = randn(24, 6), randn(24, 8)
    for backend in ("cpu", "reference"):
        assert fused_ops.explain(fused_ops.gru_cell, x, h, *weights, backend=backend).chosen == backend
    with pytest.raises(fused_ops.BackendUnavailable, match="needs a tensor on a GPU"):
        fused_ops.gru_cell(x, h, *weights, backend="cuda")


@case
def tensors_of_two_meshes_are_refused(mesh):
    other = DeviceMesh("cpu", torch.tensor([1, 0]))
    q, k = distribute_tensor(QKV[0], mesh, [Shard(0)]), distribute_tensor(QKV[1], other, [Shard(0)])
    with pytest.raises(ArgumentError, match="device_mesh must be the same for all tensors"):
        attention(q, k, k)


@case
def a_graph_without_breaks(mesh):
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    check(mesh, compiled, QKV, [[Shard(1)]] * 3, [[Shard(1)]] * 2)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(minutes=5))
    mesh, outcomes = init_device_mesh("cpu", (WORLD,)), {}
    for name, function in CASES.items():
        torch.manual_seed(0)
        try:
            outcomes[name] = function(mesh)
        except Exception:
            outcomes[name] = traceback.format_exc()
    torch.save(outcomes, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict]:
    """By rank, of each case: None, or how it failed."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(name, outcomes):
    for rank, outcome in enumerate(outcomes):
        assert outcome[name] is None, f"rank {rank}: {outcome[name]}"


def test_the_rules_import_no_dtensor():
    program = "import sys, fused_ops.integrations.dtensor; sys.exit('torch.distributed.tensor' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
