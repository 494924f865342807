"""Products of matrices in a graph of Dynamo's, however they are written."""

from typing import NamedTuple

from torch import fx

from fused_ops.integrations.dynamo import graph as read
from fused_ops.integrations.dynamo.graph import call

PRODUCTS = ("matmul", "bmm", "einsum")


class Operand(NamedTuple):
    """A tensor with its dimensions in another order (None: as they are)."""

    node: fx.Node
    order: list[int] | None = None


class Product(NamedTuple):
    """(..., rows, depth) · (..., depth, columns); `order`: the dimensions of that in the order the result has them."""

    a: Operand
    b: Operand
    order: list[int] | None = None


def products(node: fx.Node) -> list[Product]:
    """What a node computes as a product, in each order of its operands."""
    called = call(node)
    if called is None or called.name not in PRODUCTS:
        return []
    if called.name == "einsum":
        return _einsum(node)
    a, b = called.given["input"], called.given.get("other", called.given.get("mat2"))
    return [Product(Operand(a), Operand(b))] if isinstance(a, fx.Node) and isinstance(b, fx.Node) else []


def _einsum(node: fx.Node) -> list[Product]:
    """An equation of two operands that is a batch of matrix products, read both ways."""
    equation, *operands = node.args
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    if len(operands) != 2 or not isinstance(equation, str) or equation.count("->") != 1:
        return []
    left, result = equation.replace(" ", "").split("->")
    terms = [*left.split(","), result]
    tensors = [read.value(operand) for operand in (*operands, node)]
    if len(terms) != 3 or None in tensors:
        return []
    terms = [_spelled_out(term, tensor.dim()) for term, tensor in zip(terms, tensors)]
    pairs = list(zip(operands, terms))
    return [product for a, b in (pairs, pairs[::-1]) if (product := _matrices(a, b, terms[2])) is not None]


def _spelled_out(term: str, dims: int) -> str:
    """A term with letters for its ellipsis."""
    return term.replace("...", "αβγδεζηθ"[: dims - len(term) + 3]) if "..." in term else term


def _matrices(a: tuple[fx.Node, str], b: tuple[fx.Node, str], result: str) -> Product | None:
    (a, first), (b, second) = a, b
    batch = [label for label in first if label in second and label in result]
    depth = [label for label in first if label in second and label not in result]
    rows = [label for label in first if label not in second]
    columns = [label for label in second if label not in first]
    wanted = ([*batch, *rows, *depth], [*batch, *depth, *columns], [*batch, *rows, *columns])
    for term, labels in zip((first, second, result), wanted):
        if len(depth) != 1 or len(rows) != 1 or len(columns) != 1 or sorted(term) != sorted(labels):
            return None
    order = [wanted[2].index(label) for label in result]
    return Product(Operand(a, _order(first, wanted[0])), Operand(b, _order(second, wanted[1])), _unless_as_is(order))


def _order(term: str, labels: list[str]) -> list[int] | None:
    return _unless_as_is([term.index(label) for label in labels])


def _unless_as_is(order: list[int]) -> list[int] | None:
    return None if order == sorted(order) else order


def back(order: list[int]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]


def permuted(operand: Operand) -> fx.Node:
    node, order = operand
    if order is None:
        return node
    made = node.graph.call_method("permute", (node, order))
    made.meta["example_value"] = read.value(node).permute(order)
    return made
