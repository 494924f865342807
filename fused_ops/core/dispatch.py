"""Which implementation serves a call.

An `Op` is an ordered tuple of `Backend`s. A backend asked for by name serves the call or raises; `auto` takes the first
that can serve it, has been verified on a GPU (if it is a GPU kernel) and is not slower than `reference` there.
"""

import logging
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from fused_ops.core import device, extension, verified
from fused_ops.core.errors import BackendUnavailable

logger = logging.getLogger("fused_ops")

NAMES = ("cuda", "triton", "cpu", "reference")
OPS: dict[str, "Op"] = {}
# How an op is run on a tensor subclass, by its full name: nothing is imported for one that nobody uses.
SUBCLASSES: dict[str, Callable] = {}
_PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
_KEYS = {"cuda": "CUDA", "cpu": "CPU"}

_context: str | None = None
_logged: set["Choice"] = set()
_recordings: list[list["Choice"]] = []
_explaining = False
MANY = 4096  # choices to remember
# The dictionary behind os.environ: a look-up there costs a thirtieth of os.environ.get.
_environment, _ENVIRONMENT_KEY = os.environ._data, os.environ.encodekey("FUSED_OPS_BACKEND")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: one of `NAMES`.
        run: takes the op's call, validated.
        supports: takes the same call; None, or why this backend cannot serve it.
        worthwhile: for `auto`: None, or why it would be slower than `reference` (naming the measurement's file). Asked
            before `supports`, so of calls too that this backend cannot serve.
        needs: the op that must be registered in `_C.so`.
        kernel: its entry in `verified`, for kernels that run on a GPU.
        note: what `explain` adds where it is chosen.
    """

    name: str
    run: Callable
    supports: Callable = lambda *call: None
    worthwhile: Callable = lambda *call: None
    needs: str | None = None
    kernel: verified.Kernel | None = None
    note: str = ""

    def missing(self, tensor: torch.Tensor) -> str | None:
        """Why this backend does not exist for `tensor`'s device, whatever the call."""
        if self.name == "cuda" and not tensor.is_cuda:
            return self._not_emulated(tensor)
        if self.name == "cpu" and not tensor.is_cpu:
            return "needs a tensor on the CPU"
        if self.name == "triton":
            if not device.TRITON_INSTALLED:
                return "triton is not installed"
            if not (tensor.is_cuda or (tensor.is_cpu and device.TRITON_INTERPRETED)):
                return "needs a tensor on a GPU (or TRITON_INTERPRET=1 on the CPU)"
        if self.needs is not None and not extension.has_kernel(self.needs, _KEYS[self.name]):
            return extension.kernels_missing or f"_C.so was built without {self.name} kernels"
        if self.name == "cuda":
            return device.architecture_missing(tensor.get_device())
        return None

    def _not_emulated(self, tensor: torch.Tensor) -> str | None:
        """Why the CUDA kernel does not run on `tensor`, which is on no GPU."""
        if not (extension.EMULATED and tensor.is_cpu):
            return "needs a tensor on a GPU"
        if self.needs is None or extension.has_kernel(self.needs, "CPU"):
            return None
        return extension.emulator_missing or "_emu.so was built without it"

    def label(self, tensor: torch.Tensor) -> str:
        """Its name, whether it would only be emulated, and if so whether a GPU has confirmed what the emulator does."""
        if not (extension.EMULATED and self.name == "cuda" and tensor.is_cpu):
            return self.name
        known = self.kernel is None or verified.UNCALIBRATED.isdisjoint(self.kernel.sources)
        return "cuda (emulated)" if known else "cuda (emulated, uncalibrated)"


class Choice(NamedTuple):
    """What served one call of one op, and why nothing before it did."""

    op: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} runs on {self.backend}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns: `rows` of (backend, verdict, reason); printing it gives a table."""

    op: str
    chosen: str | None
    rows: tuple[tuple[str, str, str], ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'nothing serves this call'}"]
        width = max(10, *(len(row[0]) for row in self.rows))
        lines += [f"  {name:<{width}} {verdict:<8} {reason}".rstrip() for name, verdict, reason in self.rows]
        return "\n".join(lines)

    __repr__ = __str__


class _Explained(BaseException):
    """Leaves a public function at the moment of choice: nothing has run yet."""

    def __init__(self, explanation: Explanation):
        self.explanation = explanation


def unwatched(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is an ordinary one on the CPU, without gradients, and nobody asks for or looks at a choice."""
    return not (
        type(tensor) is not torch.Tensor
        or not tensor.is_cpu
        or _context is not None
        or _ENVIRONMENT_KEY in _environment
        or _explaining
        or _recordings
        or device.TRITON_INTERPRETED
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
    )


