"""RNNs in PyTorch: its own op where it has one, eager maths where it has none. Everything here is time-major.

A sequence is a flat call, so that `core.autograd` can differentiate it:

    input (T, B, I), or packed (total, I) with batch_sizes (T,)      h0 (layers·directions, B, h)      c0 or None
    lengths (B,) or None      resets (T, B) bool or None      batch_sizes or None
    masks: what a layer's output is multiplied by, (layers - 1, *shape of a layer's output) or None
    recurrent_masks: what h is multiplied by where it enters W_hh, (layers·directions, B, h) or None
    zone_h, zone_c: where a step keeps the state it had, (layers·directions, T, B, h), or packed, bool or None
    *params, in torch.nn order, each cell's followed by its layer norms', see `Weights`      *static, see `Static`

and its result is (output, h_n[, c_n][, h_all[, c_all]]).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.core.autograd import twice_differentiable

EPS = 1e-5  # of a layer norm


class Static(NamedTuple):
    """What a sequence call holds beside its tensors. `mode` is the public function's name.

    zoneout_h, zoneout_c: how much of its old state a step keeps in expectation, where there is no zone_h or zone_c.
    """

    mode: str
    has_biases: bool = True
    num_layers: int = 1
    bidirectional: bool = False
    all_states: bool = False
    zoneout_h: float = 0  # an int: Dynamo would take 0.0 for a symbol, and trace twice
    zoneout_c: float = 0
    layer_norm: bool = False

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def is_lstm(self) -> bool:
        return self.mode == "lstm"

    @property
    def gates(self) -> int:
        return {"gru": 3, "lstm": 4}.get(self.mode, 1)

    @property
    def norms(self) -> int:
        """Parameters of a cell's layer norms."""
        return (4 if self.is_lstm else 2) if self.layer_norm else 0


STATIC = (
    "str mode, bool has_biases, int num_layers, bool bidirectional, bool all_states, float zoneout_h, float zoneout_c,"
    " bool layer_norm"
)


class Tensors(NamedTuple):
    """The tensors of a sequence call that are not parameters."""

    input: Tensor
    h0: Tensor
    c0: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    batch_sizes: Tensor | None = None
    masks: Tensor | None = None
    recurrent_masks: Tensor | None = None
    zone_h: Tensor | None = None
    zone_c: Tensor | None = None


class Weights(NamedTuple):
    """The parameters of one cell, in the order of a flat call: W_hr (LSTM) and the layer norms' where there are any."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    norm_ih: Tensor | None = None
    norm_hh: Tensor | None = None
    norm_c: Tensor | None = None
    bias_c: Tensor | None = None


def split(call: Sequence) -> tuple[Tensors, tuple, Static]:
    """A flat call as (tensors, params, static)."""
    head, tail = len(Tensors._fields), len(Static._fields)
    return Tensors(*call[:head]), tuple(call[head:-tail]), Static(*call[-tail:])


def weights_of(params: tuple, cell: int, static: Static) -> Weights:
    """The parameters of one cell."""
    per_cell = len(params) // (static.num_layers * static.directions)
    w_ih, w_hh, *rest = params[cell * per_cell : (cell + 1) * per_cell]
    biases = (rest.pop(0), rest.pop(0)) if static.has_biases else (None, None)
    norms = rest[-static.norms :] if static.layer_norm else ()
    return Weights(w_ih, w_hh, *biases, rest[0] if len(rest) > len(norms) else None, *norms)


def projected(params: tuple, static: Static) -> bool:
    """Whether each cell has a W_hr."""
    per_cell = len(params) // (static.num_layers * static.directions)
    return per_cell > (4 if static.has_biases else 2) + static.norms


def zoned(tensors: Tensors, static: Static) -> bool:
    """Whether there is zoneout, drawn or expected."""
    drawn = tensors.zone_h is not None or tensors.zone_c is not None
    return drawn or static.zoneout_h != 0.0 or static.zoneout_c != 0.0


def torch_has_it(tensors: Tensors, static: Static) -> bool:
    """Whether PyTorch's own op serves the call, `lengths` by way of its packed one."""
    plain = tensors.resets is None and tensors.recurrent_masks is None
    return plain and not (static.all_states or static.layer_norm or zoned(tensors, static))


