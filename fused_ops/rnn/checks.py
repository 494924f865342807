"""What the public functions refuse: each error names the argument, what was wanted and what came."""

import torch
from torch import Tensor

from fused_ops.core.errors import ArgumentError
from fused_ops.rnn.noise import Noise
from fused_ops.rnn.op import check_lengths
from fused_ops.rnn.reference import Static, Tensors


def _tensor(name: str, value: object, like: Tensor | None = None) -> None:
    """A tensor, of the dtype and device of `like` (autocast may still change the dtype)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if like is None:
        return
    if value.device != like.device:
        raise ArgumentError(name, f"on input's device {like.device}", value.device)
    if value.dtype != like.dtype and not torch._C._is_any_autocast_enabled():
        raise ArgumentError(name, f"of input's dtype {like.dtype}", value.dtype)


def _tensors(name: str, values: tuple, like: Tensor) -> None:
    """Each as `_tensor` wants it; `name` has a place for its number."""
    dtype, device = like.dtype, like.device
    for i, value in enumerate(values):
        if not isinstance(value, Tensor) or value.dtype != dtype or value.device != device:
            _tensor(name.format(i), value, like)


def _shape(name: str, value: Tensor, wanted: tuple, meaning: str = "") -> None:
    if value.shape != wanted:
        raise ArgumentError(name, f"of shape {tuple(wanted)}{meaning}", f"{tuple(value.shape)}")


def check_noise(noise: Noise, static: Static) -> None:
    if noise[1:] == (0, 0, 0, 0):
        return
    for name in ("dropout", "weight_dropout", "variational_dropout"):
        _probability(name, getattr(noise, name))
    if not isinstance(noise.zoneout, (tuple, list)):
        return _probability("zoneout", noise.zoneout)
    if not static.is_lstm or len(noise.zoneout) != 2:
        wanted = "a number, or a pair of numbers (for h, for c)" if static.is_lstm else "a number"
        raise ArgumentError("zoneout", wanted, noise.zoneout)
    for i, p in enumerate(noise.zoneout):
        _probability(f"zoneout[{i}]", p)


def _probability(name: str, p: float) -> None:
    if not isinstance(p, (int, float)) or isinstance(p, bool):
        raise TypeError(f"{name} must be a number, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise ArgumentError(name, "between 0 and 1", p)


def check_sequence(tensors: Tensors, params: tuple, static: Static) -> None:
    """Dtypes, devices and shapes of a whole call, time-major."""
    input = tensors.input
    _tensor("input", input)
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}")
    shape, packed = input.shape, tensors.batch_sizes is not None
    if len(shape) != (2 if packed else 3):
        raise ArgumentError("input", f"{2 if packed else 3}-dimensional", f"shape {tuple(shape)}")
    if not packed and shape[0] == 0:
        raise ArgumentError("input", "of at least one step (Expected sequence length to be larger than 0 in RNN)", 0)
    batch = None if packed else shape[1]
    hidden, projected = _check_params(input, params, static)
    layers = static.num_layers * static.directions
    states = (("hx[0]", tensors.h0, projected), ("hx[1]", tensors.c0, hidden))
    for name, state, size in states if static.is_lstm else (("hx", tensors.h0, hidden),):
        _tensor(name, state, input)
        if batch is None and state.dim() == 3:
            batch = state.size(1)  # of a packed sequence
        _shape(name, state, (layers, batch, size), " (layers·directions, batch, hidden)")
    if tensors.resets is not None:
        _tensor("resets", tensors.resets)
        if tensors.resets.dtype != torch.bool:
            raise TypeError(f"resets must be bool, got {tensors.resets.dtype}")
        _shape("resets", tensors.resets, (shape[0], batch), " (time, batch) in input's layout")
    if tensors.lengths is not None:
        _check_lengths(tensors.lengths, input)


def _check_lengths(lengths: Tensor, input: Tensor) -> None:
    _tensor("lengths", lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    _shape("lengths", lengths, (input.size(1),), " (batch,)")
    # On a GPU values are not read back; under torch.compile the op itself looks.
    if lengths.is_cpu and type(lengths) is Tensor and not torch.compiler.is_compiling():
        check_lengths(lengths, input.size(0))


def _check_params(input: Tensor, params: tuple, static: Static) -> tuple[int, int]:
    """(hidden size, size of h), which the first cell's weights say and all others must agree with."""
    cells = static.num_layers * static.directions
    per_cell = (4 if static.has_biases else 2) + static.norms
    allowed = (per_cell, per_cell + 1) if static.is_lstm else (per_cell,)
    if cells < 1:
        raise ArgumentError("num_layers", "at least 1", static.num_layers)
    if len(params) % cells or len(params) // cells not in allowed:
        wanted = " or ".join(f"{count * cells} tensors" for count in allowed)
        raise ArgumentError("params", f"{wanted} (got an incorrect number of RNN parameters)", len(params))
    has_projection, per_cell = len(params) // cells > per_cell, len(params) // cells
    _tensors("params[{}]", params, input)
    shapes = [param.shape for param in params]
    if len(shapes[0]) != 2 or shapes[0][0] % static.gates:
        raise ArgumentError("params[0]", f"({static.gates}·hidden, {input.size(-1)})", f"{tuple(shapes[0])}")
    rows = shapes[0][0]
    hidden = projected = rows // static.gates
    if has_projection:
        w_hr = per_cell - static.norms - 1
        if len(shapes[w_hr]) != 2:
            raise ArgumentError(f"params[{w_hr}]", f"(projected, {hidden})", f"{tuple(shapes[w_hr])}")
        projected = shapes[w_hr][0]
    others = [(rows, projected)]
    others += [(rows,), (rows,)] if static.has_biases else []
    others += [(projected, hidden)] if has_projection else []
    others += [(rows,), (rows,), (hidden,), (hidden,)][: static.norms]
    for cell in range(cells):
        features = input.shape[-1] if cell < static.directions else projected * static.directions
        first, wanted = cell * per_cell, [(rows, features), *others]
        if shapes[first : first + per_cell] != wanted:
            i = next(i for i, shape in enumerate(wanted, first) if shapes[i] != shape)
            raise ArgumentError(f"params[{i}]", f"of shape {wanted[i - first]}", f"{tuple(shapes[i])}")
    return hidden, projected


def check_cell(input, states: tuple[tuple[str, Tensor], ...], w_ih, w_hh, b_ih, b_hh, gates: int) -> None:
    """A cell's tensors; input (batch, input size) or (input size,), the states likewise."""
    _tensor("input", input)
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}")
    if input.dim() not in (1, 2):
        raise ArgumentError("input", "1D or 2D", f"{input.dim()}D")
    for name, weight in (("w_ih", w_ih), ("w_hh", w_hh)):
        _tensor(name, weight, input)
        if weight.dim() != 2:
            raise ArgumentError(name, "2-dimensional", f"shape {tuple(weight.shape)}")
    hidden = w_hh.size(1)
    if w_ih.size(1) != input.size(-1):
        raise ArgumentError("input", f"of {w_ih.size(1)} features like w_ih (inconsistent input_size)", input.size(-1))
    _shape("w_hh", w_hh, (gates * hidden, hidden))
    _shape("w_ih", w_ih, (gates * hidden, w_ih.size(1)))
    for name, state in states:
        _tensor(name, state, input)
        _shape(name, state, (*input.shape[:-1], hidden), " (batch, hidden)")
    if (b_ih is None) != (b_hh is None):
        raise ArgumentError("b_hh", "given exactly when b_ih is", "one of the two")
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            _tensor(name, bias, input)
            _shape(name, bias, (gates * hidden,))
