"""Schemas, fake kernels and derivatives of the RNN kernels."""

import torch

from fused_ops.core.autograd import distinct, gradients, reference_gradient, with_reference_gradient
from fused_ops.core.device import TRITON_KEYS
from fused_ops.core.errors import ArgumentError
from fused_ops.core.library import define
from fused_ops.rnn import reference
from fused_ops.rnn.reference import STATIC, Static, Tensors, split

ops = torch.ops.fused_ops


def _sequence_shapes(call) -> list[tuple[int, ...]]:
    """The shapes of (output, h_n[, c_n][, h_all[, c_all]])."""
    tensors, _, static = split(call)
    input, h0, c0 = tensors.input, tensors.h0, tensors.c0
    shapes = [(*input.shape[:-1], h0.size(-1) * static.directions), h0.shape]
    if static.is_lstm:
        shapes.append(c0.shape)
    if static.all_states:
        time = input.size(0) if tensors.batch_sizes is None else tensors.batch_sizes.size(0)
        states = (h0, c0) if static.is_lstm else (h0,)
        shapes += [(state.size(0), time, state.size(1), state.size(2)) for state in states]
    return shapes


def _rnn_fwd_reference(inputs, *static):
    lengths = Tensors(*inputs[: len(Tensors._fields)]).lengths
    if lengths is not None and lengths.is_cpu:
        check_lengths(lengths, inputs[0].size(0))
    # An op must not return one of its inputs, nor two views of one tensor.
    return [t.clone(memory_format=torch.contiguous_format) for t in reference.sequence(*inputs, *static)]


def _rnn_fwd_reference_fake(inputs, *static):
    return [inputs[0].new_empty(shape) for shape in _sequence_shapes((*inputs, *static))]


def check_lengths(lengths: torch.Tensor, time: int) -> None:
    if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > time):
        raise ArgumentError("lengths", f"between 0 and input's {time} steps", lengths.tolist())


# torch.compile would unroll PyTorch's op step by step and specialise on the time, so it is one opaque op there.
define(
    f"rnn_fwd_reference(Tensor?[] inputs, {STATIC}) -> Tensor[]",
    _rnn_fwd_reference_fake,
    _rnn_fwd_reference,
    ("CPU", "CUDA"),
)
rnn_bwd_reference = reference_gradient("rnn_bwd_reference", STATIC, reference.sequence)


def _reference_forward(*call):
    static = len(Static._fields)
    return tuple(ops.rnn_fwd_reference(list(call[:-static]), *call[-static:]))


_opaque = with_reference_gradient(_reference_forward, rnn_bwd_reference, reference.sequence)


def sequence_reference(tensors: Tensors, params: tuple, static: Static, dropout: float):
    tensors = reference.with_masks(tensors, static, dropout)
    if torch.compiler.is_compiling():
        return _opaque((*tensors, *params), tuple(static))
    return reference.sequence(*tensors, *params, *static)


# What both directions of the C++ sequences take: the tensors of a call, and how to read them.
_CPU_CALL = (
    "Tensor input, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? resets, Tensor? batch_sizes, Tensor? masks,"
    " Tensor? recurrent_masks, Tensor? zone_h, Tensor? zone_c, Tensor[] params"
)
_CPU_STATIC = "str mode, bool has_biases, bool bidirectional, float zoneout_h, float zoneout_c, bool layer_norm"


