"""RNNs and their cells, named and ordered like torch's own functions (`torch.gru`, `torch.gru_cell`, ...)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_ops.core import verified
from fused_ops.core.dispatch import Backend, Op
from fused_ops.core.errors import ArgumentError
from fused_ops.rnn import op, reference
from fused_ops.rnn.checks import check_cell, check_dropout, check_sequence
from fused_ops.rnn.reference import Static, Tensors

# What auto knows of the C++ kernels' speed is in bench/results/cpu/rnn_cpu.json, measured with AVX-512.
_VECTORISED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
_NOT_MEASURED = "is slower than torch's GEMM without AVX2"
_TOO_SHORT = (
    "is bitwise independent of the batch, but packs its weights in every call: too much for so few steps"
    " (bench/results/cpu/rnn_cpu.json)"
)
_MANY_ROWS = (
    "is bitwise independent of the batch, but no faster than oneDNN's forward for so many rows"
    " (bench/results/cpu/rnn_cpu.json)"
)


def _differentiates(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _cpu_supports(tensors: Tensors, params: tuple, static: Static, dropout: float) -> str | None:
    if tensors.input.dtype != torch.float32:
        return "takes float32"
    if len(params) != static.num_layers * static.directions * (4 if static.has_biases else 2):
        return "has no projection of the state"
    return None


def _cpu_worthwhile(tensors: Tensors, params: tuple, static: Static, dropout: float) -> str | None:
    if not _VECTORISED:
        return _NOT_MEASURED
    if torch.compiler.is_compiling():  # no guard on a size; a compiled reference runs forward again in its backward
        return None
    batch, hidden = tensors.h0.shape[1:]
    time = (tensors.input if tensors.batch_sizes is None else tensors.batch_sizes).size(0)
    if static.is_lstm:
        plain = tensors.lengths is tensors.resets is tensors.batch_sizes is None and not static.all_states
        if plain and batch >= 32 and not _differentiates(tensors.input, tensors.h0, tensors.c0, *params):
            return _MANY_ROWS
        return None if time >= 8 or batch <= 8 else _TOO_SHORT
    enough = time >= max(8, hidden // 32) or (time >= 4 and batch >= max(8, hidden // 16))
    return None if enough else _TOO_SHORT


def _cell_cpu_supports(input, *rest) -> str | None:
    return None if input.dtype == torch.float32 else "takes float32"


def _cell_cpu_worthwhile(input, *rest) -> str | None:
    if not _VECTORISED:
        return _NOT_MEASURED
    enough = input.size(0) >= 256 and rest[0].size(1) >= 64 and not _differentiates(input, *rest)
    return None if enough else _TOO_SHORT


def _gpu_cell_supports(input, *rest) -> str | None:
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "takes float32, float16 and bfloat16"
    return None


_REFERENCE = Backend("reference", op.sequence_reference)
_SEQUENCE_CPU = Backend("cpu", op.sequence_cpu, _cpu_supports, _cpu_worthwhile, needs="rnn_fwd_cpu")
_SEQUENCES = {mode: Op(mode, _SEQUENCE_CPU, _REFERENCE) for mode in ("rnn_tanh", "rnn_relu", "gru", "lstm")}
_CELL_KERNELS = {
    "triton": verified.kernel("rnn.cells.triton", "rnn/triton_kernels.py"),
    "cuda": verified.kernel("rnn.cells.cuda", "rnn/cells.cu", "rnn/cells.cuh", *verified.CUDA_COMMON),
}
_CELLS = {}
for _index, (_name, _kind) in enumerate(
    (("rnn_tanh_cell", "rnn"), ("rnn_relu_cell", "rnn"), ("gru_cell", "gru"), ("lstm_cell", "lstm"))
):
    _CELLS[_name] = Op(
        _name,
        *(
            Backend(
                backend,
                op.CELLS[backend][_index],
                _gpu_cell_supports,
                needs=f"{_kind}_cell_fwd_cuda" if backend == "cuda" else None,
                kernel=_CELL_KERNELS[backend],
            )
            for backend in ("cuda", "triton")
        ),
        Backend("cpu", op.CPU_CELLS[_index], _cell_cpu_supports, _cell_cpu_worthwhile, needs="rnn_fwd_cpu"),
        Backend("reference", getattr(reference, _name)),
    )


def rnn_tanh(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    return_all_states: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r"""h_t = tanh(W_ih·x_t + b_ih + W_hh·h_{t−1} + b_hh), over time, layers and directions.

    Args:
        input: (time, batch, features), or (batch, time, features) if batch_first.
        hx: h_0, (layers·directions, batch, hidden).
        params: flat in `torch.nn` order: W_ih (gates·hidden, features), W_hh (gates·hidden, hidden)[, b_ih, b_hh
            (gates·hidden,)] for each direction of each layer; a layer after the first takes directions·hidden features.
        has_biases: whether params holds the biases.
        dropout: probability of zeroing an element of each layer's output but the last's, in training.
        train: whether dropout acts.
        bidirectional: a second direction, with weights of its own, runs from the last step to the first.
        lengths: (batch,) integers in [0, time], one row's number of steps, in place of a PackedSequence. Output past a
            length is 0, h_n is the state at the length (h_0 for length 0), the reverse direction starts there, and
            nothing in the padding is read. Default: all steps of all rows.
        resets: bool in input's (time, batch) layout: the state is zeroed before that step, in each direction's own
            order and in every layer. Default: none.
        return_all_states: also return h_all (layers·directions, time, batch, hidden): the state after each step, 0
            past a length.
        backend: a backend's name or "auto"; default as set by `use_backend`.

    Returns:
        output (time, batch, directions·hidden), the last layer's h_t (batch first if batch_first), and h_n
        (layers·directions, batch, hidden)[, h_all].

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
        BackendUnavailable: `backend` cannot serve the call.

    Source: Elman 1990, "Finding structure in time"; semantics of `torch.nn.RNN`.
    """
    static = Static("rnn_tanh", has_biases, num_layers, bidirectional, return_all_states)
    return _sequence(static, input, hx, None, params, dropout if train else 0.0, batch_first, lengths, resets, backend)


def rnn_relu(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    return_all_states: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r"""h_t = max(0, W_ih·x_t + b_ih + W_hh·h_{t−1} + b_hh), over time, layers and directions.

    Arguments, result, errors and source as for `rnn_tanh`.
    """
    static = Static("rnn_relu", has_biases, num_layers, bidirectional, return_all_states)
    return _sequence(static, input, hx, None, params, dropout if train else 0.0, batch_first, lengths, resets, backend)


def gru(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    return_all_states: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r"""h_t = (1 − z)·n + z·h_{t−1}, over time, layers and directions, with

    r, z = σ(W_ih·x_t + b_ih + W_hh·h_{t−1} + b_hh) and n = tanh(W_in·x_t + b_in + r·(W_hn·h_{t−1} + b_hn)).

    The gates are stacked r, z, n in params. Arguments, result and errors as for `rnn_tanh`.

    Source: Cho et al. 2014, section 2.3, with the reset after the product, as in `torch.nn.GRU`.
    """
    static = Static("gru", has_biases, num_layers, bidirectional, return_all_states)
    return _sequence(static, input, hx, None, params, dropout if train else 0.0, batch_first, lengths, resets, backend)


def lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    return_all_states: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r"""c_t = f·c_{t−1} + i·g and h_t = o·tanh(c_t), over time, layers and directions, with

    i, f, o = σ(W_ih·x_t + b_ih + W_hh·h_{t−1} + b_hh) and g = tanh(the same with g's rows).

    The gates are stacked i, f, g, o in params; each cell's parameters may end with W_hr (projected, hidden), and then
    h_t = W_hr·(o·tanh(c_t)) has the projected size while c_t keeps the hidden size. `hx` is (h_0, c_0). Other arguments
    and errors as for `rnn_tanh`.

    Returns:
        output, h_n, c_n[, h_all, c_all].

    Source: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000; projection: Sak et al. 2014.
    """
    static = Static("lstm", has_biases, num_layers, bidirectional, return_all_states)
    h0, c0 = _pair("hx", hx)
    return _sequence(static, input, h0, c0, params, dropout if train else 0.0, batch_first, lengths, resets, backend)


def _pair(name: str, hx) -> tuple[Tensor, Tensor]:
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        got = f"{len(hx)}" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise ArgumentError(name, "a pair of tensors (h_0, c_0) (lstm expects two hidden states)", got)
    return hx[0], hx[1]


def _sequence(
    static: Static, input, h0, c0, params, dropout: float, batch_first, lengths, resets, backend
) -> tuple[Tensor, ...]:
    check_dropout(dropout)
    if batch_first and isinstance(input, Tensor) and input.dim() == 3:
        input = input.transpose(0, 1)
        resets = resets.transpose(0, 1) if isinstance(resets, Tensor) and resets.dim() == 2 else resets
    tensors, params = Tensors(input, h0, c0, lengths, resets), tuple(params)
    check_sequence(tensors, params, static)
    if lengths is not None:
        tensors = tensors._replace(lengths=lengths.to(input.device, torch.int64))
    if resets is not None:
        tensors = tensors._replace(resets=resets.to(input.device))
    output, *states = _dispatch(tensors, params, static, dropout, backend)
    return output.transpose(0, 1) if batch_first else output, *states


def packed_sequence(
    data: Tensor, batch_sizes: Tensor, hx, params: Sequence[Tensor], static: Static, dropout: float = 0.0
) -> tuple[Tensor, ...]:
    """A PackedSequence's data (total, features), batch_sizes (time,) and hx in sorted order -> (data, h_n[, c_n])."""
    h0, c0 = _pair("hx", hx) if static.is_lstm else (hx, None)
    tensors, params = Tensors(data, h0, c0, batch_sizes=batch_sizes), tuple(params)
    check_sequence(tensors, params, static)
    return _dispatch(tensors, params, static, dropout, None)


def _dispatch(tensors: Tensors, params: tuple, static: Static, dropout: float, backend) -> tuple[Tensor, ...]:
    dropout = dropout if static.num_layers > 1 else 0.0
    everything = (*(t for t in tensors if t is not None), *params)
    return _SEQUENCES[static.mode](backend, everything, tensors, params, static, dropout)


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""h' = tanh(W_ih·x + b_ih + W_hh·h + b_hh).

    Args:
        input: x, (batch, features) or (features,).
        hx: h, (batch, hidden) or (hidden,).
        w_ih: (gates·hidden, features).
        w_hh: (gates·hidden, hidden).
        b_ih, b_hh: (gates·hidden,), both or neither.
        backend: a backend's name or "auto"; default as set by `use_backend`.

    Returns:
        h', of h's shape.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
        BackendUnavailable: `backend` cannot serve the call.

    Source: Elman 1990, "Finding structure in time"; semantics of `torch.nn.RNNCell`.
    """
    return _cell("rnn_tanh_cell", 1, input, (("hx", hx),), (w_ih, w_hh, b_ih, b_hh), backend)


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""h' = max(0, W_ih·x + b_ih + W_hh·h + b_hh). Arguments, result, errors and source as for `rnn_tanh_cell`."""
    return _cell("rnn_relu_cell", 1, input, (("hx", hx),), (w_ih, w_hh, b_ih, b_hh), backend)


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""h' = (1 − z)·n + z·h with r, z = σ(W_ih·x + b_ih + W_hh·h + b_hh), n = tanh(W_in·x + b_in + r·(W_hn·h + b_hn)).

    The gates are stacked r, z, n. Arguments, result and errors as for `rnn_tanh_cell`.

    Source: Cho et al. 2014, section 2.3, with the reset after the product, as in `torch.nn.GRUCell`.
    """
    return _cell("gru_cell", 3, input, (("hx", hx),), (w_ih, w_hh, b_ih, b_hh), backend)


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""c' = f·c + i·g and h' = o·tanh(c') with i, f, o = σ(W_ih·x + b_ih + W_hh·h + b_hh), g = tanh(the same).

    The gates are stacked i, f, g, o; `hx` is (h, c). Other arguments and errors as for `rnn_tanh_cell`.

    Returns:
        (h', c').

    Source: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000.
    """
    h, c = _pair("hx", hx)
    return _cell("lstm_cell", 4, input, (("hx[0]", h), ("hx[1]", c)), (w_ih, w_hh, b_ih, b_hh), backend)


def _cell(name: str, gates: int, input, states, weights, backend):
    check_cell(input, states, *weights, gates)
    inputs = (input, *(state for _, state in states), *weights)
    if input.dim() == 2:
        return _CELLS[name](backend, inputs, *inputs)
    rows = 1 + len(states)
    inputs = (*(t.unsqueeze(0) for t in inputs[:rows]), *weights)
    found = _CELLS[name](backend, inputs, *inputs)
    return tuple(t.squeeze(0) for t in found) if isinstance(found, tuple) else found.squeeze(0)