def sequence(*call) -> tuple[Tensor, ...]:
    """The whole call on PyTorch's own op, or on `maths` where it has none."""
    tensors, params, static = split(call)
    if torch_has_it(tensors, static):
        if tensors.lengths is None:
            return _torch_sequence(tensors, params, static)
        if tensors.input.is_cpu and not torch._C._functorch.get_dynamic_layer_stack_depth():
            return _by_packing(tensors, params, static)
    return maths(*call)


def with_masks(tensors: Tensors, static: Static, dropout: float) -> Tensors:
    """The same with the masks of the dropout between layers, if there is any."""
    if dropout == 0.0:
        return tensors
    width = tensors.h0.size(-1) * static.directions
    return tensors._replace(masks=dropout_masks(tensors.input, width, static.num_layers, dropout))


def dropout_masks(input: Tensor, width: int, num_layers: int, p: float) -> Tensor:
    """What each layer but the last multiplies its output (..., width) by; drawn as torch draws it on the CPU."""
    ones = input.new_ones(*input.shape[:-1], width)
    return torch.stack([F.dropout(ones, p, training=True) for _ in range(num_layers - 1)])


def _torch_sequence(tensors: Tensors, params: tuple, static: Static) -> tuple[Tensor, ...]:
    input, h0, c0, _, _, batch_sizes, masks, *_ = tensors

    def fused(input, h0, c0, masks, *params):
        return _torch_layers(input, h0, c0, batch_sizes, masks, params, static)

    def double(input, h0, c0, masks, *params):
        plain = Tensors(input, h0, c0, batch_sizes=batch_sizes, masks=masks)
        return maths(*plain, *params, *static)

    # On the CPU torch's own loops can be differentiated twice, and oneDNN's LSTM too, but for half types.
    if input.is_cpu and not (static.is_lstm and input.dtype.itemsize == 2):
        return fused(input, h0, c0, masks, *params)
    return twice_differentiable(fused, double, input, h0, c0, masks, *params)


def _torch_layers(input, h0, c0, batch_sizes, masks, params, static: Static) -> tuple[Tensor, ...]:
    """PyTorch's op: once for all layers, or once a layer where dropout comes between them."""
    if masks is None:
        return _torch_op(input, h0, c0, batch_sizes, params, static)
    per_layer, finals = len(params) // static.num_layers, []
    for layer in range(static.num_layers):
        states = slice(layer * static.directions, (layer + 1) * static.directions)
        input, *final = _torch_op(
            input if layer == 0 else input * masks[layer - 1],
            h0[states],
            c0 if c0 is None else c0[states],
            batch_sizes,
            params[layer * per_layer : (layer + 1) * per_layer],
            static._replace(num_layers=1),
        )
        finals.append(final)
    return input, *(torch.cat(final) for final in zip(*finals))


def _torch_op(input, h0, c0, batch_sizes, params, static: Static) -> tuple[Tensor, ...]:
    hx = h0 if c0 is None else (h0, c0)
    # cuDNN has a backward in training mode only; without dropout the modes are the same.
    rest = (list(params), static.has_biases, static.num_layers, 0.0, torch.is_grad_enabled(), static.bidirectional)
    op = getattr(torch, static.mode)
    return tuple(op(input, hx, *rest, False) if batch_sizes is None else op(input, batch_sizes, hx, *rest))


def _by_packing(tensors: Tensors, params: tuple, static: Static) -> tuple[Tensor, ...]:
    """`lengths` on PyTorch's packed op: rows sorted by length, those of length 0 left out, no padding touched."""
    input, h0, c0, lengths, _, _, masks, *_ = tensors
    lengths, order = lengths.sort(descending=True, stable=True)
    rows = int((lengths > 0).sum())
    if rows == 0:
        return maths(*tensors, *params, *static)
    order, lengths = order[:rows], lengths[:rows]
    time = torch.arange(int(lengths[0]))
    live = time[:, None] < lengths  # (longest, rows), and a packed tensor holds its True places in this order
    where = (time[:, None] * input.size(1) + order)[live]

    def pack(padded: Tensor) -> Tensor:
        return padded.flatten(-3, -2).index_select(-2, where)

    packed = tensors._replace(
        input=pack(input),
        h0=h0.index_select(1, order),
        c0=c0 if c0 is None else c0.index_select(1, order),
        lengths=None,
        batch_sizes=live.sum(1),
        masks=masks if masks is None else pack(masks),
    )
    output, *finals = _torch_sequence(packed, params, static)
    padded = output.new_zeros(input.size(0) * input.size(1), output.size(-1)).index_copy(0, where, output)
    starts = (h0,) if c0 is None else (h0, c0)
    return padded.unflatten(0, input.shape[:2]), *(s.index_copy(1, order, f) for s, f in zip(starts, finals))


