"""What the ops of fused_ops/rnn/layers.py compute, in plain PyTorch: the oracle in float64, the peer in others."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_ops.rnn import reference
from tests.support import randn

# The ops' results, by name.
FORWARD = ("output", "h_n", "c_n", "c_all", "kept")
BACKWARD = ("slopes", "through", "slopes_c", "grad_states", "dh0", "dc0")
# What a backward takes of a forward's layer norms.
HATS = ("hat_hh", "rstd_hh", "hat_c", "rstd_c")
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


@dataclass
class Layer:
    """One call of `rnn_layer_fwd_*`; `fwd_arguments` and `bwd_arguments` are in the schemas' order."""

    gi: Tensor
    w_hh: Tensor
    b_hn: Tensor | None
    w_hr: Tensor | None
    norm_hh: Tensor | None
    b_hh: Tensor | None
    norm_c: Tensor | None
    bias_c: Tensor | None
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
        norms = (self.norm_hh, self.b_hh, self.norm_c, self.bias_c)
        weights = (self.w_hh, self.b_hn, self.w_hr, *norms)
        return (self.gi, *weights, self.h0, self.c0, *self.how, self.mode, self.steps, keep)

    def bwd_arguments(self, grads, output, c_all, kept, hats=(None, None, None, None)) -> tuple:
        """grads: those by output, h_n, c_n, c_all, or None each. hats: hat_hh, rstd_hh, hat_c, rstd_c."""
        weights = (self.w_hh, self.w_hr, self.norm_hh, self.norm_c, self.bias_c)
        saved = (output, c_all, kept)
        return (*grads, *weights, *hats, self.h0, self.c0, *self.how, *saved, self.mode, self.steps)

    def to(self, dtype: torch.dtype, device="cpu") -> "Layer":
        """The same call in another dtype (gi and the norms stay float32 but for float64)."""

        def moved(name, value):
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point():
                return value.to(device)
            is_wide = name in ("gi", "norm_hh", "b_hh", "norm_c", "bias_c") and dtype != torch.float64
            return value.to(device, torch.float32 if is_wide else dtype)

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
    resets=False, mask=False, zoneout=None, norm=False, states=None, seed=0,
) -> Layer:  # fmt: skip
    """Reproducible inputs. lengths: a list. packed: by those lengths, descending. zoneout: "masks", a probability, or a
    pair of these for h and for an LSTM's c. states: features of a projected h, for an LSTM.

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

    def wide(there, *shape, seed, offset=0.0):
        return (offset + 0.3 * randn(*shape, seed=seed)).to(gi.dtype) if there else None

    biased = mode == "gru" and bias and not norm
    features, gi = states or hidden, gi.double() if dtype == torch.float64 else gi
    zone_h, zone_c = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout if lstm else None)
    rates = [zone if isinstance(zone, float) else 0.0 for zone in (zone_h, zone_c)]
    return Layer(
        gi=gi,
        w_hh=(randn(directions, gates * hidden, features, seed=seed + 2) * scale).to(dtype),
        b_hn=(randn(directions, hidden, seed=seed + 3) * scale).to(dtype) if biased else None,
        w_hr=(randn(directions, states, hidden, seed=seed + 6) * scale).to(dtype) if states else None,
        norm_hh=wide(norm, directions, gates, hidden, seed=seed + 7, offset=1.0),
        b_hh=wide(norm and bias, directions, gates, hidden, seed=seed + 8),
        norm_c=wide(norm and lstm, directions, hidden, seed=seed + 9, offset=1.0),
        bias_c=wide(norm and lstm, directions, hidden, seed=seed + 10),
        h0=randn(directions, batch, features, seed=seed + 4).to(dtype),
        c0=randn(directions, batch, hidden, seed=seed + 5).to(dtype) if lstm else None,
        lengths=lengths,
        starts=starts,
        resets=coin(time, batch) if resets else None,
        mask=(~coin(directions, batch, features)).to(dtype) / 0.75 if mask else None,
        zone_h=coin(directions, count, features) if zone_h == "masks" else None,
        zone_c=coin(directions, count, hidden) if zone_c == "masks" else None,
        zoneout_h=rates[0],
        zoneout_c=rates[1],
        mode=mode,
        steps=time,
    )


def probes(layer: Layer) -> dict[str, Tensor]:
    """Zeros to be added to W_hh·h, to the normalised c and to W_hr·m of every token, for the gradients by those."""
    (count, directions, gates, hidden), dtype = layer.gi.shape, torch.promote_types(layer.w_hh.dtype, torch.float32)
    shapes = {"through": (gates, hidden), "slopes_c": (hidden,), "grad_states": layer.h0.shape[2:]}
    return {name: torch.zeros(count, directions, *shape, dtype=dtype) for name, shape in shapes.items()}


def forward(layer: Layer, gi: Tensor | None = None, added: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """output, h_n, c_n, c_all and kept; past a length they are 0. h is rounded to the dtype of w_hh where it is fed
    back, and m where W_hr takes it; the rest is at least float32. gi: in place of the layer's, for its gradient.
    added: `probes`. Also hat_hh, rstd_hh, hat_c and rstd_c, of the layer norms."""
    gi, added = layer.gi if gi is None else gi, probes(layer) if added is None else added
    dtype = layer.w_hh.dtype
    compute = torch.promote_types(dtype, torch.float32)

    def operand(x):
        return x.to(dtype).to(compute)

    (directions, batch, features), (count, _, gates, hidden), lstm = layer.h0.shape, gi.shape, layer.mode == "lstm"
    live = torch.ones(layer.steps, batch, dtype=torch.bool)
    if layer.lengths is not None:
        live = torch.arange(layer.steps)[:, None] < layer.lengths
    shapes = {
        "output": (features,), "c_all": (hidden,), "kept": (4 if gates > 1 else 1, hidden), "hat_hh": (gates, hidden),
        "rstd_hh": (), "hat_c": (hidden,), "rstd_c": (),
    }  # fmt: skip
    of_directions, finals = [], []
    for d in range(directions):
        h, c = layer.h0[d].to(compute), layer.c0[d].to(compute) if lstm else None
        found = {name: [torch.zeros(shape, dtype=compute)] * count for name, shape in shapes.items()}
        for t in reversed(range(layer.steps)) if d else range(layer.steps):
            rows = live[t].nonzero()[:, 0]
            token = (t * batch if layer.starts is None else int(layer.starts[t])) + rows
            before, c_before = h[rows], c[rows] if lstm else None
            if layer.resets is not None:
                before = before.masked_fill(layer.resets[t, rows, None], 0.0)
                c_before = c_before.masked_fill(layer.resets[t, rows, None], 0.0) if lstm else None
            step = step_of(layer, d, rows, token, gi, before, c_before, operand, added)
            step["output"] = operand(step["output"])
            h = h.index_put((rows,), step["output"])
            c = c.index_put((rows,), step["c_all"]) if lstm else None
            for name, value in step.items():
                for i, place in enumerate(token.tolist()):
                    found[name][place] = value[i]
        of_directions.append({n: torch.stack(v) if count else gi.new_zeros(0, *shapes[n]) for n, v in found.items()})
        finals.append((h, c))
    found = {name: torch.stack([of_one[name] for of_one in of_directions]) for name in shapes}
    empty = torch.zeros(0, dtype=compute)
    zoned = layer.zone_h is None and layer.zoneout_h > 0.0
    return found | {
        "output": found["output"].movedim(0, 1).flatten(1).contiguous(),
        "h_n": torch.stack([h for h, _ in finals]),
        "c_n": torch.stack([c for _, c in finals]) if lstm else empty,
        "c_all": found["c_all"] if lstm else empty,
        "kept": found["kept"] if gates > 1 or zoned else empty,
    }


def step_of(
    layer: Layer, d: int, rows: Tensor, token: Tensor, gi: Tensor, before: Tensor, c_before: Tensor | None,
    operand: Callable[[Tensor], Tensor], added: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """A step of these rows and tokens in the dtype of `before`, by result's name; its h is not rounded yet.

    operand: what the products make of a factor. added: `probes`.
    """
    compute, found = before.dtype, {}
    into = before if layer.mask is None else before * layer.mask[d, rows].to(compute)
    gh = operand(into) @ operand(layer.w_hh[d]).t()
    gh = gh if added is None else gh + added["through"][token, d].flatten(1)
    if layer.norm_hh is not None:
        hat, found["rstd_hh"] = _normalised(gh)
        found["hat_hh"] = hat.unflatten(1, gi.shape[2:])
        gh = hat * layer.norm_hh[d].flatten()
        gh = gh if layer.b_hh is None else gh + layer.b_hh[d].flatten()
    if layer.b_hn is not None:
        r_and_z = 2 * layer.b_hn.size(1)
        gh = torch.cat((gh[:, :r_and_z], gh[:, r_and_z:] + layer.b_hn[d].to(compute)), 1)
    now, c, kept = _step(layer.mode, gi[token, d].to(compute).flatten(1), gh, before, c_before)
    if layer.mode == "lstm":
        found["c_all"] = _zoned(c, c_before, layer.zone_c, layer.zoneout_c, d, token)
        if layer.norm_c is not None:
            found["hat_c"], found["rstd_c"] = _normalised(c)
            c = found["hat_c"] * layer.norm_c[d] + layer.bias_c[d]
        now = kept[:, 3] * torch.tanh(c if added is None else c + added["slopes_c"][token, d])
        if layer.w_hr is not None:
            now = operand(now) @ operand(layer.w_hr[d]).t()
            now = now if added is None else now + added["grad_states"][token, d]
    found["kept"] = now[:, None] if kept is None else kept
    return found | {"output": _zoned(now, before, layer.zone_h, layer.zoneout_h, d, token)}


def _step(mode: str, gi, gh, h, c):
    """(h, c, kept (rows, 4, H)), without norms and projection."""
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


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    hat, _, rstd = torch.native_layer_norm(x, x.shape[1:], None, None, reference.EPS)
    return hat, rstd.flatten()


def _zoned(new, old, zone, rate: float, d: int, token):
    if zone is not None:
        return torch.where(zone[d, token], old, new)
    return new if rate == 0.0 else rate * old + (1.0 - rate) * new


def backward(layer: Layer, grads) -> dict[str, Tensor]:
    """slopes, through, slopes_c, grad_states, dh0 and dc0, by autograd. grads: those by output, h_n, c_n and c_all, or
    None each."""
    compute = torch.promote_types(layer.w_hh.dtype, torch.float32)
    states = {
        name: t.detach().to(compute).requires_grad_()
        for name in ("h0", "c0")
        if (t := getattr(layer, name)) is not None
    }
    layer = Layer(**vars(layer) | states)
    gi, added = layer.gi.detach().clone().requires_grad_(), probes(layer)
    wanted = {"slopes": gi, **{name: t.requires_grad_() for name, t in added.items()}}
    wanted |= {f"d{name}": t for name, t in states.items()}
    found = forward(layer, gi, added)
    names = ("output", "h_n", "c_n", "c_all")
    pairs = [(found[n], g.to(found[n].dtype)) for n, g in zip(names, grads, strict=True) if g is not None]
    outputs, given = ([pair[i] for pair in pairs] for i in (0, 1))
    got = torch.autograd.grad(outputs, list(wanted.values()), given, allow_unused=True, materialize_grads=True)
    by = dict(zip(wanted, got, strict=True))
    if layer.mode == "gru":  # dL/d(W_hn·h + b_hn) = r · dL/d(n before its activation)
        r = found["kept"].detach().movedim(0, 1)[:, :, 1]
        by["slopes"] = torch.cat(((by["slopes"][:, :, 2] * r)[:, :, None], by["slopes"]), 2)
    there = {"through": layer.norm_hh, "slopes_c": layer.norm_c, "grad_states": layer.w_hr, "dc0": layer.c0}
    nothing = torch.zeros(0, dtype=compute)
    return {"dc0": nothing} | {name: t if there.get(name, t) is not None else nothing for name, t in by.items()}


def hats(found: dict[str, Tensor], layer: Layer) -> tuple[Tensor | None, ...]:
    """hat_hh, rstd_hh, hat_c and rstd_c of what `forward` found, None without norms."""
    there = (layer.norm_hh, layer.norm_hh, layer.norm_c, layer.norm_c)
    return tuple(None if t is None else found[n].detach().float() for n, t in zip(HATS, there))


def random_grads(layer: Layer, seed: int = 11) -> tuple[Tensor | None, ...]:
    """Gradients by output, h_n, c_n and c_all in the layer's dtype; c's for an LSTM alone."""
    dtype, device, state = layer.w_hh.dtype, layer.gi.device, layer.h0.shape
    count, directions, features = layer.gi.size(0), *state[::2]
    shapes = [(count, directions * features), state]
    if layer.mode == "lstm":
        shapes += [layer.c0.shape, (directions, count, layer.gi.size(-1))]
    grads = [randn(*shape, seed=seed + i).to(device, dtype) for i, shape in enumerate(shapes)]
    return *grads, *[None] * (4 - len(grads))


BY_ROW = ("h0", "c0", "h_n", "c_n", "dh0", "dc0", "resets", "mask")  # (directions or steps, batch, ...)
BY_TOKEN = ("gi", "output", "slopes", "through", "slopes_c", "grad_states")  # (N, ...)
BY_DIRECTION = ("zone_h", "zone_c", "c_all", "kept", *HATS)  # (directions, N, ...)


def of_row(layer: Layer, name: str, value, b: int):
    """Row b of a padded layer's argument or result, or of a gradient by a result."""
    if not isinstance(value, Tensor) or value.numel() == 0:
        return value
    if name == "lengths":
        return value[b : b + 1]
    if name in BY_ROW:
        return value[:, b : b + 1].contiguous()
    axis = {**dict.fromkeys(BY_TOKEN, 0), **dict.fromkeys(BY_DIRECTION, 1)}.get(name)
    return value if axis is None else value.unflatten(axis, (layer.steps, -1)).select(axis + 1, b).contiguous()


def row(layer: Layer, b: int) -> Layer:
    """Row b alone; of a padded layer."""
    return Layer(**{name: of_row(layer, name, value, b) for name, value in vars(layer).items()})
