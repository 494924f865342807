"""Attention as people write it by hand, found in a graph of Dynamo's and run by `scaled_dot_product_attention`.

    product [· or / scale]… [+ mask | masked_fill | where]… → softmax over the last dimension → product

product is matmul, @, bmm or einsum; casts, and dropout that drops nothing, may stand between. A softmax between two
products is a candidate; from there its readers and what it was made of are followed, one call at a time, until the
pattern is whole or a call does not fit, which is the reason given. torch's own patterns, in
`torch._inductor.fx_passes.fuse_attention`, spell each combination out, after AOTAutograd, where symbolic sizes, other
masks and other layouts no longer match.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx

from fused_ops.attention.functional import scaled_dot_product_attention
from fused_ops.integrations.dynamo import graph as read
from fused_ops.integrations.dynamo import masks
from fused_ops.integrations.dynamo.graph import Refused, Row, call
from fused_ops.integrations.dynamo.products import PRODUCTS, Operand, Product, back, permuted, products

_FAR = 32  # nodes looked at between a softmax and a product of the same attention
_EFFECTS = ("mul", "div", "add", "sub", "masked_fill", "where")
_HALF = (torch.float16, torch.bfloat16)
_RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_TRANSPOSES = ("transpose", "swapaxes", "permute", "movedim")
_READS_ANY_LAYOUT = ("contiguous", "reshape", "flatten")
MEASURED = "bench/results/cpu/dynamo_cpu.json"
# By `MEASURED`, on a CPU: as many queries · keys, and as many queries, are worth it, in evaluation and where a gradient
# is wanted, in the dtypes that were measured.
_WORTH = {
    (torch.float32, "plain", False): 2**16,
    (torch.float32, "plain", True): 2**20,
    (torch.float32, "masked", False): 2**18,
    (torch.float32, "masked", True): 2**16,
    (torch.float32, "causal", False): 2**16,
    (torch.float32, "causal", True): 2**16,
}
_FEW_ROWS = 64


class Scores(NamedTuple):
    """What goes into a softmax, nodes in the order they run: a product, numbers that scale it, then masks."""

    members: list[fx.Node]
    product: Product
    factors: list[tuple[str, object]]
    steps: list[masks.Add | masks.Hide]


class Weights(NamedTuple):
    """What a softmax goes into, nodes in the order they run."""

    members: list[fx.Node]
    product: Product


def rewrite(graph: fx.Graph) -> Iterator[Row]:
    """Rewrite the attention of a graph that is proven and worth it; a row for each, and for what is left alone."""
    for node in list(graph.nodes):
        called = call(node)
        if called is None or called.name != "softmax" or not (_made_of_product(node) and _goes_into_product(node)):
            continue
        place, pattern = read.place(node), "attention"
        try:
            if called.given.get("dim") not in (-1, read.tensor(node, "its softmax").dim() - 1):
                raise Refused(f"its softmax runs over dimension {called.given.get('dim')}, not the last")
            scores, weights = _scores(called.given["input"]), _weights(node)
            members = [*scores.members, node, *weights.members]
            pattern = f"attention ({', '.join(map(read.described, members))})"
            read.refuse_writers(members)
            backend = _replace(members, scores, weights)
            yield Row(place, pattern, "scaled_dot_product_attention", f"runs on {backend}")
        except Refused as reason:
            yield Row(place, pattern, None, str(reason))


def _made_of_product(node: fx.Node) -> bool:
    """Whether a tensor is made, element by element, of a product."""
    parts = _linked(node, lambda node: [part for part in node.all_input_nodes if _keeps_elements(part, node)])
    return any(read.name(part) in (*PRODUCTS, "baddbmm") for part in parts)


def _goes_into_product(node: fx.Node) -> bool:
    """Whether a tensor, changed element by element, is what a product sums over."""
    results = _linked(node, lambda node: [reader for reader in node.users if _keeps_elements(node, reader)])
    return any(product.a.node is part for part in results for reader in part.users for product in products(reader))


def _linked(node: fx.Node, links: Callable[[fx.Node], list[fx.Node]]) -> list[fx.Node]:
    """`node` and the nearest that `links` leads to, up to `_FAR` of them."""
    found = [node]
    for node in found:
        found += [linked for linked in links(node) if linked not in found][: _FAR - len(found)]
    return found


def _keeps_elements(before: fx.Node, after: fx.Node) -> bool:
    """Whether `after` may be `before`, changed element by element."""
    a, b, name = read.value(before), read.value(after), read.name(after)
    if a is None or b is None:
        return False
    return name in _RESHAPES or read.same(a, b) or (name in _EFFECTS and a.dim() == b.dim())


def _scores(node: fx.Node) -> Scores:
    """From a softmax back to the product."""
    members, factors, steps = [node], [], []
    while not products(node):
        step, inner = _step(node)
        if isinstance(step, (masks.Add, masks.Hide)):
            if factors:
                raise Refused("it scales the scores after masking them")
            steps.insert(0, step)
        elif step is not None:
            factors.insert(0, step)
        node = inner
        members.insert(0, node)
    if any(len(member.users) != 1 for member in members):
        raise Refused("its scores are read elsewhere too")
    product = next((found for found in products(node) if found.order is None), None)
    if product is None:
        raise Refused("its scores are not (..., queries, keys)")
    return Scores(members, product, factors, steps)


def _step(node: fx.Node) -> tuple[masks.Add | masks.Hide | tuple[str, object] | None, fx.Node]:
    """(what a call does to the scores, the scores before it)"""
    if read.is_cast(node):
        return None, call(node).given["input"]
    called = call(node)
    if called is None or called.name not in _EFFECTS:
        raise Refused(f"{read.described(node)} comes between the product and the softmax")
    first, other = called.given.get("input"), called.given.get("other")
    scores = next((part for part in (first, other) if _are_scores(part, node)), None)
    if scores is None:
        raise Refused(f"{called.name} broadcasts its scores")
    if called.in_place and scores is not first:
        raise Refused(f"{called.name}_ writes to what is no score")
    return _effect(called.name, called.given, scores), scores


def _are_scores(node: object, result: fx.Node) -> bool:
    if not isinstance(node, fx.Node) or read.value(node) is None or read.value(result) is None:
        return False
    return read.same(read.value(node), read.value(result)) and _made_of_product(node)


def _effect(name: str, given: dict[str, object], scores: fx.Node) -> masks.Add | masks.Hide | tuple[str, object]:
    first = given["input"] is scores
    other = given.get("other") if first else given["input"]
    if name == "masked_fill":
        return masks.hidden(given["mask"], True, given["value"])
    if name == "where":
        return masks.hidden(given["condition"], not first, other)
    if other is scores or (name in ("div", "sub") and not first) or given.get("rounding_mode"):
        raise Refused(f"{name} does not scale or mask its scores")
    return (name, other) if name in ("mul", "div") else masks.added(other, 1 if name == "add" else -1, given)


def _weights(softmax: fx.Node) -> Weights:
    """From a softmax on to the product."""
    members, node = [], softmax
    while True:
        reader = read.only_reader(node)
        if reader is None:
            raise Refused("its weights are read elsewhere too")
        members.append(reader)
        product = next((found for found in products(reader) if found.a == Operand(node)), None)
        if product is not None:
            return Weights(members, product)
        called = call(reader)
        if called is not None and called.name == "dropout":
            if called.given.get("training", True) and called.given.get("p", 0.5) != 0.0:
                raise Refused("it drops weights: attention would draw others")
        elif not read.is_cast(reader):
            raise Refused(f"its weights go through {read.described(reader)}")
        node = reader


def _replace(members: list[fx.Node], scores: Scores, weights: Weights) -> str:
    """One call in place of all members; returns which backend will serve it."""
    product, result = read.tensor(members[0], "its product"), read.tensor(members[-1], "its result")
    _check_dtypes(members, product.dtype)
    operands = (scores.product.a, scores.product.b, weights.product.b)
    _check_shapes(*map(_shape, operands))
    scale, factors = _scaling(scores.factors, operands[0], product.dtype)
    inputs = (*(operand.node for operand in operands), *(step.mask for step in scores.steps))
    trains = torch.is_grad_enabled() and any(read.value(node).requires_grad for node in inputs)
    causal = _check_masks(scores, product, trains)
    _check_worth(product, "causal" if causal else "masked" if scores.steps else "plain", trains)
    how = {"scale": scale, "is_causal": causal, "dtype": product.dtype}
    if not _any_layout(members[-1]):
        how["layout"] = _layout(result, weights.product.order)
    graph, order = members[-1].graph, weights.product.order
    with graph.inserting_before(members[-1]):
        args = (*(permuted(operand) for operand in operands), tuple(factors), () if causal else tuple(scores.steps))
        backend = read.explained(attend, args, how).chosen
        made = graph.call_function(attend, args, how)
        made.meta["example_value"] = result if order is None else result.permute(back(order))
        made = permuted(Operand(made, order))
    read.replace(members, made)
    return backend


def _check_masks(scores: Scores, product: Tensor, trains: bool) -> bool:
    """Whether attention can be told what the masks do; returns whether they are a causal one, made by the graph."""
    last = read.value(scores.members[-1])
    fills = all(isinstance(step, masks.Hide) for step in scores.steps)
    if fills:
        masks.check_hidden(scores.steps, last)
    if masks.is_causal(scores.steps, product):
        return True
    if not fills:
        masks.check_added(scores.steps, last, product.dtype)
        if trains:
            raise Refused("its mask is added: a row that it hides whole would get another gradient")
        if product.device.type != "cpu":
            raise Refused(f"its mask is added: not proven on {product.device.type} for a row that it hides whole")
    return False


def _check_dtypes(members: list[fx.Node], dtype: torch.dtype) -> None:
    """Attention computes in the products' dtype, or in float32: so must what it stands for."""
    for node in members:
        found = read.tensor(node, read.described(node)).dtype
        wider = dtype in _HALF and found == torch.float32 and node is not members[-1]
        if found != dtype and not wider:
            raise Refused(f"{read.described(node)} gives {found}, the product of queries and keys {dtype}")


