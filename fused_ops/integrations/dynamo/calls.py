"""Chains of a convolution and calls of torch's functions, found in a graph of Dynamo's and run by this package's ops.

A chain is conv2d → batch_norm in evaluation [→ + residual] [→ activation], each the only reader of the one before. A
rewrite is made where `auto` has a kernel of this package's own for the call: where it would run PyTorch's, a compiler
does at least as well with what is written.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, fx

from fused_ops.attention.functional import scaled_dot_product_attention
from fused_ops.conv.functional import conv1d, conv2d, conv_bn_act2d
from fused_ops.integrations.dynamo import graph as read
from fused_ops.integrations.dynamo.graph import Call, Refused, Row, call
from fused_ops.rnn import functional as rnn

_SEQUENCES = (rnn.rnn_tanh, rnn.rnn_relu, rnn.gru, rnn.lstm)
_CELLS = (rnn.rnn_tanh_cell, rnn.rnn_relu_cell, rnn.gru_cell, rnn.lstm_cell)
# Called as torch's functions of the same name are, with the same arguments in the same order.
_TWINS = {twin.__name__: twin for twin in (scaled_dot_product_attention, conv1d, conv2d, *_SEQUENCES, *_CELLS)}
_GEOMETRY = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def rewrite(graph: fx.Graph) -> Iterator[Row]:
    """Rewrite the chains and calls of a graph that are proven and worth it; a row for each, and for what is left."""
    refused = set()
    for node in list(graph.nodes):
        called = call(node)
        norm = next((reader for reader in node.users if read.name(reader) == "batch_norm"), None)
        if called is not None and called.name == "conv2d" and norm is not None:
            row = _rewritten_chain(node, norm)
            refused |= {node} if row.became is None else set()
            yield row
    for node in list(graph.nodes):
        if node.op == "call_function" and read.name(node) in _TWINS:
            row = _rewritten_call(node, _TWINS[read.name(node)])
            if row.became is not None or node not in refused:
                yield row


def _rewritten_chain(conv: fx.Node, norm: fx.Node) -> Row:
    place, pattern = read.place(conv), "conv2d + batch_norm"
    try:
        members, residual, activation = _chain(conv, norm)
        pattern = " + ".join(map(read.described, members))
        args = _arguments(call(conv), call(norm), residual, activation)
        backend = _own_backend(conv_bn_act2d, args, {})
    except Refused as reason:
        return Row(place, pattern, None, str(reason))
    with conv.graph.inserting_before(members[-1]):
        made = conv.graph.call_function(convolve, args)
    read.replace(members, made)
    return Row(place, pattern, "conv_bn_act2d", f"runs on {backend}")


def convolve(input: Tensor, *call) -> Tensor:
    """`conv_bn_act2d`. Where sizes are symbols, rules go by those being compiled for, and no guard comes of it.

    All that a result may depend on was asked, and guarded, when Dynamo ran the convolution itself.
    """
    symbol = next((size for size in input.shape if isinstance(size, torch.SymInt)), None)
    with nullcontext() if symbol is None else symbol.node.shape_env.suppress_guards():
        return conv_bn_act2d(input, *call)


def _chain(conv: fx.Node, norm: fx.Node) -> tuple[list[fx.Node], fx.Node | None, str | None]:
    """(nodes in the order they run, what is added, the activation): the longest without a writer within it."""
    if len(conv.users) > 1:
        raise Refused("the convolution's result is read elsewhere too")
    if call(norm).given.get("training", False):
        raise Refused("its batch norm is in training")
    members, residual, activation = [conv, norm], None, None
    reader = _only_reader(norm)
    if reader is not None and (residual := _added(norm, reader)) is not None:
        members.append(reader)
        reader = _only_reader(reader)
    if reader is not None and (activation := _activation(reader)) is not None:
        members.append(reader)
    while len(members) > 2 and read.writer_between(members) is not None:
        residual, activation = (residual, None) if activation is not None else (None, None)
        members.pop()
    read.refuse_writers(members)
    return members, residual, activation


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads another's result, if it keeps its shape and dtype."""
    reader, before = read.only_reader(node), read.value(node)
    after = read.value(reader)
    kept = None not in (before, after) and after.dtype == before.dtype and read.same(before, after)
    return reader if kept else None


def _added(result: fx.Node, node: fx.Node) -> fx.Node | None:
    """What `node` adds to `result`, if that is all it does; `a += result` changes a, which is more."""
    called = call(node)
    if called is None or called.name != "add" or set(called.given) != {"input", "other"}:
        return None
    a, b = called.given["input"], called.given["other"]
    residual = b if a is result else a
    if residual is result or (called.in_place and residual is a) or read.value(residual) is None:
        return None
    return residual if read.value(residual).dtype == read.value(result).dtype else None


def _activation(node: fx.Node) -> str | None:
    called = call(node)
    settings = {} if called is None else {key: given for key, given in called.given.items() if key != "input"}
    match called and called.name:
        case "relu" | "relu6" | "silu" | "tanh" | "sigmoid" | "hardswish" as name if not settings:
            return name
        case "gelu":
            return {"none": "gelu", "tanh": "gelu_tanh"}[settings.get("approximate", "none")]
        case "leaky_relu" if settings.get("negative_slope", 0.01) == 0.01:
            return "leaky_relu"
        case "hardtanh" if settings == {"min_val": 0, "max_val": 6}:  # what nn.ReLU6 calls
            return "relu6"
    return None


def _arguments(conv: Call, norm: Call, residual: fx.Node | None, activation: str | None) -> tuple:
    image, weight, result = conv.given["input"], conv.given["weight"], norm.given["input"]
    if len({read.tensor(node, "what it convolves").dtype for node in (image, weight, result)}) > 1:
        raise Refused("autocast changes its dtype")
    geometry, given = (conv.given.get(name, default) for name, default in _GEOMETRY.items()), norm.given.get
    return (
        image, weight, conv.given.get("bias"), *geometry, given("running_mean"), given("running_var"), given("weight"),
        given("bias"), given("eps", 1e-5), residual, activation,
    )  # fmt: skip


def _rewritten_call(node: fx.Node, twin: Callable) -> Row:
    place, pattern = read.place(node), f"torch's {twin.__name__}"
    try:
        _check_dtype(node)
        backend = _own_backend(twin, node.args, node.kwargs)
    except Refused as reason:
        return Row(place, pattern, None, str(reason))
    node.target = twin
    return Row(place, pattern, twin.__name__, f"runs on {backend}")


def _check_dtype(node: fx.Node) -> None:
    result, first = node.meta.get("example_value"), next(iter((*node.args, *node.kwargs.values())))
    result = result if isinstance(result, Tensor) else result[0]
    if result.dtype != read.tensor(first, "its input").dtype:
        raise Refused("autocast changes its dtype")


def _own_backend(function: Callable, args: tuple, kwargs: dict) -> str:
    """The backend that will serve a call, other than PyTorch's own."""
    found = read.explained(function, args, kwargs)
    if found.chosen == "reference":
        raise Refused(read.reasons(found))
    return found.chosen
