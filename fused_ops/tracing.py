"""What a module's forward does, as a graph, without a trace of the tracing left in the module.

torch.fx follows the forward of a stand-in that shares the module's children. It follows one path; so anything that
could send a later call down another one, or that the graph would not repeat, ends the trace: a branch on a value, a
question for a value's type, an attribute that may change unseen, an attribute that is set, a printed value.
"""

import inspect
import linecache
import operator
import sys
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from fused_ops.conv import blocks

# What a graph may depend on: values that are compared before it runs again.
_CONSTANTS = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device, type)
_INTERNAL = {*vars(nn.Module())}
_LOOKS_AROUND = {
    "parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules", "children",
    "named_children", "state_dict", "register_buffer", "register_parameter", "add_module", "apply",
}  # fmt: skip


class Untraceable(Exception):
    """Why a forward cannot be repeated from a trace."""


def original(module: nn.Module) -> type:
    """A module's class before it was given a generated forward."""
    return getattr(type(module), "_fused_from", type(module))


def is_sequential(module: nn.Module) -> bool:
    """Whether calling it is calling its children one after the other."""
    return original(module).forward is nn.Sequential.forward and blocks.untouched(module)


def trace(module: nn.Module, *, training: bool, grad: bool) -> tuple[fx.Graph, dict[str, object]]:
    """The graph of a call with tensors for the arguments that have no default, and the constants of `module` it read.

    Every module called is a node; nn.Sequentials without a forward of their own are followed.

    Args:
        training: the mode that the forward sees; grad: whether gradients are enabled meanwhile.

    Raises:
        Untraceable: why the graph would not always do what the forward does.
    """
    read: dict[str, object] = {}
    try:
        with torch.set_grad_enabled(grad):
            return _Tracer().trace(_stand_in(module, training, read)), read
    except Untraceable:
        raise
    except fx.proxy.TraceError as error:
        raise Untraceable("its forward branches on a value or loops over one") from error
    except Exception as error:
        said = str(error).strip().split("\n")[0]
        raise Untraceable(f"its forward cannot be traced ({type(error).__name__}: {said})") from error


def compiled(graph: fx.Graph) -> Callable:
    """A graph as a function of (module, *tensors), whose source tracebacks show."""
    code = graph.python_code("self")
    return _function("forward", code.src, code.globals)


def _function(name: str, source: str, names: dict) -> Callable:
    file, names = f"<fused_ops trace {hash(source):x}>", dict(names)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names)
    return names[name]


def _stand_in(module: nn.Module, training: bool, read: dict[str, object]) -> nn.Module:
    """A module that behaves like `module`, shares its children, and notes in `read` what constants it is asked for."""
    kind = original(module)
    required = ", ".join(_required_arguments(kind))

    class StandIn(kind):
        traced = _function("traced", f"def traced(self, {required}):\n    return self.forward({required})\n", {})

        def __getattribute__(self, name):
            value = super().__getattribute__(name)
            if name in _INTERNAL or name == "traced" or (name.startswith("__") and name.endswith("__")):
                return value
            if name in _LOOKS_AROUND and _asked_by(2).startswith("torch.") is False:
                raise Untraceable(f"its forward calls self.{name}")
            if _constant(value):
                read[name] = value
            elif not (callable(value) or isinstance(value, Tensor)):
                raise Untraceable(f"its forward reads self.{name}, a {type(value).__name__} that may change unseen")
            return value

        def __setattr__(self, name, value):
            raise Untraceable(f"its forward sets self.{name}")

    stand_in = object.__new__(StandIn)
    vars(stand_in).update(vars(module), training=training)
    return stand_in


def _constant(value: object) -> bool:
    return isinstance(value, _CONSTANTS) or (isinstance(value, tuple) and all(map(_constant, value)))


def _required_arguments(kind: type) -> list[str]:
    """The arguments of a forward that have no default: the call that is traced has just these."""
    required = []
    for parameter in list(inspect.signature(kind.forward).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise Untraceable("its forward takes any number of arguments")
        if parameter.kind is parameter.VAR_KEYWORD or parameter.default is not parameter.empty:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise Untraceable(f"its forward needs the keyword {parameter.name}")
        required.append(parameter.name)
    return required


class _Proxy(fx.Proxy):
    """A value that is not there yet, and says so where only a real one could answer."""

    @property
    def __class__(self):
        if _asked_by(2).startswith(("torch.", __name__)):
            return _Proxy
        raise Untraceable("its forward asks for the type of a value")

    def __str__(self):
        raise Untraceable("its forward prints a value")

    def __format__(self, spec):
        raise Untraceable("its forward prints a value")


def _in_place(function: Callable) -> Callable:
    def method(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
for _name in IN_PLACE:  # torch.fx takes `x += y` for `x = x + y`
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


def _asked_by(depth: int) -> str:
    """The module whose code is `depth` calls up from the caller's caller."""
    return sys._getframe(depth).f_globals.get("__name__", "") + "."


class _Tracer(fx.Tracer):
    traced_func_name = "traced"

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_sequential(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)