class Op:
    """A public function's backends, in order of preference; the last is `reference`, which serves everything.

    Args:
        autocast: "cast" if torch's autocast lowers this op's inputs, "reference" if it works inside the op.
    """

    def __init__(self, name: str, *backends: Backend, autocast: str = "reference"):
        self.name, self.backends, self.autocast = name, backends, autocast
        self.by_name = {backend.name: backend for backend in backends}
        self.reference = backends[-1]
        elsewhere = ("cuda",) if device.TRITON_INTERPRETED else ("cuda", "triton")
        self._on_cpu = tuple(backend for backend in backends if backend.name not in elsewhere)
        self._only_reference = Choice(name, "reference", "nothing else runs on the CPU")
        self._straight = Choice(name, "reference", "torch's own function is all that was asked for")
        self._chosen: dict[tuple, Backend] = {}
        OPS[name] = self

    def __call__(self, requested: str | None, tensors: tuple, *call):
        """Run `call` on the backend chosen for it. `tensors` are its tensors (None allowed), the first never None."""
        kind = type(tensors[0])
        if kind not in _PLAIN and f"{kind.__module__}.{kind.__qualname__}" in SUBCLASSES:
            return SUBCLASSES[f"{kind.__module__}.{kind.__qualname__}"](self, requested, tensors, call)
        if torch._C._is_any_autocast_enabled():
            tensors, call = self._cast(tensors, call)
        if _explaining:
            raise _Explained(self.explain(requested, tensors, call))
        named = None
        if requested is not None or _context is not None or _ENVIRONMENT_KEY in _environment:
            named, binding = self._named(requested)
        if named is not None:
            return self._bound(named, binding, tensors, call).run(*call)
        if len(self._on_cpu) == 1 and tensors[0].is_cpu:
            if _recordings or self._only_reference not in _logged:
                self._note(self._only_reference, on_gpu=False)
            return self.reference.run(*call)
        return self._auto(tensors, call).run(*call)

    def straight(self, requested: str | None, tensor: torch.Tensor) -> bool:
        """Whether a call of torch's own function, nothing added, may go to it at once; its errors are explained later.

        It may on the CPU, where `reference` serves it and without gradients is that function, unless a backend is
        asked for or somebody watches.
        """
        if requested is not None or not unwatched(tensor):
            return False
        if self._straight not in _logged:
            self._note(self._straight, on_gpu=False)
        return True

    def remembered(self, key: tuple, tensors: tuple, *call):
        """As a call of auto, whose choice on the CPU without gradients is made once for each `key`.

        Args:
            key: whatever backends' rules look at in `call`, but for the kinds of tensors.
        """
        if not unwatched(tensors[0]) or torch._C._is_any_autocast_enabled() or self._oddity(tensors):
            return self(None, tensors, *call)
        backend = self._chosen.get(key)
        if backend is None:
            if len(self._chosen) == MANY:
                self._chosen.clear()
            backend = self._chosen[key] = self._auto(tensors, call)
        return backend.run(*call)

    def bound(self) -> bool:
        """Whether `use_backend` or FUSED_OPS_BACKEND names a backend that this op has."""
        return (_context is not None or _ENVIRONMENT_KEY in _environment) and self._named(None)[0] is not None

    def _cast(self, tensors: tuple, call: tuple) -> tuple[tuple, tuple]:
        """(tensors, call) as torch's autocast would hand them to the op."""
        first = tensors[0]
        if self.autocast == "cast" and torch.is_autocast_enabled("cuda" if first.is_cuda else "cpu"):
            return _lowered(first, tensors), _lowered(first, call)
        return tensors, call

    def _bound(self, named: str, binding: str, tensors: tuple, call: tuple) -> Backend:
        """The backend asked for by name, or an error: a request never falls back."""
        if named not in self.by_name:
            raise BackendUnavailable(f"{self.name} has no {named} backend, it has {', '.join(self.by_name)}")
        backend = self.by_name[named]
        reason = self._refusal(backend, tensors, call)
        if reason is not None:
            raise BackendUnavailable(f"{self.name}: {binding} asks for {named}, which {reason}")
        for recording in _recordings:
            recording.append(Choice(self.name, backend.label(tensors[0]), f"asked for by {binding}"))
        return backend

    def _auto(self, tensors: tuple, call: tuple) -> Backend:
        """The first backend that is worth it and can serve the call; `reference` always is and can."""
        why = ""
        for backend in self._on_cpu if tensors[0].is_cpu else self.backends:
            reason = self._objection(backend, tensors, call)
            if reason is None:
                break
            why = f"{why}; {backend.name} {reason}" if why else f"{backend.name} {reason}"
        self._note(Choice(self.name, backend.name, why), on_gpu=tensors[0].is_cuda)
        return backend

    def _objection(self, backend: Backend, tensors: tuple, call: tuple) -> str | None:
        """Why `auto` does not take `backend`, the cheapest questions first."""
        if backend is self.reference:
            return None
        reason = backend.missing(tensors[0])
        if reason is None and backend.kernel is not None and verified.experimental(backend.kernel.name):
            reason = "is experimental: no GPU run has verified it since its source last changed"
        return reason or backend.worthwhile(*call) or self._refusal(backend, tensors, call)

    def _refusal(self, backend: Backend, tensors: tuple, call: tuple) -> str | None:
        """Why `backend` cannot serve the call."""
        if backend is self.reference:
            return None
        return self._oddity(tensors) or backend.missing(tensors[0]) or backend.supports(*call)

    def explain(self, requested: str | None, tensors: tuple, call: tuple) -> Explanation:
        named, binding = self._named(requested)
        chosen, rows = None, []
        for backend in self.backends:
            label = backend.label(tensors[0])
            reason = self._refusal(backend, tensors, call)
            if reason is None and named is None and chosen is None:
                emulated = label != backend.name
                reason = "is taken by name only" if emulated else self._objection(backend, tensors, call)
            if reason is not None:
                rows.append((label, "refused", reason))
            elif chosen is None and named in (None, backend.name):
                chosen = label
                said = (f"asked for by {binding}" if named else "", backend.note)
                rows.append((label, "chosen", "; ".join(filter(None, said))))
            else:
                rows.append((label, "passed", f"{named or chosen} comes first"))
        if named is not None and named not in self.by_name:
            rows.append((named, "refused", f"{self.name} has no {named} backend"))
        return Explanation(self.name, chosen, tuple(rows))

    def _named(self, requested: str | None) -> tuple[str | None, str]:
        """The backend that binds this call (None: auto) and where the request comes from."""
        if requested is not None:
            _check_name("backend", requested)
            return (None if requested == "auto" else requested), "backend="
        name, binding = _context, "use_backend"
        if name is None:
            name, binding = os.environ.get("FUSED_OPS_BACKEND") or "auto", "FUSED_OPS_BACKEND"
            _check_name("FUSED_OPS_BACKEND (the default of backend)", name)
        return (name if name in self.by_name else None), binding

    def _oddity(self, tensors: tuple) -> str | None:
        """What about these tensors, or the mode they are used in, only `reference` handles."""
        if torch._C._functorch.get_dynamic_layer_stack_depth():  # Dynamo folds it; peek_interpreter_stack it does not
            return "does not run under a functorch transform"
        if forward_ad._current_level >= 0:
            return "does not run under forward-mode AD"
        for tensor in tensors:
            if tensor is None:
                continue
            if type(tensor) not in _PLAIN:
                return f"has no rule for the tensor subclass {type(tensor).__name__}"
            if tensor.is_nested or tensor.layout is not torch.strided:
                return "takes dense strided tensors only"
        if self.autocast == "reference" and torch.is_autocast_enabled("cuda" if tensors[0].is_cuda else "cpu"):
            return "leaves autocast to torch"
        return None

    def _note(self, choice: Choice, on_gpu: bool) -> None:
        """Record what `auto` chose, and log it the first time. Logging would break a compiled graph."""
        if torch.compiler.is_compiling():
            return
        for recording in _recordings:
            recording.append(choice)
        if choice not in _logged:
            _logged.add(choice)
            level = logging.WARNING if on_gpu and choice.backend == "reference" else logging.INFO
            logger.log(level, "%s", choice)


