"""Derivatives. A kernel without a backward gets the reference's; PyTorch's own fused ops get a second derivative.

Throughout, `inputs` are tensors or None, and `maths(*inputs, *static)` is plain differentiable PyTorch that returns a
tuple of tensors.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_ops.core.library import define


def gradients(outputs, inputs, needs, grads, *, create_graph: bool = False) -> list[Tensor | None]:
    """d(outputs)/d(inputs) applied to `grads`; None where not needed. Absent grads (None) count as zero."""
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad]
    wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
    if not pairs or not wanted:
        return [torch.zeros_like(t) if need else None for t, need in zip(inputs, needs, strict=True)]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return [next(found) if need else None for need in needs]


def reference_gradient(name: str, static_schema: str, maths: Callable) -> Callable:
    """Define fused_ops::`name`, the first derivative of `maths`, as one opaque op:

    name(Tensor?[] grads, Tensor?[] inputs, bool[] needs, *static) -> Tensor[]; size-0 tensors where not needed.
    """

    def implementation(grads, inputs, needs, *static):
        with _autograd_inside_an_op():
            leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
            found = gradients(maths(*leaves, *static), leaves, needs, grads)
        # An op must not return a tensor twice, nor one of its inputs, and its fake promises contiguous gradients.
        taken = {id(t) for t in (*grads, *inputs) if t is not None}
        return [_placeholder(grads, inputs) if g is None else _fresh(g, taken) for g in found]

    def fake(grads, inputs, needs, *static):
        return [
            torch.empty_like(t, memory_format=torch.contiguous_format) if need else _placeholder(grads, inputs)
            for t, need in zip(inputs, needs, strict=True)
        ]

    extra = f", {static_schema}" if static_schema else ""
    schema = f"{name}(Tensor?[] grads, Tensor?[] inputs, bool[] needs{extra}) -> Tensor[]"
    define(schema, fake, implementation, ("CPU", "CUDA"))
    return getattr(torch.ops.fused_ops, name).default


@contextmanager
def _autograd_inside_an_op():
    """Compiled graphs without a backward (opcheck's, compiled autograd's) call their ops with autograd's keys excluded:
    what is computed there has no graph, and every gradient would silently be zero."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _placeholder(grads, inputs) -> Tensor:
    return next(t for t in (*grads, *inputs) if t is not None).new_empty(0)


def _fresh(tensor: Tensor, taken: set[int]) -> Tensor:
    result = tensor.contiguous()
    result = result.clone() if id(result) in taken or result._is_view() else result
    taken.add(id(result))
    return result


def with_reference_gradient(forward: Callable, backward: Callable, maths: Callable) -> Callable:
    """A differentiable function `call(inputs, static) -> tuple of tensors` whose value comes from `forward`.

    Its first derivative is `backward` (made by `reference_gradient`), its second is that of `maths`.
    """

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, static, *inputs):
            ctx.static = static
            ctx.save_for_backward(*inputs)
            ctx.set_materialize_grads(False)
            return forward(*inputs, *static)

        @staticmethod
        def backward(ctx, *grads):
            inputs, needs = ctx.saved_tensors, list(ctx.needs_input_grad[1:])
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # only under create_graph=True
                return None, *gradients(maths(*inputs, *ctx.static), inputs, needs, grads, create_graph=True)
            if all(grad is None for grad in grads):
                return None, *[None for _ in needs]
            found = backward(list(grads), list(inputs), needs, *ctx.static)
            return None, *[grad if need else None for grad, need in zip(found, needs, strict=True)]

    def call(inputs: tuple, static: tuple) -> tuple:
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in inputs):
            return forward(*inputs, *static)
        return Fused.apply(static, *distinct(inputs))

    return call


def distinct(inputs: tuple) -> list:
    """The same tensors, repeated objects replaced by views: Dynamo refuses a Function called with duplicates."""
    result = []
    for tensor in inputs:
        repeated = tensor is not None and any(tensor is earlier for earlier in result)
        result.append(tensor.view_as(tensor) if repeated else tensor)
    return result


class _TwiceDifferentiable(torch.autograd.Function):
    """The inner graph lives in `saved_tensors` (as the grad_fn of the saved outputs), so it is freed with them."""

    @staticmethod
    def forward(ctx, fused, maths, *inputs):
        with torch.enable_grad():
            leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]
            outputs = fused(*leaves)
        ctx.maths, ctx.count = maths, len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *leaves, *_tuple(outputs))
        return outputs.detach() if isinstance(outputs, Tensor) else tuple(out.detach() for out in outputs)

    @staticmethod
    def backward(ctx, *grads):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        inputs, leaves, outputs = saved[: ctx.count], saved[ctx.count : 2 * ctx.count], saved[2 * ctx.count :]
        if torch.is_grad_enabled():  # only under create_graph=True
            return None, None, *gradients(_tuple(ctx.maths(*inputs)), inputs, needs, grads, create_graph=True)
        return None, None, *gradients(outputs, leaves, needs, grads)


def _tuple(outputs) -> tuple:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def twice_differentiable(fused: Callable, maths: Callable, *inputs: Tensor | None):
    """`fused(*inputs)`: PyTorch's own op for the value and the first derivative, `maths` for the second.

    PyTorch's fused ops (CPU flash attention, oneDNN and cuDNN RNNs) have no second derivative. Both callables take the
    inputs and return a tensor or a tuple of them. Under `torch.compile`, functorch and forward AD
    it is `fused` itself.
    """
    differentiable = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs])
    transformed = torch._C._functorch.get_dynamic_layer_stack_depth() or forward_ad._current_level >= 0
    if not differentiable or transformed or torch.compiler.is_compiling():
        return fused(*inputs)
    return _TwiceDifferentiable.apply(fused, maths, *inputs)


def add_second_derivative(output: Tensor, fused: str, saved: tuple[str, ...], maths: Callable) -> Tensor:
    """Let `output`, made by one of PyTorch's fused nodes, be differentiated twice; returns it.

    A hook on the node: under create_graph its gradients are replaced by those of `maths`, a function of the node's
    inputs. Cheaper than `twice_differentiable` by a factor of ten, but only where one node does all the work.

    Args:
        fused: how the node's name begins; it made `output` or the tensor that `output` is a slice of.
        saved: the node's inputs among its saved tensors, in order, those with a gradient first.
    """
    node = output.grad_fn
    if node is not None and not node.name().startswith(fused) and node.next_functions:
        node = node.next_functions[0][0]
    if node is None or not node.name().startswith(fused):
        return output
    held = [getattr(node, f"_saved_{name}", None) for name in saved]

    def hook(grad_inputs, grad_outputs):
        if torch.is_grad_enabled():  # only under create_graph=True
            needs = [grad is not None for grad in grad_inputs]
            outputs = [maths(*held)]
            return tuple(gradients(outputs, held[: len(needs)], needs, grad_outputs[:1], create_graph=True))
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            held.clear()  # as the node is about to do with its own
        return None

    node.register_hook(hook)
    return output
