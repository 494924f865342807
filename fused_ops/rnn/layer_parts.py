"""What the driver in layers.py makes of a call, one layer at a time: tokens, weights, and the parameters' gradients.

Names as there. Nothing here is read where a padded call has padding: it may be NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_ops.rnn import reference
from fused_ops.rnn.reference import Static, Tensors


class Tokens(NamedTuple):
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


def tokens_of(tensors: Tensors) -> Tokens:
    batch = tensors.h0.size(1)
    if tensors.batch_sizes is None:
        return Tokens(tensors.input.size(0), batch, tensors.lengths, None, None)
    sizes, device = tensors.batch_sizes, tensors.input.device
    lengths = (sizes.unsqueeze(1) > torch.arange(batch, device=sizes.device)).sum(0)
    starts = sizes.cumsum(0) - sizes
    return Tokens(sizes.size(0), batch, lengths.to(device), starts.to(device), sizes)


class LayerWeights(NamedTuple):
    """One layer's parameters as the kernels take them; all but the weights and b_hn in float32.

    w_ih (D·G·H, I), w_hh (D, G·H, P), bias (D·G·H,): b_ih, and b_hh where it is not b_hn (D, H), the GRU's, or apart
    as b_hh (D, G, H), that of a normalised product. w_hr (D, P, H), norm_ih (D, G·H), norm_hh (D, G, H), norm_c and
    bias_c (D, H).
    """

    w_ih: Tensor
    w_hh: Tensor
    bias: Tensor | None
    b_hn: Tensor | None
    w_hr: Tensor | None
    norm_ih: Tensor | None
    norm_hh: Tensor | None
    b_hh: Tensor | None
    norm_c: Tensor | None
    bias_c: Tensor | None


def weights_of(params: tuple, static: Static) -> LayerWeights:
    wide = torch.promote_types(params[0].dtype, torch.float32)
    cells = [reference.weights_of(params, d, static._replace(num_layers=1)) for d in range(static.directions)]

    def stacked(name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        each = [getattr(cell, name) for cell in cells]
        if each[0] is None:
            return None
        found = each[0].unsqueeze(0) if len(each) == 1 else torch.stack(each)
        return found.to(dtype or found.dtype).contiguous()

    w_ih, w_hh = stacked("w_ih").flatten(0, 1), stacked("w_hh")
    b_ih, b_hh, norm_hh = (stacked(name, wide) for name in ("b_ih", "b_hh", "norm_hh"))
    norms = [stacked(name, wide) for name in ("norm_c", "bias_c")]
    bias, b_hn = b_ih, None
    if norm_hh is not None:
        gates = (static.gates, -1)
        norm_hh, b_hh = norm_hh.unflatten(1, gates), None if b_hh is None else b_hh.unflatten(1, gates)
    elif b_hh is not None:
        if static.mode == "gru":
            hidden = b_hh.size(1) // 3
            b_hh, b_hn = b_hh.split((2 * hidden, hidden), 1)
            b_hn, b_hh = b_hn.to(w_hh.dtype).contiguous(), torch.nn.functional.pad(b_hh, (0, hidden))
        bias, b_hh = b_ih + b_hh, None
    bias = None if bias is None else bias.flatten()
    norm_ih = stacked("norm_ih", wide)
    return LayerWeights(w_ih, w_hh, bias, b_hn, stacked("w_hr"), norm_ih, norm_hh, b_hh, *norms)


class Norm(NamedTuple):
    """A layer norm without its weights over the last dimension of `values`."""

    values: Tensor
    hat: Tensor
    mean: Tensor
    rstd: Tensor

    @staticmethod
    def of(values: Tensor) -> "Norm":
        return Norm(values, *torch.native_layer_norm(values, values.shape[-1:], None, None, reference.EPS))

    def before(self, grad: Tensor) -> Tensor:
        """dL/dvalues of dL/dhat."""
        parts, wanted = (self.mean, self.rstd, None, None), [True, False, False]
        return torch.ops.aten.native_layer_norm_backward(grad, self.values, self.values.shape[-1:], *parts, wanted)[0]


def projected(project: Callable, x: Tensor, weights: LayerWeights, directions: int) -> Tensor:
    """W_ih·x, (N, D, G·H), of x (N, features), without bias."""
    return project(x, weights.w_ih, None).view(x.size(0), directions, -1)


def gates_of_inputs(project: Callable, x: Tensor, weights: LayerWeights, static: Static) -> Tensor:
    """gi (N, D, G, H), what x gives to the gates."""
    shape = (x.size(0), static.directions, static.gates, weights.w_hh.size(1) // static.gates)
    if not static.layer_norm:
        return project(x, weights.w_ih, weights.bias).view(shape)
    gi = Norm.of(projected(project, x, weights, static.directions)).hat * weights.norm_ih
    gi = gi if weights.bias is None else gi + weights.bias.view(weights.norm_ih.shape)
    return gi.view(shape)


class Fed(NamedTuple):
    """What a layer's steps were fed, one layer's Tensors at hand: lists of a tensor for each direction."""

    tensors: Tensors
    tokens: Tokens
    count: int

    def before(self, d: int, initial: Tensor, states: Tensor) -> Tensor:
        """(N, features): the state before each token, of that before the first (B, features) and each token's; 0 after
        a reset and in padding."""
        tokens, device = self.tokens, initial.device
        found, zero = torch.cat((initial, states)), tokens.past(self.count, device)
        if self.tensors.resets is not None:
            t, b = tokens.times_and_rows(self.count, device)
            resets = self.tensors.resets.flatten().index_select(0, t * tokens.batch + b).unsqueeze(1)
            zero = resets if zero is None else zero | resets
        found = found.index_select(0, tokens.before(self.count, device, d == 1))
        return found if zero is None else found.masked_fill(zero, 0.0)

    def states(self, output: Tensor) -> list[Tensor]:
        """(N, P) that W_hh multiplied."""
        initial, masks = self.tensors.h0.unbind(), self.tensors.recurrent_masks
        outputs = output.view(self.count, len(initial), -1).unbind(1)
        found = [self.before(d, h0, states) for d, (h0, states) in enumerate(zip(initial, outputs, strict=True))]
        if masks is None:
            return found
        b = self.tokens.times_and_rows(self.count, output.device)[1]
        return [h * mask.index_select(0, b) for h, mask in zip(found, masks.unbind(), strict=True)]

    def cells(self, c_all: Tensor, kept: Tensor, static: Static) -> Tensor:
        """(D, N, H) float32: c before its zoneout, 0 in padding."""
        past, found = self.tokens.past(self.count, c_all.device), c_all
        if self.tensors.zone_c is not None or static.zoneout_c:
            before = [self.before(d, c0, c) for d, (c0, c) in enumerate(zip(self.tensors.c0, c_all, strict=True))]
            i, f, g, _ = kept.to(c_all.dtype).unbind(2)
            found = f * torch.stack(before) + i * g
        return found if past is None else found.masked_fill(past, 0.0)

    def products(self, project: Callable, fed: list[Tensor], weights: LayerWeights) -> Norm:
        """The norm over W_hh·h, (D, N, G·H)."""
        return Norm.of(torch.stack([project(h, w, None) for h, w in zip(fed, weights.w_hh.unbind(), strict=True)]))

    def unprojected(self, cells: Tensor, hat_c: Tensor | None, kept: Tensor, weights: LayerWeights) -> Tensor:
        """(D, N, H): o·tanh(c), what W_hr multiplied, of `cells` and their norm's hat; 0 in padding."""
        past = self.tokens.past(self.count, cells.device)
        if hat_c is not None:
            cells = hat_c * weights.norm_c.unsqueeze(1) + weights.bias_c.unsqueeze(1)
        m = (kept.select(2, 3).to(cells.dtype) * cells.tanh()).to(kept.dtype)
        return m if past is None else m.masked_fill(past, 0.0)


