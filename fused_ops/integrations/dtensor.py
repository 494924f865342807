"""Sharding rules: what the ops do with DTensors, so that tensor-parallel and data-parallel plans run on our kernels.

An op whose first tensor is a `torch.distributed.tensor.DTensor` runs on each rank's own part of its tensors, by the
backend that suits plain tensors of that size. Along a dimension of the mesh, the first tensor sharded by batch or by
heads decides: what has that dimension is sharded like it, the rest is whole and its gradient summed. Where none is, or
the parts would be uneven, every rank computes everything. Tensors that lie otherwise are redistributed first; a plain
tensor among DTensors counts as replicated.

Each rank draws its own random numbers; seed the ranks alike, as for DTensor's own ops.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map_only

from fused_ops.core.dispatch import SUBCLASSES, Op
from fused_ops.core.errors import ArgumentError


class Rule(NamedTuple):
    """A letter for each dimension of an op's tensors, from the last one back: b batch, h heads, g key heads, which
    follow the heads, and a dot for what is never sharded.

    inputs: item by item of the op's call; a tuple for a tuple of tensors, or the same letters for all in it.
    outputs: of each result, or of all.
    """

    inputs: tuple
    outputs: str | tuple[str, ...]


_WHOLE = Rule((), "")
_CELL = Rule(("b.", "b."), "b.")
_SEQUENCE = Rule((("b.", "b.", "b.", "b", "b", "", "b.", "b.", "b.", "b."), ""), "b.")
RULES = {
    "scaled_dot_product_attention": Rule(("bh..", "bg..", "bg..", "bh..", "h", "h"), ("bh..", "bh.")),
    "varlen_attention": Rule(("h.", "g.", "g.", "h", "h"), "h."),
    "decode_attention": Rule(("bh..", "bg..", "bg..", "b", "h"), "bh.."),
    "conv1d": Rule(("b..", *[""] * 8, "b.."), "b.."),
    "conv2d": Rule(("b...", *[""] * 8, "b..."), "b..."),
    "conv_bn_act2d": Rule(("b...", *[""] * 11, "b..."), "b..."),
    "causal_conv1d": Rule(("b..", "", "", "", "b.."), "b.."),
    "max_pool2d": Rule(("b...",), "b..."),
    **dict.fromkeys(("rnn_tanh", "rnn_relu", "gru", "lstm"), _SEQUENCE),
    **dict.fromkeys(("rnn_tanh_cell", "rnn_relu_cell", "gru_cell"), _CELL),
    "lstm_cell": Rule(("b.", "b.", "b."), "b."),
}


def rule_of(op: str, call: tuple) -> Rule:
    """The rule for one call; an op without one is computed whole by every rank."""
    if op == "batch_norm_act":
        input, running_mean, running_var, _, _, training, *_ = call
        if training:  # mean and variance are the whole batch's
            _check_replicated(running_mean=running_mean, running_var=running_var)
            return _WHOLE
        letters = "b" + "." * (input.dim() - 1)
        return Rule((letters, *[""] * 7, letters), letters)
    if RULES.get(op) is _SEQUENCE and call[0].batch_sizes is not None:
        return _WHOLE  # packed: no dimension is the batch
    return RULES.get(op, _WHOLE)


def _check_replicated(**buffers: Tensor | None) -> None:
    """What is written in place must not be a copy that a redistribution makes."""
    for name, buffer in buffers.items():
        placements = getattr(buffer, "placements", ())
        if not all(placement.is_replicate() for placement in placements):
            raise ArgumentError(name, "replicated over the mesh, in training", placements)


def run(op: Op, requested: str | None, tensors: tuple, call: tuple):
    """`op(requested, tensors, *call)` of DTensors."""
    from torch.distributed.tensor import DTensor

    rule, mesh = rule_of(op.name, call), tensors[0].device_mesh
    inputs = _sharded_by({id(t): (t, _last(letters, t)) for t, letters in _lettered(call, rule.inputs)})
    axes = _axes(mesh, list(inputs.values()))
    local = {key: _local(tensor, letters, mesh, axes) for key, (tensor, letters) in inputs.items()}

    def own(tensor: Tensor) -> Tensor:
        return local[id(tensor)]

    found = op(requested, *tree_map_only(Tensor, own, (tensors, *call)))
    results = found if isinstance(found, tuple) else (found,)
    outputs = rule.outputs if isinstance(rule.outputs, tuple) else (rule.outputs,) * len(results)
    placed = tuple(
        DTensor.from_local(result, mesh, _placements(_last(letters, result), axes), run_check=False)
        for result, letters in zip(results, outputs)
    )
    return placed if isinstance(found, tuple) else placed[0]


def _lettered(value, letters: str | tuple) -> Iterator[tuple[Tensor, str]]:
    """Every tensor of a call, with its rule's letters."""
    if isinstance(value, Tensor):
        yield value, letters
    elif isinstance(value, tuple):
        each = letters[: len(value)] if isinstance(letters, tuple) else (letters,) * len(value)
        for part, own in zip_longest(value, each, fillvalue=""):
            yield from _lettered(part, own)


