"""What the ops of fused_ops/rnn/layers.py compute, in plain PyTorch: the oracle in float64, the peer in others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_ops.rnn import reference
from tests.support import randn

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


@dataclass
class Layer:
    """One call of `rnn_layer_fwd_*`; `fwd_arguments` and `bwd_arguments` are in the schemas' order."""

    gi: Tensor
    w_hh: Tensor
    b_hn: Tensor | None
    h0: Tensor
    c0: Tensor | None
    lengths: Tensor | None
    starts: Tensor | None
    resets: Tensor | None
    mask: Tensor | None
    zone_h: Tensor | None
    zone_c: Tensor | None
    zoneout_h: float
    zoneout_c: float
    mode: str
    steps: int

    @property
    def how(self) -> tuple:
        return (self.lengths, self.starts, self.resets, self.mask, self.zone_h, self.zone_c,
                self.zoneout_h, self.zoneout_c)  # fmt: skip

    def fwd_arguments(self, keep: bool = True) -> tuple:
        return (self.gi, self.w_hh, self.b_hn, self.h0, self.c0, *self.how, self.mode, self.steps, keep)

    def bwd_arguments(self, grads, output, c_all, kept) -> tuple:
        """grads: those by output, h_n, c_n, c_all, or None each."""
        return (*grads, self.w_hh, self.h0, self.c0, *self.how, output, c_all, kept, self.mode, self.steps)

    def to(self, dtype: torch.dtype, device="cpu") -> "Layer":
        """The same call in another dtype (gi stays float32 but for float64)."""

        def moved(name, value):
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point():
                return value.to(device)
            return value.to(device, dtype if name != "gi" or dtype == torch.float64 else torch.float32)

        return Layer(**{name: moved(name, value) for name, value in vars(self).items()})

    def tokens(self) -> tuple[Tensor, Tensor]:
        """(t, b) of every token that is no padding."""
        batch = self.h0.size(1)
        live = torch.ones(self.steps, batch, dtype=torch.bool)
        if self.lengths is not None:
            live = torch.arange(self.steps)[:, None] < self.lengths.cpu()
        return live.nonzero(as_tuple=True)

    def places(self) -> Tensor:
        """Where the tokens of `tokens()` are among the N."""
        t, b = self.tokens()
        return t * self.h0.size(1) + b if self.starts is None else self.starts.cpu()[t] + b


def layer_case(
    mode="gru", time=5, batch=3, hidden=6, directions=1, dtype=torch.float32, *, bias=True, lengths=None, packed=False,
    resets=False, mask=False, zoneout=None, seed=0,
) -> Layer:  # fmt: skip
    """Reproducible inputs. lengths: a list. packed: by those lengths, descending. zoneout: "masks" or a probability.

    What lies in the padding of gi is NaN.
    """
    gates, lstm = GATES[mode], mode == "lstm"
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int64)
    starts, count = None, time * batch
    if packed:
        assert lengths is not None and (lengths.diff() <= 0).all()
        sizes = (torch.arange(time)[:, None] < lengths).sum(1)
        starts, count = sizes.cumsum(0) - sizes, int(sizes.sum())
    gi = randn(count, directions, gates, hidden, seed=seed + 1)
    if lengths is not None and not packed:
        past = torch.arange(time)[:, None] >= lengths
        gi = gi.view(time, batch, *gi.shape[1:]).masked_fill(past[..., None, None, None], float("nan")).view(gi.shape)
    scale = 1.5 / hidden**0.5
    generator = torch.Generator().manual_seed(seed)

    def coin(*shape):
        return torch.rand(shape, generator=generator) < 0.3

    zones = zoneout == "masks"
    rate = 0.0 if zones or zoneout is None else zoneout
    return Layer(
        gi=gi if dtype != torch.float64 else gi.double(),
        w_hh=(randn(directions, gates * hidden, hidden, seed=seed + 2) * scale).to(dtype),
        b_hn=(randn(directions, hidden, seed=seed + 3) * scale).to(dtype) if mode == "gru" and bias else None,
        h0=randn(directions, batch, hidden, seed=seed + 4).to(dtype),
        c0=randn(directions, batch, hidden, seed=seed + 5).to(dtype) if lstm else None,
        lengths=lengths,
        starts=starts,
        resets=coin(time, batch) if resets else None,
        mask=(~coin(directions, batch, hidden)).to(dtype) / 0.75 if mask else None,
        zone_h=coin(directions, count, hidden) if zones else None,
        zone_c=coin(directions, count, hidden) if zones and lstm else None,
        zoneout_h=rate,
        zoneout_c=rate if lstm else 0.0,
        mode=mode,
        steps=time,
    )


