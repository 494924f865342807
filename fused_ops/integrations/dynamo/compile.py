"""`torch.compile(model, backend="fused_ops")`: patterns of the captured graph run on this package's ops.

The graph is rewritten as Dynamo captured it, before AOTAutograd, which then traces through the ops like through any
other code: training, functionalisation and symbolic sizes need nothing of their own. Whatever is not proven to give
the same numbers is left alone, and on a CPU what is not measured to be at least as fast.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import fx

from fused_ops.core.errors import ArgumentError
from fused_ops.integrations.dynamo import attention, calls
from fused_ops.integrations.dynamo.graph import Row, resolve_in_place

logger = logging.getLogger(__package__)

_CHECKPOINT = "tag_activation_checkpoint"
_recordings: list[list["Listing"]] = []


class Listing(tuple):
    """The rows of one compiled graph: (place, pattern, became, reason), `became` None where it was left alone."""

    def __str__(self) -> str:
        if not self:
            return "nothing to rewrite"
        cells = [("where", "found", "is", "why"), *((*row[:2], row.became or "left alone", row.reason) for row in self)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)

    __repr__ = __str__

    @property
    def rewritten(self) -> list[Row]:
        return [row for row in self if row.became is not None]


def backend(
    gm: fx.GraphModule, example_inputs: list, *, mode: str | None = None, options: dict[str, object] | None = None
) -> Callable:
    """What `torch.compile(model, backend="fused_ops", mode=..., options=...)` calls with each graph Dynamo captures.

    Rewritten are attention written by hand, conv2d + batch_norm [+ residual] [+ activation] in evaluation, and torch's
    own attention, convolutions, recurrent functions and cells where a kernel of this package serves them. What became
    of each is logged at INFO to "fused_ops.integrations.dynamo" (TORCH_LOGS=fused_ops.integrations.dynamo), and kept by
    `record`. Whether a rewrite pays is judged at the sizes being compiled for, without a guard on them; a `use_backend`
    counts around the call that compiles.

    Args:
        mode: for the compiler that follows.
        options: `then`, the backend that compiles the rewritten graph, by name or as a callable: default "inductor", or
            "eager" where there is no C++ compiler for it. The others are for that backend.

    Raises:
        ArgumentError: `then` is this backend.
    """
    options = dict(options or {})
    then = options.pop("then", None) or _default()
    if then in ("fused_ops", backend):
        raise ArgumentError('options["then"]', "another backend than fused_ops", repr(then))
    follow = _follower(then, mode, options)
    with _compiling():
        listing = rewrite(gm)
        compiled = follow(gm, example_inputs)
    for recording in _recordings:
        recording.append(listing)
    if listing:
        logger.info("a graph, handed on to %s:\n%s", then, listing)
    return compiled


def rewrite(gm: fx.GraphModule) -> Listing:
    """Rewrite a graph of Dynamo's in place, and those of its checkpointed parts."""
    rows: list[Row] = []
    for module in _parts(gm):
        graph = module.graph
        if any(_is_functorch(node) for node in graph.nodes):
            rows.append(Row("", "the graph", None, "it runs under a transform of torch.func"))
            continue
        resolve_in_place(graph)
        enables = any(node.target is torch._C._set_grad_enabled and node.args == (True,) for node in graph.nodes)
        with torch.set_grad_enabled(torch.is_grad_enabled() or enables):
            rows += [*attention.rewrite(graph), *calls.rewrite(graph)]
        module.recompile()
    return Listing(rows)


def _parts(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    yield gm
    for node in gm.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == _CHECKPOINT:
            yield from _parts(gm.get_submodule(node.args[0].target))


def _is_functorch(node: fx.Node) -> bool:
    """Whether a node enters or leaves a transform, within which tensors are not what they seem."""
    return "functorch" in (getattr(node.target, "__module__", None) or "")


def _follower(then: str | Callable, mode: str | None, options: dict[str, object]) -> Callable:
    if then == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, dynamic=None)
    from torch._dynamo import lookup_backend

    given = {name: setting for name, setting in (("mode", mode), ("options", options)) if setting}
    follow = lookup_backend(then)
    return lambda gm, example_inputs: follow(gm, example_inputs, **given)


def _default() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        logger.info("no C++ compiler for inductor: what is rewritten runs eagerly")
        return "eager"
    return "inductor"


@contextmanager
def _compiling():
    """`torch.compiler.is_compiling()` for what traces a graph after Dynamo: rules then make no guard on a size."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@contextmanager
def record() -> Iterator[list[Listing]]:
    """Within the block, collect the `Listing` of every graph compiled: `with record() as listings: model(x)`."""
    listings: list[Listing] = []
    _recordings.append(listings)
    try:
        yield listings
    finally:
        _recordings[:] = [other for other in _recordings if other is not listings]
