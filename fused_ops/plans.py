"""The generated forwards: a module's own calls, every chain as one op.

What a module's forward calls is read off a trace (`fused_ops.tracing`). A generated forward makes the same calls with
every chain (`fused_ops.chains`) as one op. It runs only while what was traced still holds: the same children and hooks,
the same values of what was read, evaluation, no gradient; otherwise the module's own does.
"""

import copyreg
from collections.abc import Iterable
from functools import wraps

import torch
from torch import Tensor, fx, nn

from fused_ops.chains import Chain, belongs_to, containers, find, sharded
from fused_ops.conv import blocks
from fused_ops.core import dispatch
from fused_ops.tracing import Untraceable, compiled, original, trace, unchanged, watched

_PLAN = "_fused_ops_plan"


class Plan:
    """How to run a module's forward with its chains as one op each, and when. Does not keep the module alive.

    Args:
        module: what was traced.
        chains: as `find` found them in `graph`, the trace of its evaluation; reads: what that asked modules for.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, chains: list[Chain], reads: dict):
        self.names = tuple(chain.name for chain in chains)
        self.arity = len([node for node in graph.nodes if node.op == "placeholder"])
        self.members = _called_in(module, [node for chain in chains for node in chain.nodes])
        self.norms = [part for part in self.members if isinstance(part, nn.BatchNorm2d)]
        self.forward = compiled(_rewritten(graph, chains))
        inside = [chain.norm for chain in chains if chain.norm is not None]
        acting = (*self.members, *(child for seen in inside for child in seen.parts[0].children()))
        depends = [(part, "inplace") for part in _called_in(module, graph.nodes)]
        depends += [(part, name) for part in acting for name in ("negative_slope", "approximate")]
        reads = reads | {(part, name): vars(part)[name] for part, name in depends if name in vars(part)}
        reads = reads | {place: value for seen in inside for place, value in seen.reads.items()}
        self.reads = [(None if part is module else part, name, value) for (part, name), value in reads.items()]

    def serves(self, module: nn.Module, args: tuple) -> bool:
        """Whether a call that `may_be_served` does what was traced."""
        if len(args) != self.arity:
            return False
        for norm in self.norms:
            if norm.training:
                return False
        for part, name, value in self.reads:
            if not unchanged(module if part is None else part, name, value):
                return False
        return not (torch.is_grad_enabled() and self._needs_grad(args))

    def _needs_grad(self, args: tuple) -> bool:
        for arg in args:
            if arg.requires_grad:
                return True
        for part in self.members:
            for param in part._parameters.values():
                if param is not None and param.requires_grad:
                    return True
        return False


def may_be_served(module: nn.Module, args: tuple) -> bool:
    """What can be said without a plan: plain tensors in evaluation, and nobody who wants to see the single calls."""
    if module.training or blocks.global_hooks() or torch._C._is_any_autocast_enabled():
        return False
    for arg in args:
        if type(arg) is not Tensor:
            return False
    return not (torch.jit.is_tracing() or torch.compiler.is_exporting())


def _called_in(module: nn.Module, nodes: Iterable[fx.Node]) -> tuple[nn.Module, ...]:
    return tuple(dict.fromkeys(module.get_submodule(node.target) for node in nodes if node.op == "call_module"))


def _rewritten(graph: fx.Graph, chains: list[Chain]) -> fx.Graph:
    """The graph with each chain as one call."""
    for chain in chains:
        last = chain.nodes[-1]
        with graph.inserting_after(last):
            one = graph.call_function(blocks.run_chain)
        with graph.inserting_before(one):
            conv, bn, pad = (node and graph.get_attr(node.target) for node in (chain.conv, chain.bn, chain.pad))
        last.replace_all_uses_with(one)
        source = chain.nodes[0].args[0]
        one.args = (conv, bn, source, chain.residual, chain.activation, pad, chain.residual_first)
        for node in reversed(chain.nodes):
            graph.erase_node(node)
    graph.lint()
    return graph


def plan(module: nn.Module) -> tuple[Plan | None, list[str], tuple[nn.Module, ...]]:
    """How `module` runs with its own chains as one op each (None: it has none), what looked like one and is not, and
    the modules whose children all this depends on."""
    holders = tuple(containers(module))
    parts = [child for part in holders for child in part._modules.values()]
    if any(sharded(part) for part in parts if part is not None):
        return None, ["sharded: fuse before fully_shard"], holders
    try:
        with watched():
            seen, other, training = (
                trace(module, training=mode, grad=grad) for mode, grad in ((False, False), (False, True), (True, True))
            )
    except Untraceable as reason:
        named = any(isinstance(part, nn.BatchNorm2d) for part in parts)
        return None, [str(reason)] if named else [], holders
    looked_at = tuple(dict.fromkeys((*holders, *seen.parts, *other.parts)))
    if str(other.graph) != str(seen.graph):
        return None, ["its forward does something else where gradients are wanted"], looked_at
    chains, refusals = find(seen.graph, module)
    refusals += _not_called(module, parts, (*seen.graph.nodes, *training.graph.nodes))
    looked_at += tuple(chain.norm.parts[0] for chain in chains if chain.norm is not None)
    here, there = (dict.fromkeys(chain.name for chain in found) for found in (chains, find(training.graph, module)[0]))
    refusals += [f"{name}: only in evaluation" for name in here if name not in there]
    refusals += [f"{name}: only in training" for name in there if name not in here]
    chains = [chain for chain in chains if chain.name in there]
    if not any(belongs_to(chain, module) for chain in chains):
        return None, [] if chains else refusals, looked_at
    return Plan(module, seen.graph, chains, other.reads | seen.reads), refusals, looked_at


def _not_called(module: nn.Module, parts: list[nn.Module | None], nodes: tuple[fx.Node, ...]) -> list[str]:
    """Of batch norms that may belong to a chain in another method than forward, that they are left alone."""
    left = {part for part in parts if isinstance(part, nn.BatchNorm2d)} - {*_called_in(module, nodes)}
    return [f"{path}: its forward does not call it" for path, part in module.named_modules() if part in left]


class FusedForward:
    """What `fused_class` puts before a class."""

    _fused_from: type

    def __init_subclass__(cls, **kwargs):
        """The classes below are told of subclasses that people write."""

    def __reduce_ex__(self, protocol):
        """As its own class would be: this one is generated, so that no file can name it."""
        build, args, *rest = super().__reduce_ex__(max(protocol, 2))
        return (_new, (self._fused_from,), *rest) if build is copyreg.__newobj__ else (build, args, *rest)


def _new(kind: type) -> nn.Module:
    fused = fused_class(kind)
    return fused.__new__(fused)


_CLASSES: dict[type, type] = {}


def fused_class(kind: type) -> type:
    """A subclass of `kind` that runs the plan of each instance where it serves the call."""
    if kind not in _CLASSES:

        @wraps(kind.forward)
        def forward(self, *args, **kwargs):
            sizes = None if kwargs else _sizes(args)
            if not kwargs and not _idle(self, sizes) and may_be_served(self, args):
                found = _plan_of(self)
                if found is not None and found.serves(self, args):
                    return _served(found, self, args, sizes)
            return kind.forward(self, *args, **kwargs)

        names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_fused_from": kind, "forward": forward}
        _CLASSES[kind] = type(kind)(f"Fused{kind.__name__}", (FusedForward, kind), names)
    return _CLASSES[kind]


def _sizes(args: tuple) -> tuple | None:
    """What decides which of a plan's chains a kernel serves: None where more does."""
    if not args or not dispatch.unwatched(args[0]):
        return None
    for arg in args:
        if type(arg) is not Tensor:
            return None
    return tuple([(arg.shape, arg.stride(), arg.dtype) for arg in args])


