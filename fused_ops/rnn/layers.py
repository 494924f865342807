"""Sequences on a GPU, layer by layer: our projection, our recurrence, torch's GEMMs for the weights' gradients.

    D directions      G gates: RNN 1, GRU 3, LSTM 4      H hidden      B batch      T steps      N tokens
    K kept of a step: GRU W_hn·h + b_hn, r, z, n; LSTM i, f, g, o; RNN nothing
    S slopes of a step: dL/d(gates before their activation), GRU those of W_hn·h + b_hn, r, z, n; LSTM i, f, g, o.
      The first G belong to the product with W_hh (the GRU's n, r, z), the last G to that with W_ih.

Tokens lie step after step, token(t, b) = t·B + b; or packed, starts[t] + b, with lengths given too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_ops.core.autograd import distinct, gradients
from fused_ops.core.device import TRITON_KEYS
from fused_ops.core.library import define
from fused_ops.rnn import reference
from fused_ops.rnn.reference import Static, Tensors, split

ops = torch.ops.fused_ops

# What both directions of a recurrence take beside its states, weights and results.
_HOW = (
    "Tensor? lengths, Tensor? starts, Tensor? resets, Tensor? mask, Tensor? zone_h, Tensor? zone_c,"
    " float zoneout_h, float zoneout_c"
)


def _project_fake(x, weight, bias):
    return x.new_empty((x.size(0), weight.size(0)), dtype=torch.float32)


def _layer_fwd_fake(
    gi, w_hh, b_hn, h0, c0, lengths, starts, resets, mask, zone_h, zone_c, zoneout_h, zoneout_c, mode, steps, keep
):
    tokens, directions, _, hidden = gi.shape
    lstm, kept = mode == "lstm", 4 if mode in ("gru", "lstm") else 0
    return (
        h0.new_empty((tokens, directions * hidden)),
        h0.new_empty(h0.shape),
        h0.new_empty(h0.shape if lstm else 0),
        gi.new_empty((directions, tokens, hidden) if lstm and keep else 0),
        h0.new_empty((directions, tokens, kept, hidden) if kept and keep else 0),
    )


def _layer_bwd_fake(
    grad_output, grad_h_n, grad_c_n, grad_c_all, w_hh, h0, c0, lengths, starts, resets, mask, zone_h, zone_c,
    zoneout_h, zoneout_c, output, c_all, kept, mode, steps,
):  # fmt: skip
    directions, _, hidden = h0.shape
    slopes = 4 if mode in ("gru", "lstm") else 1
    return (
        h0.new_empty((output.size(0), directions, slopes, hidden)),
        h0.new_empty(h0.shape),
        h0.new_empty(h0.shape if mode == "lstm" else 0),
    )


def _triton(name: str):
    def implementation(*args):
        from fused_ops.rnn import triton_layers

        return getattr(triton_layers, name)(*args)

    return implementation


for backend, keys in (("triton", TRITON_KEYS), ("cuda", ())):
    define(
        f"rnn_project_{backend}(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        _project_fake,
        _triton("rnn_project"),
        keys,
    )
    define(
        f"rnn_layer_fwd_{backend}(Tensor gi, Tensor w_hh, Tensor? b_hn, Tensor h0, Tensor? c0, {_HOW}, str mode,"
        " SymInt steps, bool keep) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor c_all, Tensor kept)",
        _layer_fwd_fake,
        _triton("rnn_layer_fwd"),
        keys,
    )
    define(
        f"rnn_layer_bwd_{backend}(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_c_all,"
        f" Tensor w_hh, Tensor h0, Tensor? c0, {_HOW}, Tensor output, Tensor c_all, Tensor kept, str mode,"
        " SymInt steps) -> (Tensor slopes, Tensor dh0, Tensor dc0)",
        _layer_bwd_fake,
        _triton("rnn_layer_bwd"),
        keys,
    )


class _Tokens(NamedTuple):
    """Where a layer's tokens are."""

    steps: int
    batch: int
    lengths: Tensor | None
    starts: Tensor | None
    batch_sizes: Tensor | None

    def times_and_rows(self, count: int, device) -> tuple[Tensor, Tensor]:
        """(t, b) of each token, both (N,)."""
        if self.starts is None:
            token = torch.arange(count, device=device)
            return token // max(self.batch, 1), token % max(self.batch, 1)
        sizes, steps = self.batch_sizes.to(device), torch.arange(self.steps, device=device)
        t = torch.repeat_interleave(steps, sizes, output_size=count)
        return t, torch.arange(count, device=device) - self.starts.index_select(0, t)

    def past(self, count: int, device) -> Tensor | None:
        """(N, 1) bool: which tokens are padding; None if none is."""
        if self.lengths is None or self.starts is not None:
            return None
        t, b = self.times_and_rows(count, device)
        return (t >= self.lengths.index_select(0, b)).unsqueeze(1)

    def before(self, count: int, device, reverse: bool) -> Tensor:
        """(N,): where in (h_0 of each row, h of each token) a token finds the state before it."""
        t, b = self.times_and_rows(count, device)
        earlier = t + 1 if reverse else t - 1
        last = self.steps if self.lengths is None else self.lengths.index_select(0, b)
        there = (earlier >= 0) & (earlier < last)
        earlier = earlier.clamp(0, max(self.steps - 1, 0))
        start = earlier * self.batch if self.starts is None else self.starts.index_select(0, earlier)
        return torch.where(there, self.batch + start + b, b)


