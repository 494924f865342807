"""What a module's forward does, as a graph, without a trace of the tracing left in the module.

torch.fx's proxies stand for the values. They follow one path; so anything that could send a later call down another
one, or that the graph would not repeat, ends the trace: a branch on a value, a question for a value's type, a value
printed or kept, an attribute that is set or may change unseen, a tensor made of nothing, a random number, a mode that
is switched. What the forward reads of modules, its own or others, is noted, to be compared before the graph runs again.
"""

import dis
import gc
import inspect
import linecache
import operator
import pickle
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fused_ops.conv import blocks

# What may be read: values that can be compared, and whose insides nobody changes.
_CONSTANTS = (
    int, float, bool, str, bytes, type(None), torch.dtype, torch.device,
    type, FunctionType, BuiltinFunctionType, partial,
)  # fmt: skip
_INTERNAL = {*vars(nn.Module())} - {"training"}


class Untraceable(BaseException):
    """Why a forward cannot be repeated from a trace. No forward catches it."""


class Trace(NamedTuple):
    """A call of a module.

    graph: its calls; reads: what it asked modules for, by (module, attribute); parts: the modules whose children it
    looked at, the traced one first.
    """

    graph: fx.Graph
    reads: dict[tuple[nn.Module, str], object]
    parts: tuple[nn.Module, ...]


class _Method(NamedTuple):
    """That an attribute is the method of its module's class."""

    function: Callable


_MISSING = object()


def unchanged(module: nn.Module, name: str, value: object) -> bool:
    """Whether what a trace read as `value`, the class Tensor for a tensor, is still that."""
    if type(value) is _Method:
        return name not in vars(module) and getattr(type(module), name, None) is value.function
    found = getattr(module, name, _MISSING)
    return isinstance(found, Tensor) if value is Tensor else type(found) is type(value) and found == value


def original(module: nn.Module) -> type:
    """A module's class before it was given a generated forward."""
    return getattr(type(module), "_fused_from", type(module))


def is_sequential(module: nn.Module) -> bool:
    """Whether calling it is calling its children one after the other."""
    return original(module).forward is nn.Sequential.forward and blocks.untouched(module)


def trace(module: nn.Module, *, training: bool, grad: bool, ndim: int | None = None) -> Trace:
    """What a call with tensors for the arguments that have no default does.

    Every module called is a node; nn.Sequentials without a forward of their own are followed.

    Args:
        training: the mode that the forward finds itself and every child in; grad: whether gradients are enabled then.
        ndim: how many dimensions the tensors have, if the graph will only be used for that many.

    Raises:
        Untraceable: why the graph would not always do what the forward does.
    """
    tracer, refusal = _Tracer(module, training, ndim), None
    try:
        with torch.set_grad_enabled(grad), watched(), _OnlyValues(), _nothing_drawn():
            tracer.follow()
    except Untraceable as error:
        refusal = str(error)
    except Exception as error:
        said = str(error).strip().split("\n")[0]
        refusal = f"its forward cannot be traced ({type(error).__name__}: {said})"
    kept = tracer.take_back()  # not before the error's traceback has let go of the values
    if refusal or kept:
        raise Untraceable(refusal or "its forward keeps a value")
    return Trace(tracer.graph, tracer.reads, tuple(tracer.parts))


def compiled(graph: fx.Graph) -> Callable:
    """A graph as a function of (module, *tensors), whose source tracebacks show."""
    code = graph.python_code("self")
    file, names = f"<fused_ops trace {hash(code.src):x}>", dict(code.globals)
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    exec(compile(code.src, file, "exec"), names)
    return names["forward"]


