"""Chains inside modules somebody else wrote, run as one op in evaluation.

A chain is [ZeroPad2d →] Conv2d [→ BatchNorm2d] [→ + residual] [→ activation], of two links at least, each the only
reader of the one before. What a module's forward calls is read off a trace (`fused_ops.tracing`), and a generated
forward makes the same calls with every chain as one op. It runs only while what was traced still holds: the same
children and hooks, the same constants, evaluation, no gradient; otherwise the module's own forward does.

A chain belongs to the smallest module whose forward, its nn.Sequentials included, makes all of the chain's calls.
"""

import operator
from collections.abc import Iterator
from functools import wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fused_ops.conv import blocks
from fused_ops.tracing import IN_PLACE, Untraceable, compiled, is_sequential, original, trace

_PLAN = "_fused_ops_plan"
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

    @property
    def residual(self) -> fx.Node | None:
        """What `add` adds."""
        if self.add is None:
            return None
        a, b = self.add.args
        return b if a in self.nodes else a

    @property
    def name(self) -> str:
        return "+".join(_name(node) for node in self.nodes)

    @property
    def owner(self) -> tuple[str, ...]:
        """Where the smallest module is that makes all of its calls."""
        paths = [node.target.split(".")[:-1] if node.op == "call_module" else [] for node in self.nodes]
        return tuple(_shared_beginning(paths))


def _shared_beginning(paths: list[list[str]]) -> Iterator[str]:
    for names in zip(*paths):
        if len(set(names)) > 1:
            return
        yield names[0]


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else node.target.__name__


class Plan:
    """How to run a module's forward with its chains as one op each, and when.

    Args:
        module: what was traced.
        chains: as `find` found them in `graph`, the trace of its evaluation; constants: what the trace read.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, chains: list[Chain], constants: dict[str, object]):
        self.names = tuple(chain.name for chain in chains)
        self.arity = len([node for node in graph.nodes if node.op == "placeholder"])
        self.constants = tuple(constants.items())
        called = [node for chain in chains for node in chain.nodes if node.op == "call_module"]
        self.members = tuple(dict.fromkeys(module.get_submodule(node.target) for node in called))
        self.activations = tuple(_activations(chains, module))
        self.forward = compiled(_rewritten(graph, chains))

    def serves(self, module: nn.Module, args: tuple, kwargs: dict) -> bool:
        """Whether a call does what was traced."""
        if kwargs or len(args) != self.arity or module.training or blocks.global_hooks():
            return False
        for arg in args:
            if type(arg) is not Tensor:
                return False
        for part, activation in self.activations:
            if blocks.activation_of(part) != activation:
                return False
        for name, value in self.constants:
            if getattr(module, name) != value:
                return False
        return not (torch.is_grad_enabled() and self._needs_grad(args))

    def _needs_grad(self, args: tuple) -> bool:
        tensors = (*args, *(param for part in self.members for param in part.parameters(recurse=False)))
        return any([tensor.requires_grad for tensor in tensors])


def _containers(module: nn.Module) -> Iterator[nn.Module]:
    """The module, and below it every child that only holds others."""
    yield module
    for child in module._modules.values():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or (child is not None and is_sequential(child)):
            yield from _containers(child)


def _content(part: nn.Module) -> tuple:
    """What a trace of a container's owner depends on: its children, and which of its tensors are there."""
    children = [
        (name, id(child), type(child), child is None or blocks.untouched(child))
        for name, child in part._modules.items()
    ]
    return *children, *[(name, param is None) for name, param in part._parameters.items()]