def forward(layer: Layer, gi: Tensor | None = None) -> dict[str, Tensor]:
    """output, h_n, c_n, c_all and kept; past a length they are 0. h is rounded to the dtype of w_hh where it is fed
    back, the rest is at least float32. gi: in place of the layer's, for its gradient."""
    gi = layer.gi if gi is None else gi
    dtype = layer.w_hh.dtype
    compute = torch.promote_types(dtype, torch.float32)
    directions, batch, hidden = layer.h0.shape
    count, lstm = gi.size(0), layer.mode == "lstm"
    outputs, finals, cells, kepts = [], [], [], []
    live = torch.ones(layer.steps, batch, dtype=torch.bool)
    if layer.lengths is not None:
        live = torch.arange(layer.steps)[:, None] < layer.lengths
    for d in range(directions):
        h, c = layer.h0[d].to(compute), layer.c0[d].to(compute) if lstm else None
        hs = [torch.zeros(hidden, dtype=compute)] * count
        cs, ks = list(hs), [torch.zeros(4, hidden, dtype=compute)] * count
        weight = layer.w_hh[d].to(compute)
        for t in reversed(range(layer.steps)) if d else range(layer.steps):
            rows = live[t].nonzero()[:, 0]
            token = (t * batch if layer.starts is None else int(layer.starts[t])) + rows
            before, c_before = h[rows], c[rows] if lstm else None
            if layer.resets is not None:
                before = before.masked_fill(layer.resets[t, rows, None], 0.0)
                c_before = c_before.masked_fill(layer.resets[t, rows, None], 0.0) if lstm else None
            into = before if layer.mask is None else (before * layer.mask[d, rows].to(compute)).to(dtype).to(compute)
            gh = into @ weight.t()
            if layer.b_hn is not None:
                gh = torch.cat((gh[:, : 2 * hidden], gh[:, 2 * hidden :] + layer.b_hn[d].to(compute)), 1)
            now, c_now, kept = _step(layer.mode, gi[token, d].to(compute).flatten(1), gh, before, c_before)
            now = _zoned(now, before, layer.zone_h, layer.zoneout_h, d, token).to(dtype).to(compute)
            h = h.index_put((rows,), now)
            if lstm:
                c_now = _zoned(c_now, c_before, layer.zone_c, layer.zoneout_c, d, token)
                c = c.index_put((rows,), c_now)
            for i, place in enumerate(token.tolist()):
                hs[place] = now[i]
                cs[place] = c_now[i] if lstm else cs[place]
                ks[place] = kept[i] if kept is not None else ks[place]
        outputs.append(torch.stack(hs) if count else gi.new_zeros(0, hidden))
        finals.append((h, c))
        cells.append(torch.stack(cs) if count else gi.new_zeros(0, hidden))
        kepts.append(torch.stack(ks) if count else gi.new_zeros(0, 4, hidden))
    empty = torch.zeros(0, dtype=compute)
    return {
        "output": torch.cat(outputs, 1),
        "h_n": torch.stack([h for h, _ in finals]),
        "c_n": torch.stack([c for _, c in finals]) if lstm else empty,
        "c_all": torch.stack(cells) if lstm else empty,
        "kept": torch.stack(kepts) if layer.mode in ("gru", "lstm") else empty,
    }