def _idle(module: nn.Module, sizes: tuple | None) -> bool:
    """Whether PyTorch's functions served all chains of a call of such sizes: the module's own forward is quicker."""
    seen = module.__dict__.get(_PLAN)
    return sizes is not None and seen is not None and seen.served.get(sizes) is False


def _served(found: Plan, module: nn.Module, args: tuple, sizes: tuple | None):
    """The generated forward; the first for its `sizes` is looked at, to know whether a kernel served any chain."""
    served = module.__dict__[_PLAN].served
    if sizes is None or sizes in served:
        return found.forward(module, *args)
    with dispatch.record() as choices:
        result = found.forward(module, *args)
    if len(served) == dispatch.MANY:
        served.clear()
    served[sizes] = any(choice.backend != "reference" for choice in choices)
    return result


class _Remembered:
    """A module's plan (None: it has none) while what it was made of holds. Copies and pickles of it are None.

    served: for arguments of such sizes, whether a kernel served any chain.
    """

    def __init__(self, module: nn.Module, found: Plan | None, parts: tuple[nn.Module, ...]):
        self.plan, self.owner, self.forward = found, id(module), original(module).forward
        self.served: dict[tuple, bool] = {}
        self.parts = [(None if part is module else part, dict(part._modules)) for part in parts]
        children = dict.fromkeys(child for part in parts for child in part._modules.values() if child is not None)
        self.kinds = [(child, type(child), blocks.untouched(child)) for child in children]

    def holds(self, module: nn.Module) -> bool:
        if original(module).forward is not self.forward:
            return False
        if id(module) != self.owner and "_is_replica" not in vars(module):  # DataParallel's copies live for one call
            return False
        for part, children in self.parts:
            if (module if part is None else part)._modules != children:
                return False
        for child, kind, untouched in self.kinds:
            if type(child) is not kind or blocks.untouched(child) is not untouched:
                return False
        return True

    def __reduce__(self):
        return type(None), ()


def _plan_of(module: nn.Module) -> Plan | None:
    """Its plan, made anew for a copy, and where its children or their hooks are others."""
    seen = vars(module).get(_PLAN)
    if seen is not None and seen.holds(module):
        return seen.plan
    if torch.compiler.is_compiling() or "_is_replica" in vars(module):
        return None
    found, _, parts = plan(module)
    remember(module, found, parts)
    return found


def remember(module: nn.Module, found: Plan | None, parts: tuple[nn.Module, ...]) -> None:
    vars(module)[_PLAN] = _Remembered(module, found, parts)


def members(module: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that its chains call."""
    found = _plan_of(module)
    return () if found is None else found.members


def detach(module: nn.Module) -> None:
    """Take its generated forward away again, if it has one."""
    if isinstance(module, FusedForward):
        plain = original(module)
        module.__class__ = without(type(module), _CLASSES[plain], plain)
        vars(module).pop(_PLAN, None)


def without(kind: type, ours: type, plain: type) -> type:
    """`kind` made of `plain` instead of `ours`: itself, or a class that parametrizations or FSDP derived from it."""
    if kind is ours or not issubclass(kind, ours):
        return plain if kind is ours else kind
    names = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, tuple(without(base, ours, plain) for base in kind.__bases__), names)