def _tokens(tensors: Tensors) -> _Tokens:
    batch = tensors.h0.size(1)
    if tensors.batch_sizes is None:
        return _Tokens(tensors.input.size(0), batch, tensors.lengths, None, None)
    sizes, device = tensors.batch_sizes, tensors.input.device
    lengths = (sizes.unsqueeze(1) > torch.arange(batch, device=sizes.device)).sum(0)
    starts = sizes.cumsum(0) - sizes
    return _Tokens(sizes.size(0), batch, lengths.to(device), starts.to(device), sizes)


def _weights(params: tuple, static: Static) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer's parameters as the kernels take them: W_ih (D·G·H, I), W_hh (D, G·H, H), bias (D·G·H,) float32,
    b_hn (D, H)."""
    per_cell = len(params) // static.directions
    cells = [params[i : i + per_cell] for i in range(0, len(params), per_cell)]
    w_ih = cells[0][0] if len(cells) == 1 else torch.cat([cell[0] for cell in cells])
    w_hh = cells[0][1].unsqueeze(0) if len(cells) == 1 else torch.stack([cell[1] for cell in cells])
    if not static.has_biases:
        return w_ih.contiguous(), w_hh.contiguous(), None, None
    b_ih, b_hh = (torch.stack([cell[i] for cell in cells]).float() for i in (2, 3))
    if static.mode != "gru":
        return w_ih.contiguous(), w_hh.contiguous(), (b_ih + b_hh).flatten(), None
    hidden = b_hh.size(1) // 3
    outside, b_hn = b_hh.split((2 * hidden, hidden), 1)
    bias = b_ih + torch.nn.functional.pad(outside, (0, hidden))
    return w_ih.contiguous(), w_hh.contiguous(), bias.flatten(), b_hn.to(w_hh.dtype).contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


def _inputs(tensors: Tensors, layer: int, outputs: list[Tensor]) -> Tensor:
    """What a layer projects, (N, features)."""
    if layer == 0:
        return tensors.input.reshape(-1, tensors.input.size(-1)).contiguous()
    below = outputs[layer - 1]
    return below if tensors.masks is None else below * tensors.masks.select(0, layer - 1).reshape(below.shape)


def _of_layer(tensors: Tensors, layer: int, static: Static) -> Tensors:
    """Those of one layer's cells."""

    def own(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.narrow(0, layer * static.directions, static.directions).contiguous()

    names = ("h0", "c0", "recurrent_masks", "zone_h", "zone_c")
    return tensors._replace(**{name: own(getattr(tensors, name)) for name in names})


def _params_of(params: tuple, layer: int, static: Static) -> tuple:
    count = len(params) // static.num_layers
    return params[layer * count : (layer + 1) * count]


def _how(tensors: Tensors, tokens: _Tokens, static: Static) -> tuple:
    zones = [t if t is None else t.flatten(1, -2) for t in (tensors.zone_h, tensors.zone_c)]
    masks = _contiguous(tokens.lengths, tokens.starts, tensors.resets, tensors.recurrent_masks, *zones)
    return *masks, static.zoneout_h, static.zoneout_c


def _forward(backend: str, call: tuple, keep: bool) -> tuple[tuple, tuple]:
    """What the public function returns of a flat call, and what its backward needs beside it: every layer's output,
    then every layer's c, then what every layer kept."""
    tensors, params, static = split(call)
    tokens, places = _tokens(tensors), tensors.input.shape[:-1]
    project, run = (getattr(ops, f"{name}_{backend}") for name in ("rnn_project", "rnn_layer_fwd"))
    keeps_c, outputs, rest = static.is_lstm and static.all_states, [], []
    for layer in range(static.num_layers):
        own = _of_layer(tensors, layer, static)
        w_ih, w_hh, bias, b_hn = _weights(_params_of(params, layer, static), static)
        gi = project(_inputs(tensors, layer, outputs), w_ih, bias)
        gi = gi.view(-1, static.directions, static.gates, w_hh.size(-1))
        output, *found = run(
            gi, w_hh, b_hn, own.h0, own.c0, *_how(own, tokens, static), static.mode, tokens.steps, keep or keeps_c
        )
        outputs.append(output)
        rest.append(found)
    h_n, c_n, c_all, kept = zip(*rest)
    found = (outputs[-1].view(*places, -1), torch.cat(h_n))
    found = (*found, torch.cat(c_n)) if static.is_lstm else found
    if static.all_states:
        h_all = [output.view(*places, static.directions, -1).movedim(-2, 0) for output in outputs]
        found = (*found, torch.cat(h_all))
    if keeps_c:
        states, past = torch.cat(c_all), tokens.past(outputs[0].size(0), outputs[0].device)
        states = states if past is None else states.masked_fill(past, 0.0)
        found = (*found, states.to(outputs[0].dtype).view(states.size(0), *places, -1))
    return found, (*outputs, *c_all, *kept)


def _parameter_gradients(tensors: Tensors, x, static: Static, tokens: _Tokens, slopes, output) -> list[Tensor]:
    """dL/dparams of one layer: slopes (N, D, S, H) times what they multiplied."""
    count, device, past = x.size(0), x.device, tokens.past(x.size(0), x.device)
    x = x if past is None else x.masked_fill(past, 0.0)
    outputs = output.view(count, static.directions, -1).unbind(1)
    t, b = tokens.times_and_rows(count, device)
    found = []
    for d, (own, h0, states) in enumerate(zip(slopes.unbind(1), tensors.h0.unbind(), outputs, strict=True)):
        h = torch.cat((h0, states)).index_select(0, tokens.before(count, device, d == 1))
        if tensors.resets is not None:
            h = h.masked_fill(tensors.resets.flatten().index_select(0, t * tokens.batch + b).unsqueeze(1), 0.0)
        if tensors.recurrent_masks is not None:
            h = h * tensors.recurrent_masks.select(0, d).index_select(0, b)
        into_x = own.narrow(1, own.size(1) - static.gates, static.gates).flatten(1)
        into_h = own.narrow(1, 0, static.gates)
        if static.mode == "gru":  # from n, r, z to r, z, n
            into_h = into_h.roll(-1, 1)
        into_h = into_h.flatten(1)
        found += [into_x.t() @ x, into_h.t() @ h]
        if static.has_biases:
            found += [s.sum(0, dtype=torch.float32).to(s.dtype) for s in (into_x, into_h)]
    return found


def _grads_of_results(grads: tuple, static: Static) -> tuple[Tensor | None, ...]:
    """(by output, h_n, c_n, h_all, c_all) of those by what the public function returned."""
    grad_output, grad_h_n, *rest = grads
    grad_c_n = rest.pop(0) if static.is_lstm else None
    return grad_output, grad_h_n, grad_c_n, *(*rest, None, None)[:2]


def _sum(*tensors: Tensor | None) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return sum(present[1:], present[0]) if present else None


def _backward(backend: str, call: tuple, saved: tuple, grads: tuple, needs: tuple) -> list[Tensor | None]:
    """dL/d(every tensor of a flat call), None where it has none."""
    tensors, params, static = split(call)
    tokens, layers, directions, head = _tokens(tensors), static.num_layers, static.directions, len(tensors)
    outputs, c_all, kept = saved[:layers], saved[layers : 2 * layers], saved[2 * layers :]
    grad, grad_h_n, grad_c_n, grad_h_all, grad_c_all = _grads_of_results(grads, static)
    run, found = getattr(ops, f"rnn_layer_bwd_{backend}"), []

    def of_layer(grad: Tensor | None, layer: int) -> Tensor | None:
        return None if grad is None else grad.narrow(0, layer * directions, directions).contiguous()

    for layer in reversed(range(layers)):
        own, x = _of_layer(tensors, layer, static), _inputs(tensors, layer, outputs)
        w_ih, w_hh, _, _ = _weights(_params_of(params, layer, static), static)
        by_states, by_c = of_layer(grad_h_all, layer), of_layer(grad_c_all, layer)
        by_states = None if by_states is None else by_states.movedim(0, -2).reshape(outputs[0].shape)
        grad = _sum(None if grad is None else grad.reshape(outputs[0].shape), by_states)
        slopes, dh0, dc0 = run(
            *_contiguous(grad, of_layer(grad_h_n, layer), of_layer(grad_c_n, layer)),
            None if by_c is None else by_c.flatten(1, -2),
            *(w_hh, own.h0, own.c0, *_how(own, tokens, static), outputs[layer], c_all[layer], kept[layer]),
            *(static.mode, tokens.steps),
        )
        wanted = any(needs[head:])
        found.append((dh0, dc0, _parameter_gradients(own, x, static, tokens, slopes, outputs[layer]) if wanted else []))
        if layer or needs[0]:
            grad = slopes.narrow(2, slopes.size(2) - static.gates, static.gates).flatten(1) @ w_ih
        if layer and tensors.masks is not None:
            grad = grad * tensors.masks.select(0, layer - 1).reshape(grad.shape)
    dh0, dc0, by_params = zip(*reversed(found))
    by_params = [by for layer in by_params for by in layer] or [None for _ in params]
    dx = grad.view(tensors.input.shape) if needs[0] else None
    every = (dx, torch.cat(dh0), torch.cat(dc0) if static.is_lstm else None, *[None for _ in range(head - 3)])
    return [by if need else None for by, need in zip((*every, *by_params), needs, strict=True)]


class _Sequence(torch.autograd.Function):
    """Forward and backward by kernels; the second derivative is the reference's."""

    @staticmethod
    def forward(ctx, backend, static, *inputs):
        found, saved = _forward(backend, (*inputs, *static), keep=True)
        ctx.backend, ctx.static, ctx.count = backend, static, len(inputs)
        ctx.save_for_backward(*inputs, *saved)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx, *grads):
        inputs, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        needs = ctx.needs_input_grad[2:]
        call = (*inputs, *ctx.static)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # only under create_graph=True
            return None, None, *gradients(reference.sequence(*call), inputs, needs, grads, create_graph=True)
        if all(grad is None for grad in grads):
            return None, None, *[None for _ in needs]
        return None, None, *_backward(ctx.backend, call, saved, grads, needs)


def sequence(backend: str, tensors: Tensors, params: tuple, static: Static, dropout: float = 0.0) -> tuple[Tensor, ...]:
    """A whole call, (output, h_n[, c_n][, h_all[, c_all]]), on `backend`'s kernels."""
    inputs = (*reference.with_masks(tensors, static, dropout), *params)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs]):
        return _Sequence.apply(backend, tuple(static), *(distinct(inputs) if torch.compiler.is_compiling() else inputs))
    return _forward(backend, (*inputs, *static), keep=False)[0]
