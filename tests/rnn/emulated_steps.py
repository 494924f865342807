"""Steps of a layer with extras (mask, zoneout, layer norm, projection) in float64, to hold the CUDA kernels against."""

import torch
from torch import Tensor

import fused_ops.rnn.layers  # noqa: F401  (defines the ops)
from tests.rnn.layer_oracle import GATES, Layer, layer_case
from tests.rnn.test_layers_emulated import rounded, states
from tests.support import assert_accurate, randn


def case(
    mode="gru", dtype=torch.float32, *, norm=False, projected=0, mask=False, zoneout=None, seed=0, **sizes
) -> Layer:
    """`layer_case` with a layer norm and a projection."""
    layer = layer_case(mode, dtype=dtype, mask=mask, zoneout=zoneout, seed=seed, **sizes)
    (directions, _, hidden), gates, lstm = layer.h0.shape, GATES[mode], mode == "lstm"
    if norm:
        layer.norm_hh = 1 + 0.3 * randn(directions, gates, hidden, seed=seed + 21)
        layer.b_hh = 0.5 * randn(directions, gates, hidden, seed=seed + 22) if sizes.get("bias", True) else None
        layer.norm_c = 1 + 0.3 * randn(directions, hidden, seed=seed + 23) if lstm else None
        layer.bias_c = 0.5 * randn(directions, hidden, seed=seed + 24) if lstm else None
        layer.b_hn = None
    if projected:
        layer.w_hr = (randn(directions, projected, hidden, seed=seed + 25) * (1.5 / hidden**0.5)).to(dtype)
        layer.w_hh, layer.h0 = layer.w_hh[..., :projected].contiguous(), layer.h0[..., :projected].contiguous()
        layer.mask = None if layer.mask is None else layer.mask[..., :projected].contiguous()
        layer.zone_h = None if layer.zone_h is None else layer.zone_h[..., :projected].contiguous()
    return layer


