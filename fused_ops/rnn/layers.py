"""Sequences on a GPU, layer by layer: our projection, our recurrence, torch's GEMMs for the weights' gradients.

    D directions      G gates: RNN 1, GRU 3, LSTM 4      H hidden      B batch      T steps      N tokens
    K kept of a step: GRU W_hn·h + b_hn, r, z, n; LSTM i, f, g, o; RNN its h before an expected zoneout, else nothing
    S slopes of a step: dL/d(gates before their activation), GRU those of W_hn·h + b_hn, r, z, n; LSTM i, f, g, o.
      The first G belong to the product with W_hh (the GRU's n, r, z), the last G to that with W_ih.
    P features of h: H, or fewer where an LSTM projects it by w_hr (D, P, H): h = W_hr·m, m = o·tanh(c)

A layer norm, over a row's G·H values of W_hh·h or H of an LSTM's c, is hat·norm + bias, hat = (v - mean)·rstd. The one
over W_ih·x is this driver's: gi has it. What a backward kernel needs of the others, hat_hh, rstd_hh, hat_c and rstd_c,
is made here of all steps at once. It returns, beside the slopes, where there is such a thing:

    through (N, D, G, H)  dL/d(W_hh·h) behind its norm, gates as in W_hh
    slopes_c (N, D, H)    dL/d(an LSTM's normalised c)
    grad_states (N, D, P) dL/d(W_hr·m)

Tokens lie step after step, token(t, b) = t·B + b; or packed, starts[t] + b, with lengths given too.
"""

import torch
from torch import Tensor

from fused_ops.core.autograd import distinct, gradients
from fused_ops.core.device import TRITON_KEYS
from fused_ops.core.library import define
from fused_ops.rnn import reference
from fused_ops.rnn.layer_parts import (
    Fed,
    Norm,
    Slopes,
    Tokens,
    gates_of_inputs,
    into_inputs,
    parameter_gradients,
    tokens_of,
    weights_of,
)
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
    gi, w_hh, b_hn, w_hr, norm_hh, b_hh, norm_c, bias_c, h0, c0, lengths, starts, resets, mask, zone_h, zone_c,
    zoneout_h, zoneout_c, mode, steps, keep,
):  # fmt: skip
    tokens, directions, _, hidden = gi.shape
    lstm, kept = mode == "lstm", 4 if mode in ("gru", "lstm") else int(zone_h is None and zoneout_h > 0.0)
    return (
        h0.new_empty((tokens, directions * h0.size(-1))),
        h0.new_empty(h0.shape),
        h0.new_empty(c0.shape if lstm else 0),
        gi.new_empty((directions, tokens, hidden) if lstm and keep else 0),
        h0.new_empty((directions, tokens, kept, hidden) if kept and keep else 0),
    )


def _layer_bwd_fake(
    grad_output, grad_h_n, grad_c_n, grad_c_all, w_hh, w_hr, norm_hh, norm_c, bias_c, hat_hh, rstd_hh, hat_c, rstd_c,
    h0, c0, lengths, starts, resets, mask, zone_h, zone_c, zoneout_h, zoneout_c, output, c_all, kept, mode, steps,
):  # fmt: skip
    lstm, (directions, _, features), tokens = mode == "lstm", h0.shape, output.size(0)
    gates = {"gru": 3, "lstm": 4}.get(mode, 1)
    hidden, normed = w_hh.size(1) // gates, norm_hh is not None
    return (
        h0.new_empty((tokens, directions, 1 if gates == 1 else 4, hidden)),
        h0.new_empty((tokens, directions, gates, hidden) if normed else 0),
        h0.new_empty((tokens, directions, hidden) if normed and lstm else 0),
        h0.new_empty((tokens, directions, features) if w_hr is not None else 0),
        h0.new_empty(h0.shape),
        h0.new_empty(c0.shape if lstm else 0),
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
        f"rnn_layer_fwd_{backend}(Tensor gi, Tensor w_hh, Tensor? b_hn, Tensor? w_hr, Tensor? norm_hh, Tensor? b_hh,"
        f" Tensor? norm_c, Tensor? bias_c, Tensor h0, Tensor? c0, {_HOW}, str mode, SymInt steps, bool keep)"
        " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor c_all, Tensor kept)",
        _layer_fwd_fake,
        _triton("rnn_layer_fwd"),
        keys,
    )
    define(
        f"rnn_layer_bwd_{backend}(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_c_all,"
        " Tensor w_hh, Tensor? w_hr, Tensor? norm_hh, Tensor? norm_c, Tensor? bias_c, Tensor? hat_hh,"
        f" Tensor? rstd_hh, Tensor? hat_c, Tensor? rstd_c, Tensor h0, Tensor? c0, {_HOW}, Tensor output, Tensor c_all,"
        " Tensor kept, str mode, SymInt steps)"
        " -> (Tensor slopes, Tensor through, Tensor slopes_c, Tensor grad_states, Tensor dh0, Tensor dc0)",
        _layer_bwd_fake,
        _triton("rnn_layer_bwd"),
        keys,
    )


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


def _how(tensors: Tensors, tokens: Tokens, static: Static) -> tuple:
    zones = [t if t is None else t.flatten(1, -2) for t in (tensors.zone_h, tensors.zone_c)]
    masks = _contiguous(tokens.lengths, tokens.starts, tensors.resets, tensors.recurrent_masks, *zones)
    return *masks, static.zoneout_h, static.zoneout_c


