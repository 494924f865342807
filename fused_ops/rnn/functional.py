"""RNNs and their cells, named and ordered like torch's own functions (`torch.gru`, `torch.gru_cell`, ...)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_ops.core.errors import ArgumentError
from fused_ops.rnn import rules
from fused_ops.rnn.checks import check_cell, check_noise, check_sequence
from fused_ops.rnn.noise import Noise, drawn
from fused_ops.rnn.reference import Static, Tensors


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
    layer_norm: bool = False,
    zoneout: float = 0,
    weight_dropout: float = 0,
    variational_dropout: float = 0,
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
        layer_norm: W_ih·x_t + b_ih becomes LN(W_ih·x_t)·norm_ih + b_ih, and W_hh·h_{t−1} + b_hh likewise, with
            LN(v) = (v − mean)/√(variance + 1e-5) over all gates·hidden values. Each cell's params end with norm_ih and
            norm_hh (gates·hidden,).
        zoneout: share p of its old state that h keeps in each step: h_t = h_{t−1} where a mask drawn with probability p
            is True if train, otherwise the expectation p·h_{t−1} + (1 − p)·h̃_t. It acts after a reset.
        weight_dropout: probability of zeroing an element of W_hh, one mask for all steps, if train (DropConnect).
        variational_dropout: probability of zeroing an element of each layer's input, and of h_{t−1} where W_hh
            multiplies it, one mask of a row for all its steps, if train.
        backend: a backend's name or "auto"; default as set by `use_backend`.

    Returns:
        output (time, batch, directions·hidden), the last layer's h_t (batch first if batch_first), and h_n
        (layers·directions, batch, hidden)[, h_all].

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
        BackendUnavailable: `backend` cannot serve the call.

    Source: Elman 1990, "Finding structure in time"; semantics of `torch.nn.RNN`. Layer norm: Ba et al. 2016,
    supplementary material. Zoneout: Krueger et al. 2016, section 3. Weight dropout: Wan et al. 2013, as Merity et al.
    2018, section 2 use it. Variational dropout: Gal and Ghahramani 2016, section 4.
    """
    static = Static("rnn_tanh", has_biases, num_layers, bidirectional, return_all_states, layer_norm=layer_norm)
    noise = Noise(train, dropout, zoneout, weight_dropout, variational_dropout)
    return _sequence(static, noise, input, hx, None, params, batch_first, lengths, resets, backend)


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
    layer_norm: bool = False,
    zoneout: float = 0,
    weight_dropout: float = 0,
    variational_dropout: float = 0,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r"""h_t = max(0, W_ih·x_t + b_ih + W_hh·h_{t−1} + b_hh), over time, layers and directions.

    Arguments, result, errors and source as for `rnn_tanh`.
    """
    static = Static("rnn_relu", has_biases, num_layers, bidirectional, return_all_states, layer_norm=layer_norm)
    noise = Noise(train, dropout, zoneout, weight_dropout, variational_dropout)
    return _sequence(static, noise, input, hx, None, params, batch_first, lengths, resets, backend)


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
    layer_norm: bool = False,
    zoneout: float = 0,
    weight_dropout: float = 0,
    variational_dropout: float = 0,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r"""h_t = (1 − z)·n + z·h_{t−1}, over time, layers and directions, with

    r, z = σ(W_ih·x_t + b_ih + W_hh·h_{t−1} + b_hh) and n = tanh(W_in·x_t + b_in + r·(W_hn·h_{t−1} + b_hn)).

    The gates are stacked r, z, n in params. Arguments, result and errors as for `rnn_tanh`; with layer_norm all three
    gates are normalised together, and r multiplies n's normalised half; variational dropout leaves z·h_{t−1} alone.

    Source: Cho et al. 2014, section 2.3, with the reset after the product, as in `torch.nn.GRU`.
    """
    static = Static("gru", has_biases, num_layers, bidirectional, return_all_states, layer_norm=layer_norm)
    noise = Noise(train, dropout, zoneout, weight_dropout, variational_dropout)
    return _sequence(static, noise, input, hx, None, params, batch_first, lengths, resets, backend)


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
    layer_norm: bool = False,
    zoneout: float | tuple[float, float] = 0,
    weight_dropout: float = 0,
    variational_dropout: float = 0,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r"""c_t = f·c_{t−1} + i·g and h_t = o·tanh(c_t), over time, layers and directions, with

    i, f, o = σ(W_ih·x_t + b_ih + W_hh·h_{t−1} + b_hh) and g = tanh(the same with g's rows).

    The gates are stacked i, f, g, o in params; each cell's parameters may end with W_hr (projected, hidden), and then
    h_t = W_hr·(o·tanh(c_t)) has the projected size while c_t keeps the hidden size. `hx` is (h_0, c_0).

    With layer_norm each cell's parameters end, after W_hr, with norm_ih, norm_hh (4·hidden,), norm_c, bias_c (hidden,),
    and h_t = o·tanh(LN(c_t)·norm_c + bias_c). zoneout is one number for h and c, or a pair (for h, for c); h̃_t comes
    from c before zoneout. Other arguments and errors as for `rnn_tanh`.

    Returns:
        output, h_n, c_n[, h_all, c_all].

    Source: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000; projection: Sak et al. 2014.
    """
    static = Static("lstm", has_biases, num_layers, bidirectional, return_all_states, layer_norm=layer_norm)
    noise = Noise(train, dropout, zoneout, weight_dropout, variational_dropout)
    h0, c0 = _pair("hx", hx)
    return _sequence(static, noise, input, h0, c0, params, batch_first, lengths, resets, backend)