def _rnn_fwd_cpu_fake(
    input, h0, c0, lengths, resets, batch_sizes, masks, recurrent_masks, zone_h, zone_c, params,
    mode, has_biases, bidirectional, zoneout_h, zoneout_c, layer_norm, keep_states, keep_steps,
):  # fmt: skip
    directions = 2 if bidirectional else 1
    cells, _, states = h0.shape
    places = input.shape[:-1]
    output = (*places, directions * states)
    lstm = c0 is not None
    hidden = c0.size(-1) if lstm else states
    kept = hidden * (4 if mode in ("gru", "lstm") else int(zone_h is not None or zoneout_h != 0.0))
    if layer_norm:
        kept += 2 * params[1].size(0) + 4
    return (
        input.new_empty(output),
        input.new_empty(h0.shape),
        input.new_empty(c0.shape if lstm else 0),
        input.new_empty((cells // directions - 1, *output) if keep_states else 0),
        input.new_empty((cells, *places, hidden) if lstm and keep_states else 0),
        input.new_empty((cells, *places, kept) if kept and keep_steps else 0),
    )


# inner: the outputs of all layers but the last. kept: of each step the gates, or h before zoneout; with a layer norm
# also what was normalised, and how.
define(
    f"rnn_fwd_cpu({_CPU_CALL}, {_CPU_STATIC}, bool keep_states, bool keep_steps)"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor inner, Tensor c_all, Tensor kept)",
    _rnn_fwd_cpu_fake,
)


def _rnn_bwd_cpu_fake(
    grad_output, grad_h_n, grad_c_n, grad_h_all, grad_c_all, input, h0, c0, lengths, resets, batch_sizes, masks,
    recurrent_masks, zone_h, zone_c, params, output, inner, c_all, kept, mode, has_biases, bidirectional,
    zoneout_h, zoneout_c, layer_norm, need_input, need_params,
):  # fmt: skip
    return [
        input.new_empty(input.shape if need_input else 0),
        input.new_empty(h0.shape),
        input.new_empty(0 if c0 is None else c0.shape),
        *(input.new_empty(param.shape) for param in (params if need_params else ())),
    ]


# The derivatives by input, h0, c0 and, if need_params, each of params.
define(
    "rnn_bwd_cpu(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_h_all, Tensor? grad_c_all,"
    f" {_CPU_CALL}, Tensor output, Tensor inner, Tensor c_all, Tensor kept, {_CPU_STATIC}, bool need_input,"
    " bool need_params) -> Tensor[]",
    _rnn_bwd_cpu_fake,
)


def widened(tensors, dtype: torch.dtype) -> list:
    """Those of `dtype` in float32 if it is a half type: the kernels compute in it, and keep what the backward needs."""
    if dtype.itemsize != 2:
        return list(tensors)
    return [t.float() if t is not None and t.dtype == dtype else t for t in tensors]


def narrowed(tensors, dtype: torch.dtype) -> tuple:
    """All in `dtype` if it is a half type."""
    return tuple([t.to(dtype) for t in tensors]) if dtype.itemsize == 2 else tuple(tensors)


def _cpu_static(static: Static) -> tuple:
    return (
        static.mode, static.has_biases, static.bidirectional, static.zoneout_h, static.zoneout_c, static.layer_norm
    )  # fmt: skip


def _cpu_forward(call, keep: bool) -> tuple[tuple, tuple]:
    """What the public function returns of a flat call, and what its backward needs beside the call."""
    tensors, params, static = split(call)
    dtype = tensors.input.dtype
    output, h_n, c_n, inner, c_all, kept = ops.rnn_fwd_cpu(
        *widened(tensors, dtype), widened(params, dtype), *_cpu_static(static), keep or static.all_states, keep
    )
    found = (output, h_n, c_n) if static.is_lstm else (output, h_n)
    if static.all_states:
        outputs = torch.cat((inner, output[None])).unflatten(-1, (static.directions, -1))
        h_all = outputs.movedim(-2, 1).flatten(0, 1)
        found = (*found, h_all, c_all) if static.is_lstm else (*found, h_all)
    return narrowed(found, dtype), (output, inner, c_all, kept)


class _CpuSequence(torch.autograd.Function):
    """Forward and backward by hand; the second derivative is the reference's."""

    @staticmethod
    def forward(ctx, static, *inputs):
        found, saved = _cpu_forward((*inputs, *static), keep=True)
        ctx.static = static
        ctx.save_for_backward(*inputs, *saved)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx, *grads):
        *inputs, output, inner, c_all, kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        call = (*inputs, *ctx.static)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # only under create_graph=True
            return None, *gradients(reference.sequence(*call), inputs, needs, grads, create_graph=True)
        if all(grad is None for grad in grads):
            return None, *[None for _ in needs]
        tensors, params, static = split(call)
        dtype = tensors.input.dtype
        grad_output, grad_h_n, *rest = widened(grads, dtype)
        grad_c_n = rest.pop(0) if static.is_lstm else None
        grad_h_all, grad_c_all = (*rest, None, None)[:2]
        head = len(tensors)
        found = ops.rnn_bwd_cpu(
            grad_output, grad_h_n, grad_c_n, grad_h_all, grad_c_all, *widened(tensors, dtype), widened(params, dtype),
            output, inner, c_all, kept, *_cpu_static(static), needs[0], any(needs[head:]),
        )  # fmt: skip
        found = narrowed(found, dtype)
        every = (*found[:3], *[None for _ in range(head - 3)], *(found[3:] or [None for _ in params]))
        return None, *[grad if need else None for grad, need in zip(every, needs, strict=True)]