def _forward(backend: str, call: tuple, keep: bool) -> tuple[tuple, tuple]:
    """What the public function returns of a flat call, and what its backward needs beside it: every layer's output,
    then every layer's c, then what every layer kept."""
    tensors, params, static = split(call)
    tokens, places = tokens_of(tensors), tensors.input.shape[:-1]
    project, run = (getattr(ops, f"{name}_{backend}") for name in ("rnn_project", "rnn_layer_fwd"))
    keeps_c, outputs, rest = static.is_lstm and static.all_states, [], []
    for layer in range(static.num_layers):
        own = _of_layer(tensors, layer, static)
        weights = weights_of(_params_of(params, layer, static), static)
        gi = gates_of_inputs(project, _inputs(tensors, layer, outputs), weights, static)
        _, w_hh, _, b_hn, w_hr, _, *norms = weights
        output, *found = run(
            *(gi, w_hh, b_hn, w_hr, *norms, own.h0, own.c0, *_how(own, tokens, static)),
            *(static.mode, tokens.steps, keep or keeps_c),
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


def _grads_of_results(grads: tuple, static: Static) -> tuple[Tensor | None, ...]:
    """(by output, h_n, c_n, h_all, c_all) of those by what the public function returned."""
    grad_output, grad_h_n, *rest = grads
    grad_c_n = rest.pop(0) if static.is_lstm else None
    return grad_output, grad_h_n, grad_c_n, *(*rest, None, None)[:2]


def _sum(*tensors: Tensor | None) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return sum(present[1:], present[0]) if present else None


def _layer_backward(
    backend: str, own: Tensors, x: Tensor, params: tuple, static: Static, saved: tuple, grads: tuple, wanted: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(dL/dx, dh0, dc0, dL/dparams if `wanted`) of one layer. own: its states, masks and zones; x: what it projected;
    saved: its output, c and kept values; grads: by its output, h_n, c_n and every c."""
    tokens, weights = tokens_of(own), weights_of(params, static)
    project, run = getattr(ops, f"rnn_project_{backend}"), getattr(ops, f"rnn_layer_bwd_{backend}")
    (output, c_all, kept), fed = saved, Fed(own, tokens, x.size(0))
    past = tokens.past(x.size(0), x.device)
    x = x if past is None else x.masked_fill(past, 0.0)
    has_cells = static.is_lstm and (static.layer_norm or weights.w_hr is not None)
    states = fed.states(output) if wanted or static.layer_norm else []
    cells = fed.cells(c_all, kept, static) if has_cells else None
    norm_hh = fed.products(project, states, weights) if static.layer_norm else None
    norm_c = Norm.of(cells) if has_cells and static.layer_norm else None
    gates = (static.gates, -1)
    hats = [None if norm is None else norm.hat for norm in (norm_hh, norm_c)]
    rstds = [None if norm is None else norm.rstd.squeeze(-1) for norm in (norm_hh, norm_c)]
    *found, dh0, dc0 = run(
        *_contiguous(*grads),
        *(weights.w_hh, weights.w_hr, weights.norm_hh, weights.norm_c, weights.bias_c),
        *(None if hats[0] is None else hats[0].unflatten(-1, gates), rstds[0], hats[1], rstds[1]),
        *(own.h0, own.c0, *_how(own, tokens, static), output, c_all, kept, static.mode, tokens.steps),
    )
    found = Slopes(*found)
    into_x, hat_ih = into_inputs(project, x, weights, found.of_products(static)[0])
    by_params = []
    if wanted:
        m = None if weights.w_hr is None else fed.unprojected(cells, hats[1], kept, weights)
        by_params = parameter_gradients(x, states, m, into_x, (hat_ih, *hats), found, static)
    return into_x.flatten(1) @ weights.w_ih, dh0, dc0, by_params


def _backward(backend: str, call: tuple, saved: tuple, grads: tuple, needs: tuple) -> list[Tensor | None]:
    """dL/d(every tensor of a flat call), None where it has none."""
    tensors, params, static = split(call)
    layers, directions, head, found = static.num_layers, static.directions, len(tensors), []
    outputs = saved[:layers]
    grad, grad_h_n, grad_c_n, grad_h_all, grad_c_all = _grads_of_results(grads, static)

    def of_layer(grad: Tensor | None, layer: int) -> Tensor | None:
        return None if grad is None else grad.narrow(0, layer * directions, directions)

    for layer in reversed(range(layers)):
        own, x = _of_layer(tensors, layer, static), _inputs(tensors, layer, outputs)
        by_states, by_c = of_layer(grad_h_all, layer), of_layer(grad_c_all, layer)
        by_states = None if by_states is None else by_states.movedim(0, -2).reshape(outputs[0].shape)
        grad = _sum(None if grad is None else grad.reshape(outputs[0].shape), by_states)
        by_c = None if by_c is None else by_c.flatten(1, -2)
        by_results = (grad, of_layer(grad_h_n, layer), of_layer(grad_c_n, layer), by_c)
        of_params = _params_of(params, layer, static)
        grad, *rest = _layer_backward(
            backend, own, x, of_params, static, saved[layer::layers], by_results, any(needs[head:])
        )
        found.append(rest)
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
