"""Chains: convolutions inside modules somebody else wrote that are one op with what follows them.

A chain is [ZeroPad2d →] Conv2d [→ BatchNorm2d] [→ + residual] [→ activation], of two links at least, each the only
reader of the one before but for nn.Identity. A subclass of BatchNorm2d counts if its own forward is traced to be a
batch norm, alone or with the activation. A chain belongs to the smallest module whose forward, its nn.Sequentials and
what has no forward included, makes all of the chain's calls.
"""

import inspect
import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_ops.conv import blocks
from fused_ops.tracing import IN_PLACE, Trace, Untraceable, is_sequential, original, trace

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CHANGES_THE_FIRST = {operator.iadd, "add_"}
_FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", F.relu6: "relu6", F.silu: "silu",
    F.hardswish: "hardswish", torch.tanh: "tanh", F.tanh: "tanh", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid",
    F.gelu: "gelu", F.leaky_relu: "leaky_relu",
}  # fmt: skip
_METHODS = {
    "relu": "relu", "relu_": "relu", "tanh": "tanh", "tanh_": "tanh", "sigmoid": "sigmoid", "sigmoid_": "sigmoid",
}  # fmt: skip


class Chain(NamedTuple):
    """The nodes of a trace that are one op, in the order they run."""

    nodes: tuple[fx.Node, ...]
    conv: fx.Node
    pad: fx.Node | None = None
    bn: fx.Node | None = None
    add: fx.Node | None = None
    activation: str | None = None
    norm: Trace | None = None  # of the forward of a batch norm of somebody's

    @property
    def residual(self) -> fx.Node | None:
        """What `add` adds."""
        if self.add is None:
            return None
        a, b = self.add.args
        return a if self.residual_first else b

    @property
    def residual_first(self) -> bool:
        return self.add is not None and self.add.args[0] not in self.nodes

    @property
    def name(self) -> str:
        return "+".join(_name(node) for node in self.nodes)


def belongs_to(chain: Chain, module: nn.Module) -> bool:
    """Whether `module`, whose trace it is of, is the smallest with a forward that makes all of its calls."""
    paths = [node.target.split(".")[:-1] if node.op == "call_module" else [] for node in chain.nodes]
    for names in zip(*paths):
        if len(set(names)) > 1:
            break
        module = getattr(module, names[0])
        if not _has_no_forward(module):
            return False
    return True


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else node.target.__name__


def find(graph: fx.Graph, module: nn.Module) -> tuple[list[Chain], list[str]]:
    """The chains of a trace of `module`, and for convolutions that look like the start of one why they are not.

    nn.Identities without hooks are taken out of `graph`.
    """
    chains, refusals, taken = [], [], set()
    _skip_identities(graph, module)
    for node in graph.nodes:
        conv = _called(node, module)
        if conv is None or not blocks.plain_convolution(conv):
            continue
        whole = chain = _chain(node, conv, module, taken)
        while len(chain.nodes) > 1 and _hazard(chain, module):
            chain = _without_last(chain)
        if len(chain.nodes) > 1:
            chains.append(chain)
            taken.update(chain.nodes)
        elif chain is not whole:
            refusals.append(f"{whole.name}: {_hazard(whole, module)}")
        elif len(node.users) > 1 and any(isinstance(_called(user, module), nn.BatchNorm2d) for user in node.users):
            refusals.append(f"{node.target}: its result has a second reader")
        elif isinstance(bn := _called(_only_reader(node), module), nn.BatchNorm2d) and type(bn) is not nn.BatchNorm2d:
            refusals.append(f"{node.target}: a {type(bn).__name__} follows, which is more than a BatchNorm2d")
    return chains, refusals


def _skip_identities(graph: fx.Graph, module: nn.Module) -> None:
    for node in graph.nodes:
        called = _called(node, module)
        if type(called) is nn.Identity and blocks.untouched(called) and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _chain(node: fx.Node, conv: nn.Conv2d, module: nn.Module, taken: set[fx.Node]) -> Chain:
    """The longest that begins with `conv` and has nothing of another."""
    chain = Chain((node,), node)

    def following() -> fx.Node | None:
        found = _only_reader(chain.nodes[-1])
        return None if found in taken else found

    bn, before = following(), node.args[0]
    called = _called(bn, module)
    if called is not None and blocks.normalises(called, conv) and (after := _after_norm(called)) is not None:
        chain = chain._replace(nodes=(node, bn), bn=bn, activation=after[0], norm=after[1])
        pad = _called(before, module)
        if pad is not None and len(before.users) == 1 and blocks.pads(pad, conv):
            chain = chain._replace(nodes=(before, node, bn), pad=before)
    if chain.activation is not None:
        return chain
    add = following()
    if chain.pad is None and not isinstance(conv.padding, str) and _adds_to(chain.nodes[-1], add):
        chain = chain._replace(nodes=(*chain.nodes, add), add=add)
    last = following()
    if (activation := _activation(last, module)) is not None:
        chain = chain._replace(nodes=(*chain.nodes, last), activation=activation)
    return chain


