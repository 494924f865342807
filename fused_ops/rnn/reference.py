"""RNNs in PyTorch: its own op where it has one, eager maths where it has none. Everything here is time-major.

A sequence is a flat call, so that `core.autograd` can differentiate it:

    input (T, B, I), or packed (total, I) with batch_sizes (T,)      h0 (layers·directions, B, h)      c0 or None
    lengths (B,) or None      resets (T, B) bool or None      batch_sizes or None
    masks: inter-layer dropout, scaled, (layers - 1, *shape of a layer's output) or None
    *params, in torch.nn order      *static, see `Static`

and its result is (output, h_n[, c_n][, h_all[, c_all]]).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.core.autograd import twice_differentiable


class Static(NamedTuple):
    """What a sequence call holds beside its tensors. `mode` is the public function's name."""

    mode: str
    has_biases: bool = True
    num_layers: int = 1
    bidirectional: bool = False
    all_states: bool = False

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def is_lstm(self) -> bool:
        return self.mode == "lstm"

    @property
    def gates(self) -> int:
        return {"gru": 3, "lstm": 4}.get(self.mode, 1)


STATIC = "str mode, bool has_biases, int num_layers, bool bidirectional, bool all_states"


class Tensors(NamedTuple):
    """The tensors of a sequence call that are not parameters."""

    input: Tensor
    h0: Tensor
    c0: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    batch_sizes: Tensor | None = None
    masks: Tensor | None = None


def split(call: Sequence) -> tuple[Tensors, tuple, Static]:
    """A flat call as (tensors, params, static)."""
    head, tail = len(Tensors._fields), len(Static._fields)
    return Tensors(*call[:head]), tuple(call[head:-tail]), Static(*call[-tail:])


def sequence(*call) -> tuple[Tensor, ...]:
    """The whole call on PyTorch's own op, or on `maths` where it has none."""
    tensors, params, static = split(call)
    if tensors.resets is None and not static.all_states:
        if tensors.lengths is None:
            return _torch_sequence(tensors, params, static)
        if tensors.input.is_cpu and not torch._C._functorch.get_dynamic_layer_stack_depth():
            return _by_packing(tensors, params, static)
    return maths(*call)


def dropout_masks(input: Tensor, width: int, num_layers: int, p: float) -> Tensor:
    """What each layer but the last multiplies its output (..., width) by; drawn as torch draws it on the CPU."""
    ones = input.new_ones(*input.shape[:-1], width)
    return torch.stack([F.dropout(ones, p, training=True) for _ in range(num_layers - 1)])


def _torch_sequence(tensors: Tensors, params: tuple, static: Static) -> tuple[Tensor, ...]:
    input, h0, c0, _, _, batch_sizes, masks = tensors

    def fused(input, h0, c0, masks, *params):
        return _torch_layers(input, h0, c0, batch_sizes, masks, params, static)

    def double(input, h0, c0, masks, *params):
        return maths(input, h0, c0, None, None, batch_sizes, masks, *params, *static)

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
    input, h0, c0, lengths, _, _, masks = tensors
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
    x, h0, c0, masks, *params = (
        t if t is None else t.to(compute) for t in (tensors.input, tensors.h0, tensors.c0, tensors.masks, *params)
    )
    valid, packed = _valid(tensors), tensors.batch_sizes is not None
    if packed:
        x = _unpacked(x, valid)
    elif valid is not None:
        x = x.masked_fill(~valid[..., None], 0.0)
    per_cell = len(params) // (static.num_layers * static.directions)
    h_all, c_all, h_n, c_n = [], [], [], []
    for layer in range(static.num_layers):
        if layer and masks is not None:
            x = x * (_unpacked(masks[layer - 1], valid) if packed else masks[layer - 1])
        for direction in range(static.directions):
            cell = layer * static.directions + direction
            weights = params[cell * per_cell : (cell + 1) * per_cell]
            state = (h0[cell], None if c0 is None else c0[cell])
            hs, cs, h, c = _scan(x, state, weights, valid, tensors.resets, static, direction == 1)
            h_all.append(hs), c_all.append(cs), h_n.append(h), c_n.append(c)
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


def _scan(x, state, weights, valid, resets, static: Static, reverse: bool):
    """One direction of one layer: (h of every step, c of every step, last h, last c)."""
    h, c = state
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if static.has_biases else (None, None)
    w_hr = weights[-1] if len(rest) % 2 else None
    gi = F.linear(x, w_ih, b_ih)
    steps = range(x.size(0))
    hs, cs = [h] * len(steps), [c] * len(steps)
    for t in reversed(steps) if reverse else steps:
        before = (h, c)
        if resets is not None:
            before = tuple(s if s is None else s.masked_fill(resets[t][:, None], 0.0) for s in before)
        now = _step(gi[t], *before, w_hh, b_hh, w_hr, static)
        if valid is None:
            (h, c), (hs[t], cs[t]) = now, now
            continue
        live = valid[t][:, None]
        hs[t], cs[t] = (s if s is None else s.masked_fill(~live, 0.0) for s in now)
        h, c = (s if s is None else torch.where(live, s, old) for s, old in zip(now, (h, c)))
    return torch.stack(hs), None if c is None else torch.stack(cs), h, c


def _step(gi, h, c, w_hh, b_hh, w_hr, static: Static) -> tuple[Tensor, Tensor | None]:
    gh = F.linear(h, w_hh, b_hh)
    if static.mode == "gru":
        return gru_gates(gi, gh, h), None
    if static.is_lstm:
        h, c = lstm_gates(gi, gh, c)
        return (h if w_hr is None else F.linear(h, w_hr)), c
    return rnn_gates(gi, gh, static.mode == "rnn_relu"), None


def rnn_gates(gi: Tensor, gh: Tensor, relu: bool) -> Tensor:
    """f(gi + gh); gi = W_ih·x + b_ih and gh = W_hh·h + b_hh, here and below (batch, gates·hidden)."""
    return torch.relu(gi + gh) if relu else torch.tanh(gi + gh)


def gru_gates(gi: Tensor, gh: Tensor, h: Tensor) -> Tensor:
    """r, z = σ(gi + gh), n = tanh(gi + r·gh), h' = (1 - z)·n + z·h."""
    (r_i, z_i, n_i), (r_h, z_h, n_h) = gi.chunk(3, -1), gh.chunk(3, -1)
    n = torch.tanh(n_i + torch.sigmoid(r_i + r_h) * n_h)
    return n + torch.sigmoid(z_i + z_h) * (h - n)


def lstm_gates(gi: Tensor, gh: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """i, f, o = σ(gi + gh), g = tanh(gi + gh), c' = f·c + i·g, h' = o·tanh(c')."""
    i, f, g, o = (gi + gh).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def rnn_tanh_cell(input, h, w_ih, w_hh, b_ih, b_hh) -> Tensor:
    return torch.rnn_tanh_cell(input, h, w_ih, w_hh, b_ih, b_hh)


def rnn_relu_cell(input, h, w_ih, w_hh, b_ih, b_hh) -> Tensor:
    return torch.rnn_relu_cell(input, h, w_ih, w_hh, b_ih, b_hh)


def gru_cell(input, h, w_ih, w_hh, b_ih, b_hh) -> Tensor:
    return torch.gru_cell(input, h, w_ih, w_hh, b_ih, b_hh)


def lstm_cell(input, h, c, w_ih, w_hh, b_ih, b_hh) -> tuple[Tensor, Tensor]:
    return torch.lstm_cell(input, (h, c), w_ih, w_hh, b_ih, b_hh)