class Slopes(NamedTuple):
    """What a layer's backward kernel returns beside the derivatives by the first states."""

    slopes: Tensor
    through: Tensor
    slopes_c: Tensor
    grad_states: Tensor

    def of_products(self, static: Static) -> tuple[Tensor, Tensor]:
        """(N, D, G·H) of W_ih·x and of W_hh·h, behind their norms, gates in the weights' order."""
        from_x = self.slopes.narrow(2, self.slopes.size(2) - static.gates, static.gates)
        from_h = self.slopes.narrow(2, 0, static.gates)
        if static.mode == "gru":  # from n, r, z to r, z, n
            from_h = from_h.roll(-1, 2)
        return from_x.flatten(2), from_h.flatten(2)


def into_inputs(project: Callable, x: Tensor, weights: LayerWeights, from_x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(dL/d(W_ih·x) (N, D, G·H) rounded, hat of its norm) of dL/d(its norm's result)."""
    if weights.norm_ih is None:
        return from_x, None
    norm = Norm.of(projected(project, x, weights, from_x.size(1)))
    return norm.before(from_x.to(norm.values.dtype) * weights.norm_ih).to(from_x.dtype), norm.hat


def _sum(values: Tensor, times: Tensor | None = None) -> Tensor:
    """Σ over the tokens, of values (N, ...) in their dtype; times: what each is multiplied by before."""
    if times is not None:
        return (values.to(times.dtype) * times).sum(0).to(values.dtype)
    return values.sum(0, dtype=torch.promote_types(values.dtype, torch.float32)).to(values.dtype)


def parameter_gradients(
    x: Tensor, fed: list[Tensor], m: Tensor | None, into_x: Tensor, hats: tuple[Tensor | None, ...], found: Slopes,
    static: Static,
) -> list[Tensor]:  # fmt: skip
    """dL/dparams of one layer.

    Args:
        x, fed: what W_ih (N, I) and, for each direction, W_hh (N, P) multiplied. m: what W_hr did, (D, N, H) or None.
        into_x: dL/d(W_ih·x), (N, D, G·H).
        hats: of the norms over W_ih·x (N, D, G·H), W_hh·h (D, N, G·H) and c (D, N, H), or None each.
    """
    from_x, from_h = found.of_products(static)
    into_h = found.through.flatten(2) if static.layer_norm else from_h
    hat_ih, hat_hh, hat_c = hats
    by_params = []
    for d, h in enumerate(fed):
        by_x, by_h = from_x.select(1, d), from_h.select(1, d)
        by_params += [into_x.select(1, d).t() @ x, into_h.select(1, d).t() @ h]
        if static.has_biases:
            by_params += [_sum(by_x), _sum(by_h)]
        if m is not None:
            by_params.append(found.grad_states.select(1, d).t() @ m.select(0, d))
        if hat_hh is not None:
            by_params += [_sum(by_x, hat_ih.select(1, d)), _sum(by_h, hat_hh.select(0, d))]
        if hat_c is not None:
            by_c = found.slopes_c.select(1, d)
            by_params += [_sum(by_c, hat_c.select(0, d)), _sum(by_c)]
    return by_params
