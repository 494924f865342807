"""A plain loop over rows, layers, directions and steps with every extra of a sequence, as the papers write them."""

import torch
from torch import Tensor

from fused_ops.rnn.reference import Static, Tensors
from tests.rnn.common import Case
from tests.support import randn

LENGTHS = torch.tensor([5, 0, 3])
SIZES = torch.tensor([2, 2, 2, 1, 1])  # of the same rows, sorted, without the empty one
RESETS = torch.arange(15).reshape(5, 3) % 4 == 1


def norm_sizes(case: Case) -> list[int]:
    rows = {"gru": 3, "lstm": 4}.get(case.mode, 1) * case.hidden
    return [rows, rows, case.hidden, case.hidden][: 4 if case.mode == "lstm" else 2]


def with_norms(case: Case, params: list[Tensor]) -> list[Tensor]:
    """A module's parameters with those of the layer norms after each cell's."""
    count, found = len(params) // case.cells, []
    for cell in range(case.cells):
        found += params[cell * count : (cell + 1) * count]
        found += [1 + 0.3 * randn(n, dtype=case.dtype, seed=50 + 9 * cell + i) for i, n in enumerate(norm_sizes(case))]
    return found


def flat_call(case: Case, extras: set[str], lengths=None, resets=None, all_states=True) -> tuple[Tensors, list, Static]:
    """(tensors, params, static) with the named extras: norm, masks, zones, zoneout."""
    x, h0, *rest = case.tensors()
    c0 = rest.pop(0) if case.mode == "lstm" else None
    width = h0.size(-1) * (2 if case.bidirectional else 1)

    def mask(*shape: int) -> Tensor:
        return (randn(*shape, dtype=case.dtype, seed=31) > 0) * 1.7

    tensors = Tensors(x, h0, c0, lengths, resets)
    if "masks" in extras:
        inner = mask(case.layers - 1, 1, case.batch, width).expand(-1, case.time, -1, -1)
        tensors = tensors._replace(masks=inner if case.layers > 1 else None, recurrent_masks=mask(*h0.shape))
    if "zones" in extras:
        shape = (case.cells, case.time, case.batch)
        tensors = tensors._replace(zone_h=randn(*shape, h0.size(-1), seed=32) > 0.3)
        if c0 is not None:
            tensors = tensors._replace(zone_c=randn(*shape, case.hidden, seed=33) > 0)
    params = with_norms(case, rest) if "norm" in extras else rest
    zoneout = (0.3, 0.1 if c0 is not None else 0.0) if "zoneout" in extras else (0.0, 0.0)
    static = Static(case.mode, case.bias, case.layers, case.bidirectional, all_states, *zoneout, "norm" in extras)
    return tensors, params, static


def packed(tensors: Tensors) -> Tensors:
    """The same call with LENGTHS' rows packed: the batch is sorted and its empty row gone."""
    rows = torch.tensor([0, 2])
    live = torch.arange(5)[:, None] < LENGTHS[rows]

    def states(t):
        return None if t is None else t.index_select(1, rows)

    def steps(t):
        return None if t is None else t.index_select(-2, rows).flatten(-3, -2)[..., live.flatten(), :]

    return Tensors(
        steps(tensors.input), states(tensors.h0), states(tensors.c0), None, None, SIZES, steps(tensors.masks),
        states(tensors.recurrent_masks), steps(tensors.zone_h), steps(tensors.zone_c),
    )  # fmt: skip


def loop(tensors: Tensors, params: list[Tensor], static: Static) -> list[Tensor]:
    """(output, h_n[, c_n], h_all[, c_all]) of a padded call."""
    time, batch = tensors.input.shape[:2]
    lengths = [time] * batch if tensors.lengths is None else tensors.lengths.tolist()
    cells, count = static.num_layers * static.directions, len(params) // (static.num_layers * static.directions)
    h_all = torch.zeros(cells, time, batch, tensors.h0.size(-1), dtype=torch.float64)
    h_n, c_all, c_n = tensors.h0.clone(), None, None
    if static.is_lstm:
        c_all, c_n = h_all.new_zeros(cells, time, batch, tensors.c0.size(-1)), tensors.c0.clone()
    x = tensors.input
    for layer in range(static.num_layers):
        if layer and tensors.masks is not None:
            x = x * tensors.masks[layer - 1]
        for direction in range(static.directions):
            cell = layer * static.directions + direction
            for row, length in enumerate(lengths):
                h, c = h_n[cell, row], c_n[cell, row] if static.is_lstm else None
                for t in range(length) if direction == 0 else range(length - 1, -1, -1):
                    if tensors.resets is not None and tensors.resets[t, row]:
                        h, c = torch.zeros_like(h), c if c is None else torch.zeros_like(c)
                    h, c = step(x[t, row], h, c, (cell, t, row), tensors, params[cell * count :][:count], static)
                    h_all[cell, t, row] = h
                    if static.is_lstm:
                        c_all[cell, t, row] = c
                h_n[cell, row] = h
                if static.is_lstm:
                    c_n[cell, row] = c
        x = torch.cat([h_all[layer * static.directions + d] for d in range(static.directions)], -1)
    return [x, h_n, c_n, h_all, c_all] if static.is_lstm else [x, h_n, h_all]


def norm(v: Tensor) -> Tensor:
    return (v - v.mean()) / (((v - v.mean()) ** 2).mean() + 1e-5).sqrt()


def step(x, h, c, place, tensors: Tensors, params, static: Static):
    cell, _, row = place
    w_ih, w_hh, *rest = params
    b_ih, b_hh = (rest.pop(0), rest.pop(0)) if static.has_biases else (0.0, 0.0)
    norms = [rest.pop(-1) for _ in range(static.norms)][::-1]
    recurrent = h if tensors.recurrent_masks is None else h * tensors.recurrent_masks[cell, row]
    gi, gh = w_ih @ x, w_hh @ recurrent
    if static.layer_norm:
        gi, gh = norm(gi) * norms[0], norm(gh) * norms[1]
    gi, gh = gi + b_ih, gh + b_hh
    size, new_c = w_hh.size(0) // static.gates, None
    if static.mode == "gru":
        r, z = ((gi + gh)[i * size : (i + 1) * size].sigmoid() for i in range(2))
        new = (1 - z) * (gi[2 * size :] + r * gh[2 * size :]).tanh() + z * h
    elif static.is_lstm:
        i, f, g, o = (gi + gh).reshape(4, size)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new = o.sigmoid() * ((norm(new_c) * norms[2] + norms[3]) if static.layer_norm else new_c).tanh()
        new = rest[0] @ new if rest else new
    else:
        new = (gi + gh).tanh() if static.mode == "rnn_tanh" else (gi + gh).clamp(min=0)
    new = keep(new, h, tensors.zone_h, static.zoneout_h, place)
    return new, new_c if c is None else keep(new_c, c, tensors.zone_c, static.zoneout_c, place)


def keep(new: Tensor, old: Tensor, zone: Tensor | None, share: float, place) -> Tensor:
    if zone is None:
        return share * old + (1 - share) * new
    kept = zone[place].to(new.dtype)
    return kept * old + (1 - kept) * new