def _shape(operand: Operand) -> list:
    shape = read.tensor(operand.node, "an operand of its products").shape
    return [shape[dim] for dim in operand.order or range(len(shape))]


def _check_shapes(query: list, key: list, value: list) -> None:
    """key is (..., depth, columns)."""
    if not len(query) == len(key) == len(value) <= 4:
        raise Refused("its tensors differ in dimensions, or have more than 4")
    if not all(read.equal(m, n) for other in (key, value) for m, n in zip(query[:-2], other[:-2])):
        raise Refused("its batch or its heads are broadcast")
    if not read.equal(query[-1], value[-1]):
        raise Refused("its values are of another width than its keys: PyTorch has no fused kernel for that")


def _scaling(factors: list[tuple[str, object]], query: Operand, dtype: torch.dtype) -> tuple[float, list]:
    """The numbers among `factors` as one, and the others, which can act on the queries."""
    scale, others = 1.0, []
    for name, factor in factors:
        if isinstance(factor, fx.Node):
            symbol = isinstance(factor.meta.get("example_value"), (torch.SymInt, torch.SymFloat))
            if not symbol and not _scales_rows(read.tensor(factor, "its scale"), _shape(query), dtype):
                raise Refused("its scale is not one number per query")
            others.append((name, factor))
        elif not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            raise Refused(f"it scales its scores by {factor}, which is not positive")
        else:
            scale = scale * factor if name == "mul" else scale / factor
    return scale, others