def _last(letters: str, tensor: Tensor) -> str:
    """One letter for each dimension."""
    return ("." * tensor.dim() + letters)[len(letters) :]


def _sharded_by(inputs: dict[int, tuple[Tensor, str]]) -> dict[int, tuple[Tensor, str]]:
    """The same, dots for the dimensions along which a tensor is broadcast, and h for key heads."""
    sizes: dict[str, int] = defaultdict(int)
    for tensor, letters in inputs.values():
        for letter, size in zip(letters, tensor.shape):
            sizes[letter] = max(size, sizes[letter])

    def own(letter: str, size: int) -> str:
        broadcast = size != sizes[letter] or (letter == "g" and size == 1)
        return "." if broadcast else letter.replace("g", "h")

    return {key: (t, "".join(map(own, letters, t.shape))) for key, (t, letters) in inputs.items()}


def _axes(mesh, inputs: list[tuple[Tensor, str]]) -> list[str]:
    """The letter by which each dimension of the mesh shards, a dot for none."""
    from torch.distributed.tensor import DTensor, Shard

    sizes = {(letter, size) for tensor, letters in inputs for letter, size in zip(letters, tensor.shape)}
    axes: list[str] = []
    for i in range(mesh.ndim):

        def even(letter: str) -> bool:
            parts = math.prod([mesh.size(j) for j, axis in enumerate((*axes, letter)) if axis == letter])
            return all(size % parts == 0 for other, size in sizes if other == letter)

        placed = [(t.placements[i], letters) for t, letters in inputs if isinstance(t, DTensor)]
        wanted = [letters[p.dim] for p, letters in placed if isinstance(p, Shard)]
        axes.append(next((letter for letter in wanted if letter != "." and even(letter)), "."))
    return axes


def _placements(letters: str, axes: list[str], whole=None) -> list:
    """Where a tensor with these letters lies; `whole`: how, along an axis that shards others only."""
    from torch.distributed.tensor import Replicate, Shard

    def along(axis: str):
        if axis == ".":
            return Replicate()
        return Shard(letters.index(axis)) if axis in letters else whole or Replicate()

    return [along(axis) for axis in axes]


def _local(tensor: Tensor, letters: str, mesh, axes: list[str]) -> Tensor:
    """This rank's part of a tensor. Where others are sharded and it is not, its gradient is a sum over the ranks."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    elif tensor.device_mesh != mesh:
        raise ArgumentError("device_mesh", "the same for all tensors", f"{mesh} and {tensor.device_mesh}")
    placed = tensor.redistribute(placements=_placements(letters, axes))
    part = placed.to_local(grad_placements=_placements(letters, axes, Partial()))
    return part.wait() if isinstance(part, AsyncCollectiveTensor) else part


SUBCLASSES["torch.distributed.tensor.DTensor"] = run