def _pair(name: str, hx) -> tuple[Tensor, Tensor]:
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        got = f"{len(hx)}" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise ArgumentError(name, "a pair of tensors (h_0, c_0) (lstm expects two hidden states)", got)
    return hx[0], hx[1]


def _sequence(
    static: Static, noise: Noise, input, h0, c0, params, batch_first, lengths, resets, backend
) -> tuple[Tensor, ...]:
    check_noise(noise, static)
    if batch_first and isinstance(input, Tensor) and input.dim() == 3:
        input = input.transpose(0, 1)
        resets = resets.transpose(0, 1) if isinstance(resets, Tensor) and resets.dim() == 2 else resets
    tensors, params = Tensors(input, h0, c0, lengths, resets), tuple(params)
    check_sequence(tensors, params, static)
    if lengths is not None:
        tensors = tensors._replace(lengths=lengths.to(input.device, torch.int64))
    if resets is not None:
        tensors = tensors._replace(resets=resets.to(input.device))
    output, *states = _dispatch(tensors, params, static, noise, backend)
    return output.transpose(0, 1) if batch_first else output, *states


def packed_sequence(
    data: Tensor, batch_sizes: Tensor, hx, params: Sequence[Tensor], static: Static, noise: Noise
) -> tuple[Tensor, ...]:
    """A PackedSequence's data (total, features), batch_sizes (time,) and hx in sorted order -> (data, h_n[, c_n])."""
    check_noise(noise, static)
    h0, c0 = _pair("hx", hx) if static.is_lstm else (hx, None)
    tensors, params = Tensors(data, h0, c0, batch_sizes=batch_sizes), tuple(params)
    check_sequence(tensors, params, static)
    return _dispatch(tensors, params, static, noise, None)


def _dispatch(tensors: Tensors, params: tuple, static: Static, noise: Noise, backend) -> tuple[Tensor, ...]:
    tensors, params, static, dropout = drawn(tensors, params, static, noise)
    everything = (*(t for t in tensors if t is not None), *params)
    return rules.SEQUENCES[static.mode](backend, everything, tensors, params, static, dropout)


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
        return rules.CELLS[name](backend, inputs, *inputs)
    rows = 1 + len(states)
    inputs = (*(t.unsqueeze(0) for t in inputs[:rows]), *weights)
    found = rules.CELLS[name](backend, inputs, *inputs)
    return tuple(t.squeeze(0) for t in found) if isinstance(found, tuple) else found.squeeze(0)
