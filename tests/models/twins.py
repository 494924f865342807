"""A model of ours beside its twin in transformers: same weights, float64 as the oracle."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.support import assert_accurate, randn


def randomise(model: nn.Module, matrices: float = 0.2, vectors: float = 0.2) -> nn.Module:
    """No weight is 0 or 1, so that none can be left out unseen."""
    with torch.no_grad():
        for i, (name, weight) in enumerate(model.named_parameters()):
            norm = weight.dim() == 1 and name.endswith("weight")
            weight.copy_((matrices if weight.dim() > 1 else vectors) * randn(*weight.shape, seed=i) + norm)
    return model


def assert_twins(ours: nn.Module, theirs: nn.Module, call: Callable[[nn.Module], list[Tensor]], terms: int = 200):
    """Values of `call(model)` and the gradient of every weight obey the correctness rule."""
    theirs.load_state_dict(ours.state_dict(), strict=True)
    found, grads = _run(ours, call)
    peers, peer_grads = _run(theirs, call)
    exact, exact_grads = _run(copy.deepcopy(theirs).double(), call)
    assert len(found) == len(exact) > 0
    for value, wanted, peer in zip(found, exact, peers, strict=True):
        assert_accurate(value, wanted, peer, terms=terms)
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        assert_accurate(grad, exact_grads[name], peer_grads[name], factor=3.0, terms=terms)


def _run(model: nn.Module, call) -> tuple[list[Tensor], dict[str, Tensor]]:
    values = call(model)
    named = dict(model.named_parameters())
    total = sum((value.double() * randn(*value.shape, dtype=torch.float64)).sum() for value in values)
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True, materialize_grads=True)
    return values, dict(zip(named, grads, strict=True))