class _Tracer(fx.Tracer):
    """Follows one call of `module`."""

    def __init__(self, module: nn.Module, training: bool, ndim: int | None):
        super().__init__()
        self.root, self.training, self.ndim = module, training, ndim
        self.graph = fx.Graph()
        self.paths = {child: path for path, child in module.named_modules()}
        self.reads: dict[tuple[nn.Module, str], object] = {}
        self.parts = {module: None}
        self.values: list[weakref.ref] = []
        self.modes = _modes()

    def follow(self) -> None:
        forward = original(self.root).forward
        if forward is nn.Module.forward:
            raise Untraceable("it has no forward")
        if "forward" in vars(self.root):
            raise Untraceable("its forward is not its class's")
        names = _required_arguments(forward)
        outer, _tracing[threading.get_ident()] = _tracing.get(threading.get_ident()), self
        try:
            result = forward(self.root, *[self.create_proxy("placeholder", name, (), {}) for name in names])
            self.create_node("output", "output", (self.create_arg(result),), {})
        finally:
            if outer is None:
                del _tracing[threading.get_ident()]
            else:
                _tracing[threading.get_ident()] = outer
        for node in self.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                self.parts.update(dict.fromkeys(_holders(self.root, node.target)))

    def take_back(self) -> bool:
        """Whether anybody still had one of the values; lists, dictionaries and objects have none after that."""
        if any(value() is not None for value in self.values):
            gc.collect()  # a cycle of the forward's own may have held it
        left = [value for value in self.values if value() is not None]
        for value in left:
            for holder in gc.get_referrers(value()):
                if isinstance(holder, list):
                    holder[:] = [other for other in holder if other is not value()]
                else:
                    names = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
                    for name in [name for name, other in names.items() if other is value()]:
                        del names[name]
        return bool(left)

    def where(self, module: nn.Module, name: str) -> str:
        path = self.paths.get(module)
        return ".".join(filter(None, ("another module" if path is None else "self", path, name)))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return self.seen((_Argument if node.op == "placeholder" else _Proxy)(node, self))

    def seen(self, value: fx.Proxy) -> fx.Proxy:
        self.values.append(weakref.ref(value))
        return value

    def create_node(self, *args, **kwargs) -> fx.Node:
        if _modes() != self.modes:
            raise Untraceable("its forward switches autocast or inference mode")
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise Untraceable("its forward branches on a value")

    def create_arg(self, a: object) -> fx.node.Argument:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            raise Untraceable("its forward uses a tensor that is no attribute of a module below it")
        return super().create_arg(a)

    def called(self, module: nn.Module, args: tuple, kwargs: dict) -> object:
        if is_sequential(module):
            return nn.Sequential.forward(module, *args, **kwargs)
        if not self.paths.get(module):
            raise Untraceable(f"its forward calls a {type(module).__name__} that is not below it")
        return self.create_proxy("call_module", self.paths[module], args, kwargs)

    def answer(self, module: nn.Module, name: str, value: object) -> object:
        """What the forward gets that asks `module` for an attribute whose value is `value`."""
        if isinstance(value, Tensor):
            if module not in self.paths:
                raise Untraceable(f"its forward reads {self.where(module, name)}")
            self.reads[module, name] = Tensor
            return self.create_proxy("get_attr", ".".join(filter(None, (self.paths[module], name))), (), {})
        if name == "training":
            if module is not self.root:
                self.reads[module, name] = self.training
            return self.training
        if isinstance(value, MethodType) and value.__self__ is module and name not in vars(module):
            home = value.__func__.__module__ or ""
            if home.startswith("torch.") and home != nn.Sequential.__module__:
                raise Untraceable(f"its forward calls {self.where(module, name)}")
            self.reads[module, name] = _Method(value.__func__)
        elif _constant(value):
            self.reads[module, name] = value
        else:
            kind = type(value).__name__
            raise Untraceable(f"its forward reads {self.where(module, name)}, a {kind} that may change unseen")
        return value


def _constant(value: object) -> bool:
    return isinstance(value, _CONSTANTS) or (isinstance(value, tuple) and all(map(_constant, value)))