def _lowered(first: torch.Tensor, values: tuple) -> tuple:
    dtype = torch.get_autocast_dtype("cuda" if first.is_cuda else "cpu")
    return tuple(
        value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        else value
        for value in values
    )


def _check_name(argument: str, name: str) -> None:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(NAMES)}, auto or None, got {name!r}")


class use_backend:  # noqa: N801 - a context manager, named like torch.no_grad
    """Within the block, ops that have backend `name` use it (and raise `BackendUnavailable` where it cannot serve a
    call); the others run `auto`. None and "auto" reset to `auto`. A `backend=` argument takes precedence.

    Raises:
        ValueError: `name` is no backend.
    """

    def __init__(self, name: str | None):
        self.name = "auto" if name is None else name
        self.outer: list[str | None] = []
        _check_name("backend", self.name)

    def __enter__(self) -> None:
        global _context
        self.outer.append(_context)
        _context = self.name

    def __exit__(self, *error) -> None:
        global _context
        _context = self.outer.pop()


@contextmanager
def record():
    """Within the block, collect every `Choice` made: `with record() as choices: model(x)`."""
    choices: list[Choice] = []
    _recordings.append(choices)
    try:
        yield choices
    finally:
        _recordings[:] = [other for other in _recordings if other is not choices]


def explain(fn: Callable, *args, **kwargs) -> Explanation:
    """Which backend would serve `fn(*args, **kwargs)`, and why the others would not. Nothing is computed.

    `fn` is a public function or a module of this package; of a module with several ops, the first one is explained.

    Raises:
        ValueError: `fn` reached none of the package's ops. Errors in the arguments are raised as by `fn` itself.
    """
    global _explaining
    outer, _explaining = _explaining, True
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
            fn(*args, **kwargs)
    except _Explained as found:
        return found.explanation
    finally:
        _explaining = outer
    raise ValueError(f"fn must be a function or module of fused_ops, got {fn!r}")