def maths(*call) -> tuple[Tensor, ...]:
    """The recurrences step by step, batched, with masks. Half types are computed in float32."""
    tensors, params, static = split(call)
    dtype = tensors.input.dtype
    compute = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    tensors = Tensors(*[t.to(compute) if t is not None and t.is_floating_point() else t for t in tensors])
    params, valid, packed = tuple([t.to(compute) for t in params]), _valid(tensors), tensors.batch_sizes is not None

    def padded(of_steps: Tensor) -> Tensor:
        return _unpacked(of_steps, valid) if packed else of_steps

    x = padded(tensors.input)
    if valid is not None and not packed:
        x = x.masked_fill(~valid[..., None], 0.0)
    h_all, c_all, h_n, c_n = [], [], [], []
    for layer in range(static.num_layers):
        if layer and tensors.masks is not None:
            x = x * padded(tensors.masks[layer - 1])
        for direction in range(static.directions):
            at = layer * static.directions + direction
            h, c, mask, zone_h, zone_c = (
                t if t is None else t[at]
                for t in (tensors.h0, tensors.c0, tensors.recurrent_masks, tensors.zone_h, tensors.zone_c)
            )
            zones = (z if z is None else padded(z) for z in (zone_h, zone_c))
            cell = _Cell(weights_of(params, at, static), static, direction == 1, valid, tensors.resets, mask, *zones)
            for into, found in zip((h_all, c_all, h_n, c_n), _scan(x, h, c, cell)):
                into.append(found)
        x = torch.cat(h_all[-static.directions :], -1)
    found = [x[valid] if packed else x, torch.stack(h_n)]
    if static.is_lstm:
        found.append(torch.stack(c_n))
    if static.all_states:
        found.append(torch.stack(h_all))
        if static.is_lstm:
            found.append(torch.stack(c_all))
    return tuple(t.to(dtype) for t in found)


def _valid(tensors: Tensors) -> Tensor | None:
    """(T, B) bool: which steps of which row there are; None for all."""
    if tensors.batch_sizes is not None:
        sizes = tensors.batch_sizes.to(tensors.input.device)
        return torch.arange(tensors.h0.size(1), device=sizes.device) < sizes[:, None]
    if tensors.lengths is None:
        return None
    return torch.arange(tensors.input.size(0), device=tensors.lengths.device)[:, None] < tensors.lengths


def _unpacked(packed: Tensor, valid: Tensor) -> Tensor:
    return packed.new_zeros(*valid.shape, packed.size(-1)).index_put((valid,), packed)


class _Cell(NamedTuple):
    """One direction of one layer: what its steps need beside input and state. valid, resets and zones are by step."""

    weights: Weights
    static: Static
    reverse: bool
    valid: Tensor | None
    resets: Tensor | None
    mask: Tensor | None
    zone_h: Tensor | None
    zone_c: Tensor | None


def _scan(x, h, c, cell: _Cell):
    """(h of every step, c of every step, last h, last c)."""
    gi = _product(x, cell.weights.w_ih, cell.weights.norm_ih, cell.weights.b_ih)
    steps = range(x.size(0))
    hs, cs = [h] * len(steps), [c] * len(steps)
    for t in reversed(steps) if cell.reverse else steps:
        before = (h, c)
        if cell.resets is not None:
            before = tuple(s if s is None else s.masked_fill(cell.resets[t][:, None], 0.0) for s in before)
        if cell.valid is not None:  # a step that is not there must not multiply its gradient, 0, by a NaN
            before = tuple(s if s is None else s.masked_fill(~cell.valid[t][:, None], 0.0) for s in before)
        now = _step(gi[t], *before, cell, t)
        if cell.valid is None:
            (h, c), (hs[t], cs[t]) = now, now
            continue
        live = cell.valid[t][:, None]
        hs[t], cs[t] = (s if s is None else s.masked_fill(~live, 0.0) for s in now)
        h, c = (s if s is None else torch.where(live, s, old) for s, old in zip(now, (h, c)))
    return torch.stack(hs), None if c is None else torch.stack(cs), h, c