def sequence_cpu(tensors: Tensors, params: tuple, static: Static, dropout: float):
    tensors = reference.with_masks(tensors, static, dropout)
    inputs = (*tensors, *params)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs]):
        return _CpuSequence.apply(tuple(static), *(distinct(inputs) if torch.compiler.is_compiling() else inputs))
    return _cpu_forward((*inputs, *static), keep=False)[0]


def _cell_cpu(mode: str):
    """A cell is a sequence of one step."""

    def cell(input, *rest):
        *states, w_ih, w_hh, b_ih, b_hh = rest
        static = Static(mode, b_ih is not None)
        params = (w_ih, w_hh) if b_ih is None else (w_ih, w_hh, b_ih, b_hh)
        _, *found = sequence_cpu(Tensors(input[None], *(state[None] for state in states)), params, static, 0.0)
        return tuple(state[0] for state in found) if len(states) == 2 else found[0][0]

    return cell


def _like(state: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(state, memory_format=torch.contiguous_format)


# The pointwise half of a cell on a GPU: gi = W_ih·x + b_ih and gh = W_hh·h + b_hh are torch's.
def _triton(name: str):
    def implementation(*args):
        from fused_ops.rnn import triton_kernels

        return getattr(triton_kernels, name)(*args)

    return implementation


for backend, keys in (("triton", TRITON_KEYS), ("cuda", ())):
    for schema, fake in (
        ("rnn_cell_fwd_{}(Tensor gi, Tensor gh, bool relu) -> Tensor h", lambda gi, gh, relu: _like(gi)),
        ("gru_cell_fwd_{}(Tensor gi, Tensor gh, Tensor h) -> Tensor h_new", lambda gi, gh, h: _like(h)),
        (
            "lstm_cell_fwd_{}(Tensor gi, Tensor gh, Tensor c) -> (Tensor h, Tensor c_new)",
            lambda gi, gh, c: (_like(c), _like(c)),
        ),
    ):
        name = schema[: schema.index("_{}")]
        define(schema.format(backend), fake, _triton(name), keys)


def _in_float(gates):
    """`gates` computed in float32 for half types, as the kernels do."""

    def maths(*args):
        compute = torch.promote_types(args[0].dtype, torch.float32)
        found = gates(*(a.to(compute) if isinstance(a, torch.Tensor) else a for a in args))
        return tuple(t.to(args[0].dtype) for t in (found if isinstance(found, tuple) else (found,)))

    return maths


_rnn_maths, _gru_maths, _lstm_maths = map(_in_float, (reference.rnn_gates, reference.gru_gates, reference.lstm_gates))
_rnn_bwd = reference_gradient("rnn_gates_bwd_reference", "bool relu", _rnn_maths)
_gru_bwd = reference_gradient("gru_gates_bwd_reference", "", _gru_maths)
_lstm_bwd = reference_gradient("lstm_gates_bwd_reference", "", _lstm_maths)


def _cells(backend: str) -> tuple:
    """(rnn_tanh_cell, rnn_relu_cell, gru_cell, lstm_cell) on `backend`."""
    rnn_op, gru_op, lstm_op = (getattr(ops, f"{kind}_cell_fwd_{backend}") for kind in ("rnn", "gru", "lstm"))
    rnn = with_reference_gradient(lambda gi, gh, relu: (rnn_op(gi, gh, relu),), _rnn_bwd, _rnn_maths)
    gru = with_reference_gradient(lambda gi, gh, h: (gru_op(gi, gh, h),), _gru_bwd, _gru_maths)
    lstm = with_reference_gradient(lambda gi, gh, c: lstm_op(gi, gh, c), _lstm_bwd, _lstm_maths)

    def projections(input, h, w_ih, w_hh, b_ih, b_hh):
        return torch.nn.functional.linear(input, w_ih, b_ih), torch.nn.functional.linear(h, w_hh, b_hh)

    def rnn_tanh_cell(*inputs):
        return rnn(projections(*inputs), (False,))[0]

    def rnn_relu_cell(*inputs):
        return rnn(projections(*inputs), (True,))[0]

    def gru_cell(input, h, *weights):
        return gru((*projections(input, h, *weights), h), ())[0]

    def lstm_cell(input, h, c, *weights):
        return lstm((*projections(input, h, *weights), c), ())

    return rnn_tanh_cell, rnn_relu_cell, gru_cell, lstm_cell


CELLS = {backend: _cells(backend) for backend in ("triton", "cuda")}
CPU_CELLS = tuple(_cell_cpu(mode) for mode in ("rnn_tanh", "rnn_relu", "gru", "lstm"))