def _step(mode: str, gi, gh, h, c):
    """(h, c, kept (rows, 4, H))."""
    if mode == "gru":
        (r_i, z_i, n_i), (r_h, z_h, n_h) = gi.chunk(3, 1), gh.chunk(3, 1)
        r, z = torch.sigmoid(r_i + r_h), torch.sigmoid(z_i + z_h)
        n = torch.tanh(n_i + r * n_h)
        return reference.gru_gates(gi, gh, h), None, torch.stack((n_h, r, z, n), 1)
    if mode == "lstm":
        i, f, g, o = (gi + gh).chunk(4, 1)
        kept = torch.stack((torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)), 1)
        return *reference.lstm_gates(gi, gh, c), kept
    return reference.rnn_gates(gi, gh, mode == "rnn_relu"), None, None


def _zoned(new, old, zone, rate: float, d: int, token):
    if zone is not None:
        return torch.where(zone[d, token], old, new)
    return new if rate == 0.0 else rate * old + (1.0 - rate) * new


def backward(layer: Layer, grads) -> dict[str, Tensor]:
    """slopes, dh0 and dc0, by autograd. grads: those by output, h_n, c_n and c_all, or None each."""
    compute = torch.promote_types(layer.w_hh.dtype, torch.float32)
    parts = vars(layer) | {
        name: None if (t := getattr(layer, name)) is None else t.detach().to(compute).requires_grad_()
        for name in ("h0", "c0", "b_hn")
    }
    gi = layer.gi.detach().clone().requires_grad_()
    # The GRU's slope by W_hn·h + b_hn is the gradient by a b_hn of every token's own.
    if layer.mode == "gru":
        return _gru_backward(Layer(**parts), gi, grads)
    found = forward(Layer(**parts), gi)
    gi_grad, dh0, *dc0 = _differentiate(
        found, grads, [gi, parts["h0"], *([parts["c0"]] if layer.c0 is not None else [])]
    )
    return {"slopes": gi_grad, "dh0": dh0, "dc0": dc0[0] if dc0 else torch.zeros(0)}


def _gru_backward(layer: Layer, gi: Tensor, grads) -> dict[str, Tensor]:
    found = forward(layer, gi)
    gi_grad, dh0 = _differentiate(found, grads, [gi, layer.h0])
    r = found["kept"].detach().movedim(0, 1)[:, :, 1]  # dL/d(W_hn·h + b_hn) = r · dL/dn before its activation
    slopes = torch.cat(((gi_grad[:, :, 2] * r)[:, :, None], gi_grad), 2)
    return {"slopes": slopes, "dh0": dh0, "dc0": torch.zeros(0)}


def _differentiate(found: dict, grads, wanted: list) -> list[Tensor]:
    names = ("output", "h_n", "c_n", "c_all")
    pairs = [(found[n], g.to(found[n].dtype)) for n, g in zip(names, grads, strict=True) if g is not None]
    got = torch.autograd.grad([p[0] for p in pairs], wanted, [p[1] for p in pairs], allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(got, wanted, strict=True)]


def random_grads(layer: Layer, seed: int = 11) -> tuple[Tensor | None, ...]:
    """Gradients by output, h_n, c_n and c_all in the layer's dtype; c's for an LSTM alone."""
    dtype, device, state = layer.w_hh.dtype, layer.gi.device, layer.h0.shape
    count, directions, hidden = layer.gi.size(0), *state[::2]
    shapes = [(count, directions * hidden), state]
    shapes += [state, (directions, count, hidden)] if layer.mode == "lstm" else []
    grads = [randn(*shape, seed=seed + i).to(device, dtype) for i, shape in enumerate(shapes)]
    return *grads, *[None] * (4 - len(grads))