def _step(gi, h, c, cell: _Cell, t: int) -> tuple[Tensor, Tensor | None]:
    weights, static = cell.weights, cell.static
    gh = _product(h if cell.mask is None else h * cell.mask, weights.w_hh, weights.norm_hh, weights.b_hh)
    new_c = None
    if static.is_lstm:
        new, new_c = lstm_gates(gi, gh, c, weights.norm_c, weights.bias_c)
        new = new if weights.w_hr is None else F.linear(new, weights.w_hr)
        new_c = _zoned_out(new_c, c, None if cell.zone_c is None else cell.zone_c[t], static.zoneout_c)
    elif static.mode == "gru":
        new = gru_gates(gi, gh, h)
    else:
        new = rnn_gates(gi, gh, static.mode == "rnn_relu")
    return _zoned_out(new, h, None if cell.zone_h is None else cell.zone_h[t], static.zoneout_h), new_c


def _product(x: Tensor, weight: Tensor, norm: Tensor | None, bias: Tensor | None) -> Tensor:
    """W·x + b, or LN(W·x)·norm + b."""
    return F.linear(x, weight, bias) if norm is None else normalised(F.linear(x, weight), norm, bias)


def normalised(x: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    """(x - mean)/√(variance + EPS)·norm + bias, over the last dimension, variance biased."""
    return F.layer_norm(x, norm.shape, norm, bias, EPS)


def _zoned_out(new: Tensor, old: Tensor, zone: Tensor | None, share: float) -> Tensor:
    """The old state where `zone` is True; without a zone share·old + (1 - share)·new."""
    if zone is not None:
        return torch.where(zone, old, new)
    return share * old + (1.0 - share) * new if share else new


def rnn_gates(gi: Tensor, gh: Tensor, relu: bool) -> Tensor:
    """f(gi + gh); gi = W_ih·x + b_ih and gh = W_hh·h + b_hh, here and below (batch, gates·hidden)."""
    return torch.relu(gi + gh) if relu else torch.tanh(gi + gh)


def gru_gates(gi: Tensor, gh: Tensor, h: Tensor) -> Tensor:
    """r, z = σ(gi + gh), n = tanh(gi + r·gh), h' = (1 - z)·n + z·h."""
    (r_i, z_i, n_i), (r_h, z_h, n_h) = gi.chunk(3, -1), gh.chunk(3, -1)
    n = torch.tanh(n_i + torch.sigmoid(r_i + r_h) * n_h)
    return n + torch.sigmoid(z_i + z_h) * (h - n)


def lstm_gates(gi: Tensor, gh: Tensor, c: Tensor, norm_c=None, bias_c=None) -> tuple[Tensor, Tensor]:
    """i, f, o = σ(gi + gh), g = tanh(gi + gh), c' = f·c + i·g, h' = o·tanh(c'), or o·tanh(LN(c')·norm_c + bias_c)."""
    i, f, g, o = (gi + gh).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c if norm_c is None else normalised(c, norm_c, bias_c)), c


def rnn_tanh_cell(input, h, w_ih, w_hh, b_ih, b_hh) -> Tensor:
    return torch.rnn_tanh_cell(input, h, w_ih, w_hh, b_ih, b_hh)


def rnn_relu_cell(input, h, w_ih, w_hh, b_ih, b_hh) -> Tensor:
    return torch.rnn_relu_cell(input, h, w_ih, w_hh, b_ih, b_hh)


def gru_cell(input, h, w_ih, w_hh, b_ih, b_hh) -> Tensor:
    return torch.gru_cell(input, h, w_ih, w_hh, b_ih, b_hh)


def lstm_cell(input, h, c, w_ih, w_hh, b_ih, b_hh) -> tuple[Tensor, Tensor]:
    return torch.lstm_cell(input, (h, c), w_ih, w_hh, b_ih, b_hh)
