"""Public sequences on a GPU's kernels: one check for a GPU, the emulator and the interpreter."""

from collections.abc import Collection

import torch
from torch import Tensor

from fused_ops.rnn import layers, reference
from fused_ops.rnn.reference import Static, Tensors
from tests.rnn.common import Case
from tests.rnn.extras import LENGTHS, RESETS, flat_call, packed
from tests.support import assert_accurate, leaves, randn, value_and_gradients

WHAT = ("plain", "lengths", "lengths and resets")


def check(backend: str, mode: str, dtype: torch.dtype, what: str, device: str, hidden: int = 19) -> None:
    """Values and every gradient of two layers in both directions, against float64."""
    case = Case(mode, time=5, batch=3, inputs=7, hidden=hidden, layers=2, bidirectional=True, dtype=dtype)
    keywords, states = {}, 1 + (mode == "lstm")
    if what != "plain":
        keywords["lengths"] = torch.tensor([5, 0, 3])
    if what == "lengths and resets":
        keywords["resets"] = torch.arange(15).view(5, 3) % 4 == 1
        keywords["return_all_states"] = True
    leaves = case.tensors(requires_grad=True)

    def on(tensors):
        return [t.detach().to(device).requires_grad_() for t in tensors]

    def run(*tensors, backend):
        there = {name: t if isinstance(t, bool) else t.to(tensors[0].device) for name, t in keywords.items()}
        return case.flat(*tensors, **there, backend=backend)

    def plain(*tensors):
        return case.flat(*tensors, backend="reference")

    values, grads = value_and_gradients(lambda *t: run(*t, backend=backend), on(leaves))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact, exact_grads = value_and_gradients(lambda *t: run(*t, backend="reference"), wide)
    torchs, torch_grads = value_and_gradients(plain, leaves)
    true, true_grads = value_and_gradients(plain, wide)
    assert len(values) == states + 1 + (states if "return_all_states" in keywords else 0)
    # PyTorch's own op has no resets: its error in the plain call stands for it.
    for i, (value, wanted) in enumerate(zip(values, exact, strict=True)):
        own = wanted + _error(torchs, true, min(i, states))
        assert_accurate(value.cpu(), wanted, own, terms=4 * hidden)
    for i, (grad, wanted) in enumerate(zip(grads, exact_grads, strict=True)):
        own = wanted + _error(torch_grads, true_grads, i)
        assert_accurate(grad.cpu(), wanted, own, factor=3.0, terms=60)


def check_extras(
    backend: str, mode: str, extras: Collection[str], dtype: torch.dtype, device: str, packs=False, hidden=5
):
    """Values and every gradient of a driver's flat call with the named extras, an LSTM's state projected and not,
    against float64."""
    for proj in (0, 3) if mode == "lstm" else (0,):
        case = Case(mode, hidden=hidden, layers=2, bidirectional=True, dtype=dtype, proj=proj)
        tensors, params, static = flat_call(case, extras, LENGTHS, None if packs else RESETS, all_states=not packs)
        _check_call(backend, packed(tensors) if packs else tensors, params, static, device, terms=4 * hidden)


def _check_call(backend: str, tensors: Tensors, params: list[Tensor], static: Static, device: str, terms: int) -> None:
    inputs = [t if i > 2 or t is None else t.requires_grad_() for i, t in enumerate(tensors)]
    inputs += [param.requires_grad_() for param in params]
    head, dtype = len(tensors), tensors.input.dtype

    def run(dtype, device, sequence):
        def call(*there):
            sizes = {"batch_sizes": tensors.batch_sizes}  # on the CPU, as in a PackedSequence
            return sequence(Tensors(*there[:head])._replace(**sizes), there[head:])

        values, grads = value_and_gradients(call, leaves(*inputs, dtype=dtype, device=device))
        return [t.detach().cpu() for t in (*values, *grads)], len(values)

    def plain(tensors, params):
        return reference.sequence(*tensors, *params, *static)

    found, count = run(dtype, device, lambda tensors, params: layers.sequence(backend, tensors, params, static))
    exact, own = run(torch.float64, "cpu", plain)[0], run(dtype, "cpu", plain)[0]
    for i, (value, wanted, peer) in enumerate(zip(found, exact, own, strict=True)):
        assert_accurate(value, wanted, peer, factor=2.0 if i < count else 3.0, terms=terms if i < count else 60)


def _error(found, exact, i: int) -> float:
    return (found[i].detach().double() - exact[i].detach()).abs().max().item()


def check_a_row_alone(backend: str, mode: str, dtype: torch.dtype, device: str) -> None:
    """A row's result has the same bits alone and in a batch, projection and all layers included."""
    case = Case(mode, time=3, batch=11, inputs=9, hidden=21, layers=2, bidirectional=True, dtype=dtype)
    tensors, states = [t.to(device) for t in case.tensors()], 1 + (mode == "lstm")
    whole = case.flat(*tensors, backend=backend)[0]
    for row in (0, 10):
        mine = [t[:, row : row + 1].contiguous() if i <= states else t for i, t in enumerate(tensors)]
        assert torch.equal(case.flat(*mine, backend=backend)[0], whole[:, row : row + 1])


def check_packed(backend: str, dtype: torch.dtype, device: str) -> None:
    """A module's PackedSequence equals its rows one by one."""
    from torch.nn.utils.rnn import pack_sequence, unpack_sequence

    import fused_ops

    torch.manual_seed(0)
    module = fused_ops.nn.GRU(4, 8, 2, bidirectional=True).to(device, dtype)
    rows = [randn(n, 4, seed=n).to(device, dtype) for n in (2, 5, 1)]
    with fused_ops.use_backend(backend), torch.no_grad():
        output, h_n = module(pack_sequence(rows, enforce_sorted=False))
        for i, (row, found) in enumerate(zip(rows, unpack_sequence(output), strict=True)):
            alone, state = module(row)
            assert torch.equal(found, alone) and torch.equal(h_n[:, i], state)