def _scales_rows(factor: Tensor, query: list, dtype: torch.dtype) -> bool:
    shape = list(factor.shape)
    fits = all(read.equal(m, 1) or read.equal(m, n) for m, n in zip(reversed(shape[:-1]), reversed(query[:-1])))
    fits = fits and len(shape) <= len(query) and (not shape or read.equal(shape[-1], 1))
    wide = factor.dim() > 0 and torch.promote_types(factor.dtype, dtype) != dtype
    return fits and not wide


def _check_worth(product: Tensor, kind: str, trains: bool) -> None:
    """Whether PyTorch's fused attention, the least that will run, is no slower than what is written.

    On a GPU it is taken at every size, as inductor does with the patterns that it knows.
    """
    if product.device.type == "cuda":
        return
    if product.device.type != "cpu":
        raise Refused(f"on {product.device.type} it has not been measured")
    least = _WORTH.get((product.dtype, kind, trains))
    if least is None:
        raise Refused(f"PyTorch's kernel is not known to be faster in {product.dtype} on the CPU ({MEASURED})")
    rows, columns = map(read.hint, product.shape[-2:])
    if rows < _FEW_ROWS or rows * columns < least:
        raise Refused(f"PyTorch's kernel is no faster for {rows} queries and {columns} keys on the CPU ({MEASURED})")


def _any_layout(node: fx.Node) -> bool:
    """Whether all that is done with a tensor works, and gives the same layout, whatever its own is."""
    for reader in node.users:
        called = call(reader)
        if called is None or called.name not in (*_READS_ANY_LAYOUT, *_TRANSPOSES):
            return False
        if called.name in _TRANSPOSES and not _any_layout(reader):
            return False
    return bool(node.users)


def _layout(result: Tensor, order: list[int] | None) -> list[int]:
    """The dimensions of attention's result, from the slowest to the fastest in the memory of `result`."""
    result = result if order is None else result.permute(back(order))
    return sorted(range(result.dim()), key=lambda dim: -read.hint(result.stride(dim)))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factors: tuple,
    steps: tuple,
    *,
    scale: float,
    is_causal: bool,
    dtype: torch.dtype,
    layout: list[int] | None = None,
) -> Tensor:
    """softmax(scale · query · key · factors, masked by steps) · value with key (..., D, Lk), at most 4 dimensions.

    Args:
        factors: ("mul" or "div", a number per query or for all).
        steps: `masks.Hide`, or `masks.Add` among them.
        dtype: of the products, in which autocast may be computing.
        layout: dimensions from the slowest to the fastest, as the result's memory is to be; None: any.
    """
    for name, factor in factors:
        query = query * factor if name == "mul" else query / factor
    dims, mask = query.dim(), None
    if steps:
        mask, empty = map(_four_dimensional, masks.mask_and_empty(steps, dtype))
    query, key, value = (_four_dimensional(t.to(dtype)) for t in (query, key.transpose(-2, -1), value))
    out = scaled_dot_product_attention(query, key, value, mask, 0.0, is_causal, scale)
    if steps:  # by hand, a row that sees no key has equal weights, or no number, whose gradient goes to the values
        alone = value.mean(-2, keepdim=True)
        if not masks.finite(steps):
            alone = alone * torch.where(empty.any(-2, keepdim=True), math.nan, 1.0).to(dtype)
        out = torch.where(empty, alone, out)
    while out.dim() > dims:
        out = out.squeeze(0)
    return out if layout is None else out.permute(layout).contiguous().permute(back(layout))


def _four_dimensional(tensor: Tensor) -> Tensor:
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor
