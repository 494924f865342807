"""What a call that trains draws at random, beside the dropout between layers that each backend draws itself."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops.rnn.reference import Static, Tensors, dropout_masks


class Noise(NamedTuple):
    """The regularisers of a call.

    zoneout: share of the old h, or for an LSTM of the old (h, c), that a step keeps. Source: Krueger et al. 2016.
    weight_dropout: of W_hh, one mask for all steps. Source: Wan et al. 2013; Merity et al. 2018.
    variational_dropout: of each layer's input and of h_{t-1} where it enters W_hh, one mask for all steps of a row.
        Source: Gal and Ghahramani 2016.
    """

    train: bool = False
    dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    weight_dropout: float = 0.0
    variational_dropout: float = 0.0


def drawn(tensors: Tensors, params: tuple, static: Static, noise: Noise) -> tuple[Tensors, tuple, Static, float]:
    """(tensors, params, static, dropout that is still to be drawn) of a call under `noise`."""
    if noise[1:] == (0, 0, 0, 0):
        return tensors, params, static, 0.0
    zoneout = noise.zoneout if isinstance(noise.zoneout, (tuple, list)) else (noise.zoneout, noise.zoneout)
    zoneout = zoneout if static.is_lstm else (zoneout[0], 0.0)
    if not noise.train:
        # Dynamo takes a default for a symbol, and would trace again where one reaches an op: so a constant for zero.
        zoneout_h, zoneout_c = (float(share) if share else 0 for share in zoneout)
        return tensors, params, static._replace(zoneout_h=zoneout_h, zoneout_c=zoneout_c), 0.0
    dropout = noise.dropout if static.num_layers > 1 else 0.0
    if noise.weight_dropout:
        per_cell = len(params) // (static.num_layers * static.directions)
        params = tuple(
            [
                F.dropout(p, noise.weight_dropout, training=True) if i % per_cell == 1 else p
                for i, p in enumerate(params)
            ]
        )
    if noise.variational_dropout:
        tensors, dropout = _with_variational(tensors, static, dropout, noise.variational_dropout), 0.0
    zones = (_zone(tensors, state, p) for state, p in zip((tensors.h0, tensors.c0), zoneout))
    return tensors._replace(zone_h=next(zones), zone_c=next(zones)), params, static, dropout


def _with_variational(tensors: Tensors, static: Static, dropout: float, p: float) -> Tensors:
    """Masks that are the same in every step, on top of the dropout between layers."""
    input, width = tensors.input, tensors.h0.size(-1) * static.directions

    def mask(*shape: int) -> Tensor:
        return F.dropout(input.new_ones(shape), p, training=True)

    def in_every_step(of_rows: Tensor) -> Tensor:
        """(..., B, features) -> (..., T, B, features), or (..., total, features) of a packed sequence."""
        if tensors.batch_sizes is None:
            return of_rows.unsqueeze(-3)
        return of_rows.index_select(-2, _rows_of_packed(tensors.batch_sizes, input.size(0)).to(input.device))

    batch, inner = tensors.h0.size(1), static.num_layers - 1
    input = input * in_every_step(mask(batch, input.size(-1)))
    recurrent, masks = mask(*tensors.h0.shape), None
    if inner:
        masks = in_every_step(mask(inner, batch, width)).expand(inner, *input.shape[:-1], width)
    if dropout:
        masks = masks * dropout_masks(tensors.input, width, static.num_layers, dropout)
    return tensors._replace(input=input, masks=masks, recurrent_masks=recurrent)


def _rows_of_packed(batch_sizes: Tensor, total: int) -> Tensor:
    """(total,): which row each place of a packed sequence belongs to."""
    ends, places = batch_sizes.cumsum(0), torch.arange(total, device=batch_sizes.device)
    time = torch.searchsorted(ends, places, right=True)
    return places - (ends - batch_sizes)[time]


def _zone(tensors: Tensors, state: Tensor | None, p: float) -> Tensor | None:
    """(layers·directions, T, B, size of `state`), or packed: True with probability p."""
    if state is None or p == 0.0:
        return None
    shape = (state.size(0), *tensors.input.shape[:-1], state.size(-1))
    return torch.empty(shape, dtype=torch.bool, device=tensors.input.device).bernoulli_(p)