def _activations(chains: list[Chain], module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for chain in chains:
        if chain.activation and chain.nodes[-1].op == "call_module":
            yield module.get_submodule(chain.nodes[-1].target), chain.activation


def _rewritten(graph: fx.Graph, chains: list[Chain]) -> fx.Graph:
    """The graph with each chain as one call."""
    for chain in chains:
        last = chain.nodes[-1]
        with graph.inserting_after(last):
            one = graph.call_function(blocks.run_chain)
        with graph.inserting_before(one):
            conv, bn, pad = (
                node and graph.get_attr(node.target) for node in (chain.conv, chain.bn, chain.pad)
            )  # fmt: skip
        last.replace_all_uses_with(one)
        one.args = (conv, bn, chain.nodes[0].args[0], chain.residual, chain.activation, pad)
        for node in reversed(chain.nodes):
            graph.erase_node(node)
    graph.lint()
    return graph


def find(graph: fx.Graph, module: nn.Module) -> tuple[list[Chain], list[str]]:
    """The chains of a trace of `module`, and for convolutions that look like the start of one why they are not."""
    chains, refusals, taken = [], [], set()
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
    return chains, refusals


def _chain(node: fx.Node, conv: nn.Conv2d, module: nn.Module, taken: set[fx.Node]) -> Chain:
    """The longest that begins with `conv` and has nothing of another."""
    chain = Chain((node,), node)

    def following() -> fx.Node | None:
        found = _only_reader(chain.nodes[-1])
        return None if found in taken else found

    bn, before = following(), node.args[0]
    if isinstance(called := _called(bn, module), nn.Module) and blocks.follows(conv, called, in_any_mode=True):
        chain = chain._replace(nodes=(node, bn), bn=bn)
        pad = _called(before, module)
        if pad is not None and len(before.users) == 1 and blocks.pads(pad, conv):
            chain = chain._replace(nodes=(before, node, bn), pad=before)
    add = following()
    if chain.pad is None and not isinstance(conv.padding, str) and _adds_to(chain.nodes[-1], add):
        chain = chain._replace(nodes=(*chain.nodes, add), add=add)
    last = following()
    if (activation := _activation(last, module)) is not None:
        chain = chain._replace(nodes=(*chain.nodes, last), activation=activation)
    return chain


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
    source, between = chain.nodes[0].args[0], False
    for node in chain.conv.graph.nodes:
        if node is chain.nodes[0]:
            between = True
        elif node is chain.nodes[-1]:
            return None
        elif not between or node in chain.nodes:
            continue
        elif _writes(node, module) or (source in node.all_input_nodes and _unknown(node, module)):
            return f"{_name(node)} may change a value it reads"
    return None


def _writes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node changes what it is given."""
    if node.kwargs.get("inplace") or "out" in node.kwargs or any(arg is True for arg in node.args):
        return True
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(node.target), "inplace", False))
    name = _name(node) if node.op in ("call_method", "call_function") else ""
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _unknown(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node calls a module that is not torch's own."""
    if node.op != "call_module":
        return False
    return not type(module.get_submodule(node.target)).__module__.startswith(("torch.nn.", "fused_ops."))


def has_candidates(module: nn.Module) -> bool:
    """Whether `module` calls convolutions by itself or through its nn.Sequentials."""
    parts = [child for part in _containers(module) for child in part._modules.values()]
    return any(child is not None and blocks.plain_convolution(child) for child in parts)


def sharded(module: nn.Module) -> bool:
    """Whether parameters of its own are spread over processes (FSDP, tensor parallelism)."""
    return any(hasattr(param, "placements") for param in module.parameters(recurse=False))


def plan(module: nn.Module) -> tuple[Plan | None, list[str]]:
    """How `module` runs with its own chains as one op each (None: it has none), and what looked like one and is not."""
    parts = [child for part in _containers(module) for child in part._modules.values()]
    if any(sharded(part) for part in parts if part is not None):
        return None, ["sharded: fuse before fully_shard"]
    try:
        (graph, constants), (other, _), (training, _) = (
            trace(module, training=mode, grad=grad) for mode, grad in ((False, False), (False, True), (True, True))
        )
    except Untraceable as reason:
        named = any(isinstance(part, nn.BatchNorm2d) for part in parts)
        return None, [str(reason)] if named else []
    chains, refusals = find(graph, module)
    if str(other) != str(graph):
        return None, ["its forward does something else where gradients are wanted"]
    always = {chain.name for chain in find(training, module)[0]}
    refusals += [f"{chain.name}: only in evaluation" for chain in chains if chain.name not in always]
    chains = [chain for chain in chains if chain.name in always]
    own = any(chain.owner == () for chain in chains)
    return Plan(module, graph, chains, constants) if own else None, refusals if own or not chains else []


class FusedForward:
    """What `fused_class` puts before a class."""

    _fused_from: type

    def __reduce_ex__(self, protocol):
        """As its own class would be; the plan is made again from what comes out of the copy or the file."""
        _, _, state, *rest = super().__reduce_ex__(protocol)
        state = {name: value for name, value in state.items() if name != _PLAN}
        return _new, (self._fused_from,), state, *rest


def _new(kind: type) -> nn.Module:
    fused = fused_class(kind)
    return fused.__new__(fused)


_CLASSES: dict[type, type] = {}


def fused_class(kind: type) -> type:
    """A subclass of `kind` that runs the plan of each instance where it serves the call."""
    if kind not in _CLASSES:
        own = kind.forward

        @wraps(own)
        def forward(self, *args, **kwargs):
            found = _plan_of(self)
            if found is not None and found.serves(self, args, kwargs):
                return found.forward(self, *args)
            return own(self, *args, **kwargs)

        names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_fused_from": kind, "forward": forward}
        _CLASSES[kind] = type(f"Fused{kind.__name__}", (FusedForward, kind), names)
    return _CLASSES[kind]


def _plan_of(module: nn.Module) -> Plan | None:
    """Its plan, made anew for a copy, and where its children or their hooks are others."""
    seen, found = vars(module).get(_PLAN, (None, None))
    if seen is not None and all([_content(part) == content for part, content in seen]):
        return found
    if torch.compiler.is_compiling():
        return None
    return _keep(module, plan(module)[0])


def _keep(module: nn.Module, found: Plan | None) -> Plan | None:
    vars(module)[_PLAN] = tuple((part, _content(part)) for part in _containers(module)), found
    return found


def attach(module: nn.Module, found: Plan) -> type:
    """Give `module` its generated forward; returns its new class."""
    module.__class__ = fused_class(type(module))
    _keep(module, found)
    return type(module)


def members(module: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that its chains call."""
    found = _plan_of(module)
    return () if found is None else found.members


def detach(module: nn.Module) -> None:
    """Take it away again, if there is one."""
    if isinstance(module, FusedForward):
        module.__class__ = original(module)
        vars(module).pop(_PLAN, None)