def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """((x - mean)/√(variance + 1e-5), 1/√(...)) over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = 1.0 / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred * rstd, rstd.squeeze(-1)


def zoned(new: Tensor, old: Tensor, zone: Tensor | None, rate: float) -> Tensor:
    return rate * old + (1 - rate) * new if zone is None else torch.where(zone, old, new)


def product(layer: Layer, d: int, before: Tensor, rows: Tensor) -> Tensor:
    """W_hh·(h·mask), (rows, G·H), of the states before each row of `rows`."""
    into = before if layer.mask is None else (before.double() * layer.mask[d, rows].double()).to(before.dtype)
    return rounded(into) @ rounded(layer.w_hh[d]).t()


def step(layer: Layer, d: int, z: Tensor, before: Tensor, c_before: Tensor | None, exact: bool,
         probes: dict[str, Tensor] | None = None) -> tuple:  # fmt: skip
    """(h, c, kept) of one direction's tokens in float64. exact: nothing is rounded on the way."""
    places, (mode, count) = layer.places(), (layer.mode, z.size(0))
    gi = layer.gi[places, d].double()
    if layer.norm_hh is not None:
        z = normalised(z)[0] * layer.norm_hh[d].double().flatten()
        z = z if layer.b_hh is None else z + layer.b_hh[d].double().flatten()
    gh = z.view(count, GATES[mode], -1)
    if probes and mode == "gru":
        gh = torch.cat((gh[:, :2], gh[:, 2:] + probes["q"][:, None]), 1)
    if layer.b_hn is not None:
        gh = torch.cat((gh[:, :2], gh[:, 2:] + layer.b_hn[d].double()), 1)
    zone_h, zone_c = (None if t is None else t[d, places] for t in (layer.zone_h, layer.zone_c))
    before, c, kept = before.double(), None, None
    if mode == "gru":
        r, z = torch.sigmoid(gi[:, 0] + gh[:, 0]), torch.sigmoid(gi[:, 1] + gh[:, 1])
        n = torch.tanh(gi[:, 2] + r * gh[:, 2])
        fresh, kept = n + z * (before - n), torch.stack((gh[:, 2], r, z, n), 1)
    elif mode == "lstm":
        i, f, g, o = (gi + gh).unbind(1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c, kept = f * c_before + i * g, torch.stack((i, f, g, o), 1)
        y = c
        if layer.norm_c is not None:
            y = normalised(c)[0] * layer.norm_c[d].double() + layer.bias_c[d].double()
        y = y + probes["c"] if probes else y
        fresh, c = o * torch.tanh(y), zoned(c, c_before, zone_c, layer.zoneout_c)
        if layer.w_hr is not None:
            w_hr = layer.w_hr[d].double() if exact else rounded(layer.w_hr[d])
            fresh = (fresh if exact else rounded(fresh.to(layer.w_hr.dtype))) @ w_hr.t()
    else:
        s = (gi + gh)[:, 0]
        fresh = torch.relu(s) if mode == "rnn_relu" else torch.tanh(s)
        if layer.zone_h is None and layer.zoneout_h > 0:
            kept = fresh[:, None]
    fresh = fresh + probes["h"] if probes else fresh
    return zoned(fresh, before, zone_h, layer.zoneout_h), c, kept


def run(layer: Layer, keep: bool = True) -> dict[str, Tensor]:
    found = torch.ops.fused_ops.rnn_layer_fwd_cuda(*layer.fwd_arguments(keep))
    return dict(zip(("output", "h_n", "c_n", "c_all", "kept"), found, strict=True))


def check(layer: Layer) -> dict[str, Tensor]:
    """Each step against what the formulas make of the states that the run itself left before it."""
    found, places, lstm = run(layer), layer.places(), layer.mode == "lstm"
    directions, _, features = layer.h0.shape
    output, terms = found["output"].view(-1, directions, features), layer.gi.size(-1)
    wide = layer.w_hh.dtype == torch.float32
    rows = layer.tokens()[1]
    for d in range(directions):
        before, last = states(layer, d, output[:, d], layer.h0[d])
        assert torch.equal(found["h_n"][d], last)
        c_before = None
        if lstm:
            c_before, c_last = states(layer, d, found["c_all"][d], layer.c0[d].float())
            assert torch.equal(found["c_n"][d], c_last.to(layer.c0.dtype))
            c_before = c_before.double()
        h, c, kept = step(layer, d, product(layer, d, before, rows), before, c_before, False)
        close = {"terms": 4 * terms if layer.norm_hh is not None else terms, "ulps": 4.0 if wide else 1.0}
        if layer.w_hr is not None:  # the rounding of o·tanh(c), which may fall the other way
            close |= {"terms": 64 if wide else 4, "ulps": 8.0 if wide else 2.0}
        assert_accurate(output[places, d], h, **close)
        if lstm:
            assert_accurate(found["c_all"][d, places], c, terms=4 * terms, ulps=8.0)
        if kept is not None:
            assert_accurate(found["kept"][d, places], kept, terms=4 * terms, ulps=close["ulps"])
        else:
            assert found["kept"].numel() == 0
    past = torch.ones(output.size(0), dtype=torch.bool).index_fill(0, places, False)
    assert not output[past].any(), "zeros past a length"
    return found


RESULTS = ("slopes", "through", "slopes_c", "grad_states", "dh0", "dc0")


def walk(layer: Layer, d: int):
    """(rows, places) of each step of a direction, in its own order."""
    t, b = layer.tokens()
    lengths = torch.full((layer.h0.size(1),), layer.steps) if layer.lengths is None else layer.lengths
    nth, places = t if d == 0 else lengths[b] - 1 - t, layer.places()
    for s in range(layer.steps):
        yield b[nth == s], t[nth == s], places[nth == s]


def narrowed(layer: Layer, d: int, places: Tensor, rows: Tensor, z: Tensor, before, c_before, probes) -> tuple:
    """`step` of some tokens, with something added where a slope is wanted."""
    some = Layer(**vars(layer) | {"steps": 1, "lengths": None, "starts": None, "h0": layer.h0[:, rows]})
    some.gi = layer.gi[places] + probes["gi"][places]
    for name in ("zone_h", "zone_c"):
        zone = getattr(layer, name)
        setattr(some, name, None if zone is None else zone[:, places])
    return step(
        some, d, z + probes["z"][places, d], before, c_before, True, {n: p[places, d] for n, p in probes.items()}
    )


def truth(layer: Layer, grads) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A float64 layer's results and their gradients, by autograd."""
    (directions, _, features), gates, lstm = layer.h0.shape, GATES[layer.mode], layer.mode == "lstm"
    count, hidden = layer.gi.size(0), layer.gi.size(-1)
    shapes = {"gi": (gates, hidden), "z": (gates * hidden,), "q": (hidden,), "c": (hidden,), "h": (features,)}
    probes = {n: torch.zeros(count, directions, *s, dtype=torch.float64, requires_grad=True) for n, s in shapes.items()}
    h0, c0 = (None if t is None else t.detach().clone().requires_grad_() for t in (layer.h0, layer.c0))
    outputs, cells, kepts, ends = [], [], [], []
    for d in range(directions):
        h, c = h0[d], c0[d] if lstm else None
        output, c_all = (
            torch.zeros(count, features, dtype=torch.float64),
            torch.zeros(count, hidden, dtype=torch.float64),
        )
        kept = None
        for rows, times, places in walk(layer, d):
            cut = 1.0 if layer.resets is None else (~layer.resets[times, rows, None]).double()
            before, c_before = h[rows] * cut, c[rows] * cut if lstm else None
            into = before if layer.mask is None else before * layer.mask[d, rows]
            now, c_now, k = narrowed(layer, d, places, rows, into @ layer.w_hh[d].t(), before, c_before, probes)
            h, output = h.index_put((rows,), now), output.index_put((places,), now)
            if lstm:
                c, c_all = c.index_put((rows,), c_now), c_all.index_put((places,), c_now)
            if k is not None:
                kept = torch.zeros(count, *k.shape[1:], dtype=torch.float64) if kept is None else kept
                kept = kept.index_put((places,), k.detach())
        outputs, cells, kepts = [*outputs, output], [*cells, c_all], [*kepts, kept]
        ends.append((h, c))
    found = {"output": torch.cat(outputs, 1), "h_n": torch.stack([h for h, _ in ends])}
    none = torch.zeros(0, dtype=torch.float64)
    found |= (
        {"c_n": torch.stack([c for _, c in ends]), "c_all": torch.stack(cells)}
        if lstm
        else {"c_n": none, "c_all": none}
    )
    wanted = [*probes.values(), h0, *([c0] if lstm else [])]
    pairs = [(f, g) for f, g in zip(found.values(), grads, strict=True) if g is not None]
    got = torch.autograd.grad([f for f, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    by = dict(zip((*probes, "h0", "c0"), got))
    slopes = by["gi"] if layer.mode != "gru" else torch.cat((by["q"].unsqueeze(2), by["gi"]), 2)
    normed = layer.norm_hh is not None
    exact = {
        "slopes": slopes,
        "through": by["z"].unflatten(2, (gates, hidden)) if normed else none,
        "slopes_c": by["c"] if normed and lstm else none,
        "grad_states": by["h"] if layer.w_hr is not None else none,
        "dh0": by["h0"],
        "dc0": by["c0"] if lstm else none,
    }
    found = {name: value.detach() for name, value in found.items()}
    return found | {"kept": none if kepts[0] is None else torch.stack(kepts)}, exact


def hats(layer: Layer, found: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """hat_hh, rstd_hh, hat_c, rstd_c of what a forward left, NaN in padding, as the driver makes them."""
    if layer.norm_hh is None:
        return None, None, None, None
    (directions, _, features), count, hidden = layer.h0.shape, layer.gi.size(0), layer.gi.size(-1)
    kind = torch.float64 if layer.w_hh.dtype == torch.float64 else torch.float32
    output, places, rows = found["output"].view(count, directions, features), layer.places(), layer.tokens()[1]

    def filled(*values: Tensor) -> Tensor:
        whole = torch.full((directions, count, *values[0].shape[1:]), float("nan"), dtype=kind)
        return whole.index_copy(1, places, torch.stack([v.to(kind) for v in values]))

    hat_hh, rstd_hh, hat_c, rstd_c = [], [], [], []
    for d in range(directions):
        before = states(layer, d, output[:, d], layer.h0[d])[0]
        hat, rstd = normalised(product(layer, d, before, rows))
        hat_hh, rstd_hh = [*hat_hh, hat.view(-1, GATES[layer.mode], hidden)], [*rstd_hh, rstd]
        if layer.mode == "lstm":
            first = layer.c0[d].to(kind)
            c_before = states(layer, d, found["c_all"][d], first)[0].double()
            i, f, g, _ = found["kept"][d, places].double().unbind(1)
            hat, rstd = normalised(f * c_before + i * g)
            hat_c, rstd_c = [*hat_c, hat], [*rstd_c, rstd]
    of_c = (filled(*hat_c), filled(*rstd_c)) if hat_c else (None, None)
    return filled(*hat_hh), filled(*rstd_hh), *of_c


def replay(layer: Layer, grads, found: dict[str, Tensor], hat, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each step must make of the step after, `own`, which nothing but its rounding separates from the truth."""
    (directions, batch, features), gates, mode = layer.h0.shape, GATES[layer.mode], layer.mode
    count, hidden, lstm = layer.gi.size(0), layer.gi.size(-1), mode == "lstm"
    output, c_all, kept = (found[n].double() for n in ("output", "c_all", "kept"))
    output = output.view(count, directions, features)
    grad_output, grad_h_n, grad_c_n, grad_c_all = (0.0 if g is None else g.double() for g in grads)
    grad_output = grad_output.view(output.shape) if isinstance(grad_output, Tensor) else output * 0
    hat_hh, rstd_hh, hat_c, rstd_c = (None if t is None else t.double() for t in hat)
    made = {n: torch.zeros(own[n].shape, dtype=torch.float64) for n in RESULTS}
    for d in range(directions):
        w = rounded(layer.w_hh[d]).view(gates, hidden, features)
        dh = torch.zeros(batch, features, dtype=torch.float64) + (grad_h_n if grads[1] is None else grad_h_n[d])
        dc = torch.zeros(batch, hidden, dtype=torch.float64) + (grad_c_n if grads[2] is None else grad_c_n[d])
        before_of = states(layer, d, output[:, d], layer.h0[d].double())[0]
        c_before_of = states(layer, d, c_all[d], layer.c0[d].double())[0] if lstm else None
        index = torch.full((count,), -1).index_copy(0, layer.places(), torch.arange(len(layer.places())))
        for rows, times, at in reversed(list(walk(layer, d))):
            if len(rows) == 0:
                continue
            before = before_of[index[at]]
            fresh, dh_rest = split(dh[rows] + grad_output[at, d], layer.zone_h, layer.zoneout_h, d, at)
            if layer.w_hr is not None:
                made["grad_states"][at, d] = fresh
                fresh = rounded(own["grad_states"][at, d]) @ rounded(layer.w_hr[d])
            dc_rest = 0.0
            if lstm:
                c_before = c_before_of[index[at]]
                now = dc[rows] if grads[3] is None else dc[rows] + grad_c_all[d, at]
                dc_now, dc_rest = split(now, layer.zone_c, layer.zoneout_c, d, at)
                c = kept[d, at, 1] * c_before + kept[d, at, 0] * kept[d, at, 2] if changed(layer) else c_all[d, at]
                normed = None if hat_c is None else (hat_c[d, at], rstd_c[d, at])
                slopes, by_y, slope_c, dc_before = lstm_slopes(
                    layer, d, kept[d, at], c, c_before, fresh, dc_now, normed
                )
                if slope_c is not None:
                    made["slopes_c"][at, d] = slope_c
                dc[rows] = dc_before + dc_rest
            elif mode == "gru":
                q, r, z, n = kept[d, at].unbind(1)
                dn = fresh * (1 - z) * (1 - n**2)
                slopes = [dn * r, dn * q * r * (1 - r), fresh * (before - n) * z * (1 - z), dn]
                by_y = [slopes[1], slopes[2], slopes[0]]
                dh_rest = dh_rest + fresh * z
            else:
                h = kept[d, at, 0] if kept.numel() else output[at, d]
                slopes, by_y = [fresh * (h > 0) if mode == "rnn_relu" else fresh * (1 - h**2)], None
            made["slopes"][at, d] = torch.stack(slopes, 1)
            if layer.norm_hh is None:
                into = rounded(own["slopes"][at, d])[:, :gates]
                into = into.roll(-1, 1) if mode == "gru" else into
            else:
                by = torch.stack(by_y or slopes, 1) * layer.norm_hh[d].double()
                made["through"][at, d] = unnormed(by.flatten(1), hat_hh[d, at].flatten(1), rstd_hh[d, at]).view(
                    by.shape
                )
                into = rounded(own["through"][at, d])
            down = into.flatten(1) @ w.flatten(0, 1)
            dh[rows] = dh_rest + (down if layer.mask is None else down * layer.mask[d, rows].double())
            if layer.resets is not None:
                cut = (~layer.resets[times, rows, None]).double()
                dh[rows], dc[rows] = dh[rows] * cut, dc[rows] * cut
        made["dh0"][d] = dh
        if lstm:
            made["dc0"][d] = dc
    return made


def lstm_slopes(layer: Layer, d: int, kept, c, c_before, dh, dc, normed) -> tuple:
    """(slopes, None, dL/d(LN(c)·norm_c + bias_c), dL/dc of the step before) of one step."""
    i, f, g, o = kept.unbind(1)
    slope_c = None
    if normed is None:
        squashed = c.tanh()
        dc = dc + dh * o * (1 - squashed**2)
    else:
        hat, rstd = normed
        squashed = (hat * layer.norm_c[d].double() + layer.bias_c[d].double()).tanh()
        slope_c = dh * o * (1 - squashed**2)
        dc = dc + unnormed(slope_c * layer.norm_c[d].double(), hat, rstd)
    of = (dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g**2))
    return [*of, dh * squashed * o * (1 - o)], None, slope_c, dc * f


def changed(layer: Layer) -> bool:
    return layer.zone_c is not None or layer.zoneout_c > 0


def split(by: Tensor, zone: Tensor | None, rate: float, d: int, at: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient by the state after zoneout, as those by the new and by the old one."""
    stays = zone[d, at].double() if zone is not None else rate
    return by * (1 - stays), by * stays


def unnormed(by: Tensor, hat: Tensor, rstd: Tensor) -> Tensor:
    """A gradient through a layer norm."""
    return rstd[:, None] * (by - by.mean(1, keepdim=True) - hat * (by * hat).mean(1, keepdim=True))


def poisoned(layer: Layer, found: dict[str, Tensor], grads) -> tuple[dict[str, Tensor], tuple]:
    """The same with NaN in what nobody may read."""
    past = torch.ones(layer.gi.size(0), dtype=torch.bool).index_fill(0, layer.places(), False)
    found = dict(found)
    for name in ("c_all", "kept"):
        if found[name].numel():
            found[name] = found[name].masked_fill(past.view(-1, *[1] * (found[name].dim() - 2)), float("nan"))
    grads = tuple(
        g if i in (1, 2) or g is None else g.masked_fill(past[:, None], float("nan")) for i, g in enumerate(grads)
    )
    return found, grads


def gradients_for(layer: Layer, seed: int = 11) -> tuple[Tensor | None, ...]:
    (directions, _, features), count, hidden = layer.h0.shape, layer.gi.size(0), layer.gi.size(-1)
    shapes = [(count, directions * features), layer.h0.shape]
    shapes += [layer.c0.shape, (directions, count, hidden)] if layer.mode == "lstm" else []
    grads = [randn(*s, seed=seed + i).to(layer.w_hh.dtype) for i, s in enumerate(shapes)]
    return *grads, *[None] * (4 - len(grads))


def run_backward(layer: Layer, grads, found, hat) -> dict[str, Tensor]:
    arguments = layer.bwd_arguments(grads, found["output"], found["c_all"], found["kept"], hat)
    return dict(zip(RESULTS, torch.ops.fused_ops.rnn_layer_bwd_cuda(*arguments), strict=True))


def check_backward(layer: Layer, found: dict[str, Tensor]) -> dict[str, Tensor]:
    found, grads = poisoned(layer, found, gradients_for(layer))
    hat = hats(layer, found)
    own = run_backward(layer, grads, found, hat)
    made, terms = replay(layer, grads, found, hat, own), GATES[layer.mode] * layer.gi.size(-1)
    for name, value in own.items():
        try:
            assert value.shape == made[name].shape
            assert_accurate(value, made[name], terms=4 * terms if value.dtype == torch.float32 else 2, ulps=2.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    return own
