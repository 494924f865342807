"""What hand-written attention does to its scores before the softmax, read from a graph and told to attention.

Rows whose every key is hidden are where a mask is easily told wrong: by hand such a row is uniform after a finite fill
and NaN after −inf; attention gives 0, and PyTorch's kernels may give it another result, or another gradient.
"""

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, fx

from fused_ops.integrations.dynamo import graph as read
from fused_ops.integrations.dynamo.graph import Refused, call

_FILLED = ("full", "full_like", "new_full")
_NUMBERS = ("tensor", "scalar_tensor")
_RESHAPES = ("view", "reshape", "unsqueeze", "expand", "getitem", "contiguous", "clone", "bool")


class Add(NamedTuple):
    """scores + sign · mask."""

    mask: fx.Node | Tensor
    sign: int


class Hide(NamedTuple):
    """scores, but `fill` where mask is `when`."""

    mask: fx.Node | Tensor
    when: bool
    fill: float


def added(mask: object, sign: int, given: dict[str, object]) -> Add:
    """What `scores + mask` does, if that can be told to attention."""
    if given.get("alpha", 1) != 1:
        raise Refused(f"its mask is added with alpha={given['alpha']}")
    seen = read.tensor(mask, "what is added to its scores")
    if not seen.is_floating_point():
        raise Refused(f"its mask is {seen.dtype} and added")
    return Add(mask, sign)


def hidden(mask: object, when: bool, fill: object) -> Hide:
    """What `masked_fill` or `where` do, if that can be told to attention."""
    seen, number = read.tensor(mask, "its mask"), _number(fill)
    if seen.dtype != torch.bool:
        raise Refused(f"its mask is {seen.dtype} where bool is wanted")
    if number is None:
        raise Refused("it fills hidden scores with what is no constant")
    return Hide(mask, when, number)


def _number(fill: object) -> float | None:
    """A constant, also one in a tensor."""
    if isinstance(fill, (int, float)):
        return float(fill)
    called = call(fill)
    if called is not None and read.is_cast(fill):
        return _number(called.given["input"])
    if called is None or called.name not in (*_FILLED, *_NUMBERS):
        return None
    return _number(called.given.get("fill_value" if called.name in _FILLED else "data"))


def check_hidden(steps: list[Hide], scores: Tensor) -> None:
    """Whether all fill hidden scores with one number, −inf or too far below to weigh beside any other."""
    fills = {step.fill for step in steps}
    limits = torch.finfo(scores.dtype)
    # A score so near a fill below this that both have a weight differs from it by less than it is rounded.
    far = math.log(limits.smallest_normal * limits.eps) / limits.eps
    for fill in fills:
        if fill != limits.min and not fill <= far:
            raise Refused(f"it fills hidden scores with {fill:g}, which is not far from all others for certain")
    if len(fills) > 1:
        raise Refused("it fills hidden scores with several numbers")


def check_added(steps: list[Add | Hide], scores: Tensor, dtype: torch.dtype) -> None:
    """Whether adding `_bias` gives what `steps` give, up to rounding: fills must absorb whatever they are added to."""
    for step in steps:
        seen = read.value(step.mask)
        if isinstance(step, Add) and torch.promote_types(seen.dtype, dtype) != dtype:
            raise Refused(f"its mask is {seen.dtype}, its queries {dtype}")
        if isinstance(step, Hide) and step.fill not in (-math.inf, torch.finfo(scores.dtype).min):
            raise Refused(f"it fills hidden scores with {step.fill:g} and adds another mask")
    if scores.dtype != dtype:
        raise Refused(f"its mask acts in {scores.dtype}, its queries are {dtype}")


def is_causal(steps: list[Add | Hide], scores: Tensor) -> bool:
    """Whether query i sees key j exactly where j ≤ i, as the graph itself makes the mask."""
    mask = read.value(steps[0].mask) if len(steps) == 1 else None
    if mask is None or mask.dim() < 2:
        return False
    if not all(read.equal(m, n) for m, n in zip(mask.shape[-2:], scores.shape[-2:])):
        return False
    if isinstance(steps[0], Add):
        return steps[0].sign == 1 and _triangle(steps[0].mask) == ("upper", -math.inf)
    return _triangle(steps[0].mask) == (("upper", 1.0) if steps[0].when else ("lower", 1.0))


def _triangle(node: object) -> tuple[str, float] | None:
    """("lower", x): x where j ≤ i and 0 elsewhere; ("upper", x): x where j > i. None: unknown."""
    called = call(node)
    if called is None or read.value(node) is None:
        return None
    inner = called.given.get("input")
    if called.name in ("tril", "triu"):
        side, diagonal = ("lower", 0) if called.name == "tril" else ("upper", 1)
        filled = _filling(inner)
        return (side, filled) if filled is not None and called.given.get("diagonal", 0) == diagonal else None
    before, after = read.value(inner), read.value(node)
    negated = called.name == "logical_not" and before is not None and before.dtype == torch.bool
    if negated or (called.name == "eq" and called.given.get("other") == 0):
        return {("lower", 1.0): ("upper", 1.0), ("upper", 1.0): ("lower", 1.0)}.get(_triangle(inner))
    moved = called.name == "getitem" and not _takes_all(node.args[1])
    if before is None or moved or not (called.name in _RESHAPES or read.is_cast(node)):
        return None
    same = all(read.equal(m, n) for m, n in zip(before.shape[-2:], after.shape[-2:]))
    return _triangle(inner) if same else None


def _takes_all(index: object) -> bool:
    """Whether an index takes elements from the first on, in their order."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        part is None or part is ... or (isinstance(part, slice) and part.start in (None, 0) and part.step in (None, 1))
        for part in parts
    )


def _filling(node: object) -> float | None:
    """What every element of a new tensor is."""
    called = call(node)
    if called is not None and called.name in ("ones", "ones_like", "new_ones"):
        return 1.0
    return _number(node)


def finite(steps: tuple[Add | Hide, ...]) -> bool:
    """Whether a row that sees no key has equal weights by hand, not NaN."""
    return all(isinstance(step, Hide) and step.fill > -math.inf for step in steps)


def mask_and_empty(steps: tuple[Add | Hide, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(mask, bool or to be added, for attention; which rows see no key), both broadcastable to the scores.

    A bool mask shows all keys to a row that sees none.
    """
    if not all(isinstance(step, Hide) for step in steps):
        bias = _bias(steps, dtype)
        return bias, (bias == -math.inf).all(-1, keepdim=True)
    shown = [~step.mask if step.when else step.mask for step in steps]
    seen = reduce(torch.logical_and, shown)
    empty = ~seen.any(-1, keepdim=True)
    return seen | empty, empty


def _bias(steps: tuple[Add | Hide, ...], dtype: torch.dtype) -> Tensor:
    """What added to scores does as `steps`, one after the other: a fill absorbs the scores it is added to."""
    total = steps[0].mask.new_zeros((), dtype=dtype)
    for step in steps:
        if isinstance(step, Add):
            total = total + step.mask.to(dtype) * step.sign
        else:
            fill = total.new_full((), step.fill)
            total = torch.where(step.mask, fill, total) if step.when else torch.where(step.mask, total, fill)
    return total
