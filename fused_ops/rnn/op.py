"""Schemas, fake kernels and derivatives of the RNN kernels."""

import torch

from fused_ops.core.autograd import reference_gradient, with_reference_gradient
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
    if dropout > 0.0:
        width = tensors.h0.size(-1) * static.directions
        tensors = tensors._replace(masks=reference.dropout_masks(tensors.input, width, static.num_layers, dropout))
    if torch.compiler.is_compiling():
        return _opaque((*tensors, *params), tuple(static))
    return reference.sequence(*tensors, *params, *static)


def _gru_fwd_cpu_fake(input, h0, lengths, batch_sizes, params, has_biases, bidirectional):
    directions = 2 if bidirectional else 1
    return input.new_empty(*input.shape[:-1], directions * h0.size(-1)), torch.empty_like(
        h0, memory_format=torch.contiguous_format
    )


define(
    "gru_fwd_cpu(Tensor input, Tensor h0, Tensor? lengths, Tensor? batch_sizes, Tensor[] params, bool has_biases,"
    " bool bidirectional) -> (Tensor output, Tensor h_n)",
    _gru_fwd_cpu_fake,
)


def _gru_cpu_forward(*call):
    tensors, params, static = split(call)
    return ops.gru_fwd_cpu(
        tensors.input,
        tensors.h0,
        tensors.lengths,
        tensors.batch_sizes,
        list(params),
        static.has_biases,
        static.bidirectional,
    )


_gru_cpu = with_reference_gradient(_gru_cpu_forward, rnn_bwd_reference, reference.sequence)


def gru_cpu(tensors: Tensors, params: tuple, static: Static, dropout: float):
    return _gru_cpu((*tensors, *params), tuple(static))


def _like(state: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(state, memory_format=torch.contiguous_format)


define(
    "gru_cell_fwd_cpu(Tensor input, Tensor h, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh) -> Tensor",
    lambda input, h, w_ih, w_hh, b_ih, b_hh: _like(h),
)


def _cell_maths(input, h, w_ih, w_hh, b_ih, b_hh):
    return (reference.gru_cell(input, h, w_ih, w_hh, b_ih, b_hh),)


_gru_cell_cpu = with_reference_gradient(
    lambda *inputs: (ops.gru_cell_fwd_cpu(*inputs),),
    reference_gradient("gru_cell_bwd_reference", "", _cell_maths),
    _cell_maths,
)


def gru_cell_cpu(*inputs):
    return _gru_cell_cpu(inputs, ())[0]


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