def _after_norm(bn: nn.BatchNorm2d) -> tuple[str | None, Trace | None] | None:
    """The activation, if any, that ends a forward that begins as BatchNorm2d's, and the trace that shows it.

    Of BatchNorm2d itself (None, None); None for a class that does anything else.
    """
    if type(bn) is nn.BatchNorm2d:
        return None, None
    try:
        seen = trace(bn, training=False, grad=False, ndim=4)
    except Untraceable:
        return None
    _skip_identities(seen.graph, bn)
    image, *nodes, end = [node for node in seen.graph.nodes if node.op != "get_attr"]
    if not nodes or nodes[0].target is not F.batch_norm or len(nodes) > 2 or end.args[0] is not nodes[-1]:
        return None
    given = inspect.signature(F.batch_norm).bind(*nodes[0].args, **nodes[0].kwargs).arguments
    own = [getattr(given.get(name), "target", None) for name in ("running_mean", "running_var", "weight", "bias")]
    held = [None if getattr(bn, name) is None else name for name in ("running_mean", "running_var", "weight", "bias")]
    if given["input"] is not image or own != held or given.get("training") or given.get("eps", 1e-5) != bn.eps:
        return None
    if len(nodes) == 1:
        return None, seen
    activation = _activation(nodes[1], bn) if nodes[1].all_input_nodes == [nodes[0]] else None
    return None if activation is None else (activation, seen)


def _without_last(chain: Chain) -> Chain:
    last = chain.nodes[-1]
    if last is chain.bn:  # the padding goes into the convolution for the batch norm's sake
        return Chain((chain.conv,), chain.conv)
    return chain._replace(nodes=chain.nodes[:-1], add=None if last is chain.add else chain.add, activation=None)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _called(node: object, module: nn.Module) -> nn.Module | None:
    """The module that a node calls with one argument."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return module.get_submodule(node.target)


def _adds_to(value: fx.Node, node: fx.Node | None) -> bool:
    """Whether all that `node` does is add another value; `a += value` changes a, which is more."""
    if node is None or node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs:
        return False
    a, b = node.args
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return False
    return a is value or node.target not in _CHANGES_THE_FIRST


def _activation(node: fx.Node | None, module: nn.Module) -> str | None:
    if node is None:
        return None
    if node.op == "call_module":
        called = _called(node, module)
        return None if called is None else blocks.activation_of(called)
    name = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {}).get(node.target)
    settings = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if len(node.args) > (2 if name in ("relu", "relu6") and node.op == "call_function" else 1):
        return None
    if name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(settings.pop("approximate", "none"))
    if name == "leaky_relu" and settings.get("negative_slope") == 0.01:
        del settings["negative_slope"]
    return None if settings else name


def _hazard(chain: Chain, module: nn.Module) -> str | None:
    """Why the chain's calls may not all move to where its last one is."""
    if any(len(node.users) != 1 for node in chain.nodes[:-1]):
        return "a result inside it has a second reader"
    nodes = list(chain.conv.graph.nodes)
    source = _memory([chain.nodes[0].args[0]], module)
    for node in nodes[nodes.index(chain.nodes[0]) : nodes.index(chain.nodes[-1])]:
        if node in chain.nodes:
            continue
        if _writes(node, module) or (_unknown(node, module) and source & _memory(node.all_input_nodes, module)):
            return f"{_name(node)} may change a value it reads"
    return None


def _memory(nodes: list[fx.Node], module: nn.Module) -> set[fx.Node | str]:
    """What the values of nodes may share memory with, down to layers that always make new memory and to arguments."""
    found, waiting = set(), list(nodes)
    while waiting:
        node = waiting.pop()
        layer = node.op == "call_module" and isinstance(module.get_submodule(node.target), _MAKE_NEW_MEMORY)
        inputs = [] if layer and not _unknown(node, module) else node.all_input_nodes
        waiting += inputs
        if not inputs:
            found.add("the arguments" if node.op == "placeholder" else node)
    return found


_MAKE_NEW_MEMORY = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear)


def _writes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node changes what it is given."""
    if node.kwargs.get("inplace") or "out" in node.kwargs or any(arg is True for arg in node.args):
        return True
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(node.target), "inplace", False))
    name = _name(node) if node.op in ("call_method", "call_function") else ""
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _unknown(node: fx.Node, module: nn.Module) -> bool:
    """Whether what a node calls is neither torch's nor Python's own."""
    if node.op == "call_module":
        return not type(module.get_submodule(node.target)).__module__.startswith(("torch.nn.", "fused_ops."))
    if node.op != "call_function":
        return False
    home = getattr(node.target, "__module__", None) or ""
    return not f"{home}.".startswith(("torch.", "_operator.", "builtins.")) or home.startswith("torch._ops.")


def containers(module: nn.Module) -> Iterator[nn.Module]:
    """The module, and below it every child that only holds others."""
    yield module
    for child in module._modules.values():
        if child is not None and (_has_no_forward(child) or is_sequential(child)):
            yield from containers(child)


def _has_no_forward(module: nn.Module) -> bool:
    return original(module).forward is nn.Module.forward


def has_candidates(module: nn.Module) -> bool:
    """Whether `module` calls convolutions by itself or through modules that only hold others."""
    parts = [child for part in containers(module) for child in part._modules.values()]
    return not _has_no_forward(module) and any(child is not None and blocks.plain_convolution(child) for child in parts)


def sharded(module: nn.Module) -> bool:
    """Whether parameters of its own are spread over processes (FSDP, tensor parallelism)."""
    return any(hasattr(param, "placements") for param in module.parameters(recurse=False))
