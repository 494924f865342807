"""Reading the graphs that Dynamo captures: what a node calls and with what, what it may change, where it was written.

torch.fx's `normalize_function` knows neither methods nor Python's operators and gives up on overloads (`torch.where`,
`torch.add`, `torch.conv2d`), so the arguments of the calls that the patterns are made of are named here.
"""

import inspect
import operator
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fused_ops.core.dispatch import Explanation, explain
from fused_ops.core.errors import EXPLAINED


class Refused(Exception):
    """Why a pattern is left as it is."""


class Row(NamedTuple):
    """One pattern of a graph: where it was written, what it is, what it became (None: left alone), and why."""

    place: str
    pattern: str
    became: str | None
    reason: str


class Call(NamedTuple):
    """A call of one of torch's functions, methods or operators.

    name: torch's, without the underscore of a call that works in place; given: the arguments by name.
    """

    name: str
    given: dict[str, object]
    in_place: bool


_OPERATORS = {
    operator.add: "add", operator.iadd: "add_", operator.sub: "sub", operator.isub: "sub_", operator.mul: "mul",
    operator.imul: "mul_", operator.truediv: "div", operator.itruediv: "div_", operator.matmul: "matmul",
    operator.eq: "eq", operator.invert: "logical_not", operator.getitem: "getitem", operator.setitem: "setitem_",
    operator.imatmul: "matmul_", operator.ifloordiv: "floor_divide_", operator.imod: "remainder_",
    operator.ipow: "pow_", operator.iand: "bitwise_and_", operator.ior: "bitwise_or_", operator.ixor: "bitwise_xor_",
    operator.ilshift: "bitwise_left_shift_", operator.irshift: "bitwise_right_shift_",
}  # fmt: skip
_SYNONYMS = {"true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "bitwise_not": "logical_not"}
# Of functions and methods that Python cannot ask: the names of their arguments, in order.
_ARGUMENTS = {
    "add": "input other alpha",
    "sub": "input other alpha",
    "mul": "input other",
    "div": "input other rounding_mode",
    "eq": "input other",
    "matmul": "input other",
    "bmm": "input mat2",
    "softmax": "input dim dtype",
    "dropout": "input p training",
    "masked_fill": "input mask value",
    "where": "condition input other",
    "tril": "input diagonal",
    "triu": "input diagonal",
    "full": "size fill_value",
    "full_like": "input fill_value",
    "new_full": "input size fill_value",
    "tensor": "data",
    "scalar_tensor": "data",
    "conv2d": "input weight bias stride padding dilation groups",
}
_METHOD_ARGUMENTS = {"where": "input condition other"}
_RENAMED = {"train": "training", "tensor2": "other"}


@cache
def _names() -> dict[object, str]:
    """torch's functions and what they are called."""
    found = {}
    for namespace in (F, torch.special, torch.linalg, torch):
        for known, function in vars(namespace).items():
            if callable(function) and not isinstance(function, type) and not known.startswith("__"):
                found[function] = known
    return found | _OPERATORS


def name(node: fx.Node) -> str | None:
    """What torch calls the function, method or operator that a node calls; None: it is not torch's."""
    if node.op == "call_method" and not node.target.startswith("__"):
        return _SYNONYMS.get(node.target, node.target)
    found = _names().get(node.target) if node.op == "call_function" else None
    return _SYNONYMS.get(found, found)


def call(node: object) -> Call | None:
    """What a node calls, if it is torch's own."""
    found = name(node) if isinstance(node, fx.Node) else None
    if found is None:
        return None
    plain = found.removesuffix("_")
    if inspect.isfunction(node.target) and plain != "einsum":
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    else:
        names = _METHOD_ARGUMENTS.get(plain) if node.op == "call_method" else None
        names = (names or _ARGUMENTS.get(plain, "input")).split()
        given = dict(zip(names, node.args)) | node.kwargs
        if len(node.args) > len(names):
            given["further"] = node.args[len(names) :]
    given = {_RENAMED.get(key, key): argument for key, argument in given.items()}
    in_place = bool(given.pop("inplace", False)) or plain != found
    return Call(plain, given, in_place)


def value(node: object) -> Tensor | None:
    """The tensor Dynamo saw there; None where it saw none, or one with rules of its own (a subclass, under vmap)."""
    found = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return found if type(found) is FakeTensor else None


def tensor(node: object, what: str) -> Tensor:
    """The same, where there must be one."""
    found = value(node)
    if found is None:
        raise Refused(f"{what} is no plain tensor")
    return found


def only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


_CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "double")