def _holders(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules on the way from `module` to what `path` names."""
    for name in path.split(".")[:-1]:
        module = getattr(module, name)
        yield module


def _modes() -> tuple:
    return torch.is_inference_mode_enabled(), torch._C._is_any_autocast_enabled()


def _required_arguments(forward: Callable) -> list[str]:
    """The arguments of a forward that have no default: the call that is traced has just these."""
    required = []
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise Untraceable("its forward takes any number of arguments")
        if parameter.kind is parameter.VAR_KEYWORD or parameter.default is not parameter.empty:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise Untraceable(f"its forward needs the keyword {parameter.name}")
        required.append(parameter.name)
    return required


_tracing: dict[int, _Tracer] = {}  # by the thread that traces: for all others modules stay what they are
_watching, _lock, _plain = 0, threading.Lock(), {}


@contextmanager
def watched() -> Iterator[None]:
    """Within the block, nn.Module lets tracers answer for it. Worth sharing: Python forgets what it knew of classes."""
    global _watching
    with _lock:
        _watching += 1
        if _watching == 1:
            _plain.update((name, vars(nn.Module).get(name)) for name in _WATCHED)
            for name, method in _WATCHED.items():
                setattr(nn.Module, name, method)
    try:
        yield
    finally:
        with _lock:
            _watching -= 1
            if not _watching:
                for name, method in _plain.items():
                    delattr(nn.Module, name) if method is None else setattr(nn.Module, name, method)


def _asked(self: nn.Module, name: str) -> object:
    value = object.__getattribute__(self, name)
    tracer = _tracing.get(threading.get_ident())
    if tracer is None or name in _INTERNAL:
        if tracer is not None and name == "_modules":
            tracer.parts[self] = None
        return value
    if (name.startswith("__") and name != "__dict__") or _asked_by(2).startswith(_NO_FORWARD):
        return value
    return tracer.answer(self, name, value)


def _asked_in_vain(self: nn.Module, name: str) -> object:
    """For parameters, buffers and children, and for what is not there."""
    tracer = _tracing.get(threading.get_ident())
    if tracer is None:
        return _plain["__getattr__"](self, name)
    tracer.parts[self] = None
    try:
        value = _plain["__getattr__"](self, name)
    except AttributeError:
        if not _asked_by(2).startswith(_NO_FORWARD):
            tracer.reads[self, name] = _MISSING
        raise
    return value if name in self._modules else tracer.answer(self, name, value)


def _called(self: nn.Module, *args, **kwargs) -> object:
    tracer = _tracing.get(threading.get_ident())
    return _plain["__call__"](self, *args, **kwargs) if tracer is None else tracer.called(self, args, kwargs)


def _set(self: nn.Module, name: str, value: object) -> None:
    _refuse_change(self, name)
    _plain["__setattr__"](self, name, value)


def _deleted(self: nn.Module, name: str) -> None:
    _refuse_change(self, name)
    _plain["__delattr__"](self, name)


def _refuse_change(module: nn.Module, name: str) -> None:
    if (tracer := _tracing.get(threading.get_ident())) is not None:
        raise Untraceable(f"its forward sets {tracer.where(module, name)}")


_WATCHED = {
    "__getattribute__": _asked, "__getattr__": _asked_in_vain, "__call__": _called, "__setattr__": _set,
    "__delattr__": _deleted,
}  # fmt: skip


def _asked_by(depth: int) -> str:
    """The module whose code is `depth` calls up from the caller."""
    return sys._getframe(depth).f_globals.get("__name__", "") + "."


_NO_FORWARD = ("torch.", f"{__name__}.", f"{blocks.__name__}.")


class _OnlyValues(TorchFunctionMode):
    """Refuses what torch would compute, or switch, at once: a graph repeats only what is done to its values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch._assert and not any(issubclass(kind, fx.Proxy) for kind in types):
            raise Untraceable(f"its forward calls {func.__name__}, which a graph would not repeat")
        return func(*args, **(kwargs or {}))


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Python's and numpy's random numbers stay where they are; torch's would be seen by `_OnlyValues`."""
    before = _generators()
    try:
        yield
    finally:
        drawn = _generators() != before
        if drawn:
            random.setstate(before[0])
            if len(before) > 1:
                sys.modules["numpy.random"].set_state(pickle.loads(before[1]))
    if drawn:
        raise Untraceable("its forward draws random numbers")


def _generators() -> tuple:
    numpy = sys.modules.get("numpy.random")
    return random.getstate(), *([] if numpy is None else [pickle.dumps(numpy.get_state())])


class _Proxy(fx.Proxy):
    """A value that is not there yet, and says so where only a real one could answer."""

    @property
    def __class__(self):
        if _asked_by(2).startswith("torch.fx."):
            return type(self)
        raise Untraceable("its forward asks for the type of a value")

    def __getattr__(self, name):
        return self.tracer.seen(_Attribute(self, name))

    def __iter__(self):
        """As torch.fx's, for `a, b = value` only, but without a cycle that keeps the value alive."""
        frame = sys._getframe(1)
        operation, count = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
        if operation != _UNPACK:
            raise Untraceable("its forward loops over a value")
        return iter([self[i] for i in range(count)])

    def __setattr__(self, name, value):
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise Untraceable(f"its forward sets .{name} of a value")
        super().__setattr__(name, value)


_UNPACK = dis.opmap["UNPACK_SEQUENCE"]


class _Argument(_Proxy):
    """Of the call that is traced."""

    @property
    def ndim(self):
        return self.__getattr__("ndim") if self.tracer.ndim is None else self.tracer.ndim

    def dim(self):
        return self.__getattr__("dim")() if self.tracer.ndim is None else self.tracer.ndim


class _Attribute(_Proxy, fx.proxy.Attribute):
    """An attribute of a value, or a method about to be called."""


def _in_place(function: Callable) -> Callable:
    def method(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


def _refused(what: str) -> Callable:
    def method(self, *args):
        raise Untraceable(f"its forward {what} a value")

    return method


_REFUSED = {
    "prints": ("__str__", "__repr__", "__format__"),
    "makes a number of": ("__len__", "__int__", "__float__"),
    "loops over": ("__contains__",),
    "changes a part of": ("__setitem__", "__delitem__"),
}
for _what, _names in _REFUSED.items():
    for _name in _names:
        setattr(_Proxy, _name, _refused(_what))

IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
for _name in IN_PLACE:  # torch.fx takes `x += y` for `x = x + y`
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))
