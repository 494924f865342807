"""Schemas, fake kernels and derivative of the C++ sequences with a layer norm inside the step."""

import torch

from fused_ops.core.autograd import distinct, gradients
from fused_ops.core.library import define
from fused_ops.rnn import reference
from fused_ops.rnn.op import narrowed, widened
from fused_ops.rnn.reference import Static, Tensors, split

ops = torch.ops.fused_ops

# What both directions take: the tensors of a call, params without the norms', and how to read them. norms: each cell's
# norm_ih, norm_hh[, norm_c, bias_c].
_CALL = (
    "Tensor input, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? resets, Tensor? batch_sizes, Tensor? masks,"
    " Tensor[] params, Tensor[] norms"
)
_STATIC = "str mode, bool has_biases, bool bidirectional"


def _forward_fake(
    input, h0, c0, lengths, resets, batch_sizes, masks, params, norms, mode, has_biases, bidirectional, keep_states,
    keep_steps,
):  # fmt: skip
    directions, lstm = 2 if bidirectional else 1, mode == "lstm"
    (cells, _, hidden), places = h0.shape, input.shape[:-1]
    output, gates = (*places, directions * hidden), {"gru": 3, "lstm": 4}.get(mode, 1)
    kept = (2 * gates + (4 if gates > 1 else 0)) * hidden + 4
    return (
        input.new_empty(output),
        input.new_empty(h0.shape),
        input.new_empty(h0.shape if lstm else 0),
        input.new_empty((cells // directions - 1, *output) if keep_states else 0),
        input.new_empty((cells, *places, hidden) if lstm and keep_states else 0),
        input.new_empty((cells, *places, kept) if keep_steps else 0),
    )


# inner: the outputs of all layers but the last. kept: of each step the gates, what was normalised, and how.
define(
    f"rnn_norm_fwd_cpu({_CALL}, {_STATIC}, bool keep_states, bool keep_steps)"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor inner, Tensor c_all, Tensor kept)",
    _forward_fake,
)


def _backward_fake(
    grad_output, grad_h_n, grad_c_n, grad_h_all, grad_c_all, input, h0, c0, lengths, resets, batch_sizes, masks, params,
    norms, output, inner, c_all, kept, mode, has_biases, bidirectional, need_input, need_params,
):  # fmt: skip
    return [
        input.new_empty(input.shape if need_input else 0),
        input.new_empty(h0.shape),
        input.new_empty(h0.shape if mode == "lstm" else 0),
        *(input.new_empty(param.shape) for param in ((*params, *norms) if need_params else ())),
    ]


# The derivatives by input, h0, c0 and, if need_params, each of params and norms.
define(
    "rnn_norm_bwd_cpu(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_h_all, Tensor? grad_c_all,"
    f" {_CALL}, Tensor output, Tensor inner, Tensor c_all, Tensor kept, {_STATIC}, bool need_input, bool need_params)"
    " -> Tensor[]",
    _backward_fake,
)


def _by_cell(static: Static) -> tuple[int, int]:
    """How many parameters a cell has before its norms', and with them."""
    plain = 4 if static.has_biases else 2
    return plain, plain + static.norms


def _arguments(call) -> tuple:
    """A flat call as the ops take it, up to `bidirectional`: (tensors, params, norms), (mode, ...)."""
    tensors, params, static = split(call)
    plain, per_cell = _by_cell(static)
    params = widened(params, tensors.input.dtype)
    return (
        (
            *widened(tensors[:7], tensors.input.dtype),
            [p for i, p in enumerate(params) if i % per_cell < plain],
            [p for i, p in enumerate(params) if i % per_cell >= plain],
        ),
        (static.mode, static.has_biases, static.bidirectional),
    )


def _forward(call, keep: bool) -> tuple[tuple, tuple]:
    """What the public function returns of a flat call, and what its backward needs beside the call."""
    (tensors, _, static), (given, how) = split(call), _arguments(call)
    output, h_n, c_n, inner, c_all, kept = ops.rnn_norm_fwd_cpu(*given, *how, keep or static.all_states, keep)
    found = (output, h_n, c_n) if static.is_lstm else (output, h_n)
    if static.all_states:
        outputs = torch.cat((inner, output[None])).unflatten(-1, (static.directions, -1))
        h_all = outputs.movedim(-2, 1).flatten(0, 1)
        found = (*found, h_all, c_all) if static.is_lstm else (*found, h_all)
    return narrowed(found, tensors.input.dtype), (output, inner, c_all, kept)


class _NormSequence(torch.autograd.Function):
    """Forward and backward by hand; the second derivative is the reference's."""

    @staticmethod
    def forward(ctx, static, *inputs):
        found, saved = _forward((*inputs, *static), keep=True)
        ctx.static = static
        ctx.save_for_backward(*inputs, *saved)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx, *grads):
        *inputs, output, inner, c_all, kept = ctx.saved_tensors
        needs, call = ctx.needs_input_grad[1:], (*inputs, *ctx.static)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # only under create_graph=True
            return None, *gradients(reference.sequence(*call), inputs, needs, grads, create_graph=True)
        if all(grad is None for grad in grads):
            return None, *[None for _ in needs]
        static, (given, how), dtype = Static(*ctx.static), _arguments(call), inputs[0].dtype
        grad_output, grad_h_n, *rest = widened(grads, dtype)
        grad_c_n = rest.pop(0) if static.is_lstm else None
        grad_h_all, grad_c_all = (*rest, None, None)[:2]
        head = len(Tensors._fields)
        found = ops.rnn_norm_bwd_cpu(
            grad_output, grad_h_n, grad_c_n, grad_h_all, grad_c_all, *given, output, inner, c_all, kept, *how,
            needs[0], any(needs[head:]),
        )  # fmt: skip
        d_input, d_h0, d_c0, *d_params = narrowed(found, dtype)
        every = (d_input, d_h0, d_c0, *[None for _ in range(head - 3)], *_in_order(d_params, len(needs) - head, static))
        return None, *[grad if need else None for grad, need in zip(every, needs, strict=True)]


def _in_order(found: list, count: int, static: Static) -> list:
    """Gradients of (params, norms) in the order of a flat call's parameters."""
    plain, per_cell = _by_cell(static)
    if not found:
        return [None for _ in range(count)]
    norms, params = iter(found[count // per_cell * plain :]), iter(found)
    return [next(params) if i % per_cell < plain else next(norms) for i in range(count)]


def sequence_norm_cpu(tensors: Tensors, params: tuple, static: Static, dropout: float):
    tensors = reference.with_masks(tensors, static, dropout)
    inputs = (*tensors, *params)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs]):
        return _NormSequence.apply(tuple(static), *(distinct(inputs) if torch.compiler.is_compiling() else inputs))
    return _forward((*inputs, *static), keep=False)[0]