def is_cast(node: fx.Node) -> bool:
    """Whether a node gives its input's values in some dtype, and nothing else."""
    called = call(node)
    if called is None or called.name not in _CASTS:
        return False
    before, after = value(called.given.get("input")), value(node)
    return before is not None and after is not None and same(before, after) and before.device == after.device


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two shapes are known to be equal, whatever their symbols stand for."""
    return a.dim() == b.dim() and all(equal(m, n) for m, n in zip(a.shape, b.shape))


def equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def hint(size: int | torch.SymInt | torch.SymFloat) -> int | float:
    """What a size is in the call that is being compiled; asking makes no guard."""
    if not isinstance(size, (torch.SymInt, torch.SymFloat)):
        return size
    found = size.node.hint
    if found is None:
        raise Refused("a size is decided by data")
    return found


def explained(function: Callable, args: tuple, kwargs: dict) -> Explanation:
    """Which backend will serve a call of one of this package's functions, at the sizes being compiled for."""
    with FakeTensorMode():
        args, kwargs = fx.node.map_arg((args, kwargs), _example)
    try:
        found = explain(function, *args, **kwargs)
    except EXPLAINED as error:
        raise Refused(str(error)) from error
    if found.chosen is None:
        raise Refused(reasons(found))
    return found


def reasons(found: Explanation) -> str:
    """Why this package's own kernels do not serve a call, those for other devices left out."""
    refused = [(name, reason) for name, verdict, reason in found.rows if verdict == "refused"]
    here = [(name, reason) for name, reason in refused if not reason.startswith("needs a tensor on")]
    return "; ".join(f"{name} {reason}" for name, reason in here or refused)


def _example(node: fx.Node) -> object:
    """A fake tensor of the sizes being compiled for: rules can be asked about it without a guard."""
    seen = node.meta.get("example_value")
    if isinstance(seen, (torch.SymInt, torch.SymFloat)):
        return hint(seen)
    seen = tensor(node, "an argument")
    size, strides = ([hint(n) for n in sizes] for sizes in (seen.shape, seen.stride()))
    made = torch.empty_strided(size, strides, dtype=seen.dtype, device=seen.device)
    return made.requires_grad_(seen.requires_grad)


def resolve_in_place(graph: fx.Graph) -> None:
    """Readers of a tensor that was written in place become readers of the call that wrote it, which returns it."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        called = call(node)
        if called is None or not called.in_place or value(node) is None or value(called.given.get("input")) is None:
            continue
        written = called.given["input"]
        for reader in list(written.users):
            if order[reader] > order[node] and reader.op != "output":
                reader.replace_input_with(written, node)


def writer_between(members: list[fx.Node]) -> fx.Node | None:
    """A node among `members`, but not of them, that may change a tensor."""
    order = {node: place for place, node in enumerate(members[0].graph.nodes)}
    node, last = min(members, key=order.get), max(members, key=order.get)
    while node is not last:
        if node not in members and _writes(node):
            return node
        node = node.next
    return None


def _writes(node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    called = call(node)
    if called is None:
        home = getattr(node.target, "__module__", None)
        arithmetic = isinstance(node.target, type) or home in ("_operator", "builtins", "math")
        return not arithmetic or described(node) in ("setattr", "delattr", "delitem", "iconcat")
    if called.name in ("batch_norm", "instance_norm"):
        return bool(called.given.get("training", called.given.get("use_input_stats", True)))
    return called.in_place or called.given.get("out") is not None


def refuse_writers(members: list[fx.Node]) -> None:
    writer = writer_between(members)
    if writer is not None:
        raise Refused(f"{described(writer)} within it may change a tensor")


def replace(members: list[fx.Node], made: fx.Node) -> None:
    """Let `made` stand for the last of `members`, which nothing else reads."""
    last = members[-1]
    made.meta = {
        key: seen for key, seen in last.meta.items() if key in ("example_value", "nn_module_stack", "stack_trace")
    }
    last.replace_all_uses_with(made)
    for node in reversed(members):
        last.graph.erase_node(node)


def described(node: fx.Node) -> str:
    called = call(node)
    if called is not None:
        return called.name + ("_" if called.in_place else "")
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def place(node: fx.Node) -> str:
    """The module that made the call and the line it stands in, as far as Dynamo kept them."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    names = re.findall(r"\w+", stack[-1][0].replace("_modules", "")) if stack else []  # L['self']._modules['0'].norm
    path = ".".join(names[2:])
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    line = ":".join((frames[-1][0].rsplit("/", 1)[-1], frames[-1][1])) if frames else ""
    return " ".join(filter(None, (path, f"({line})" if path and line else line)))
