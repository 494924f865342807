"""Layers in the emulator, step by step: what each must make of what the run itself left before it, in float64.

Nothing but one step's rounding separates the two, so that tolerances are ulps and do not grow with time. RNN, GRU and
LSTM alike, with or without mask, zoneout, layer norm and projection.
"""

from contextlib import contextmanager

import torch
from torch import Tensor

import fused_ops.rnn.layers  # noqa: F401  (defines the ops)
from tests.emulation import capability, multiprocessors, set_seed
from tests.rnn import layer_oracle
from tests.rnn.layer_oracle import BACKWARD, FORWARD, GATES, HATS, Layer, of_row, random_grads, row, step_of
from tests.support import assert_accurate

# What the planner takes: W_hh this small fits into a cluster; a chip without clusters takes the grid. (capability, SMs)
DESIGNS = {"cluster": (90, 16), "grid": (80, 20)}
Results = dict[str, Tensor]
Grads = tuple[Tensor | None, ...]


@contextmanager
def chip(design: str, sms: int | None = None):
    version, count = DESIGNS[design]
    with capability(version), multiprocessors(sms or count):
        yield


def rounded(x: Tensor) -> Tensor:
    """To what the tensor cores multiply, in float64: float32 to tf32, to the nearest, ties away from zero."""
    if x.dtype != torch.float32:
        return x.double()
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def run(layer: Layer, keep: bool = True) -> Results:
    return dict(zip(FORWARD, torch.ops.fused_ops.rnn_layer_fwd_cuda(*layer.fwd_arguments(keep)), strict=True))


def run_backward(layer: Layer, grads: Grads, found: Results) -> Results:
    saved = [found[name] for name in ("output", "c_all", "kept")]
    arguments = layer.bwd_arguments(grads, *saved, [found.get(name) for name in HATS])
    return dict(zip(BACKWARD, torch.ops.fused_ops.rnn_layer_bwd_cuda(*arguments), strict=True))


def states(layer: Layer, d: int, of_tokens: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """(before each of the N tokens, after each row's last step): one direction's states among what a run left, zeroed
    where a step resets them."""
    t, b = layer.tokens()
    lengths = torch.full((layer.h0.size(1),), layer.steps) if layer.lengths is None else layer.lengths
    step = t if d == 0 else lengths[b] - 1 - t
    after = torch.stack([first, *[torch.zeros_like(first)] * layer.steps])
    after[step + 1, b] = of_tokens[layer.places()].to(first.dtype)
    before = after[step, b]
    if layer.resets is not None:
        before = before.masked_fill(layer.resets[t, b, None], 0.0)
    by_token = torch.zeros(of_tokens.shape, dtype=first.dtype).index_copy(0, layer.places(), before)
    return by_token, after[lengths, torch.arange(first.size(0))]


def check(layer: Layer) -> Results:
    """A forward. Returns its results and what its layer norms made, all of it NaN in padding but the output."""
    found, places = run(layer), layer.places()
    assert not found["output"][past(layer)].any(), "zeros past a length"
    made = [_check_direction(layer, d, found, places) for d in range(layer.h0.size(0))]
    for name in HATS:
        if name in made[0]:
            values = torch.stack([step[name].float() for step in made])
            whole = torch.full((len(made), layer.gi.size(0), *values.shape[2:]), float("nan"))
            found[name] = whole.index_copy(1, places, values)
    return found


def _check_direction(layer: Layer, d: int, found: Results, places: Tensor) -> Results:
    output, c_before = found["output"].unflatten(1, (layer.h0.size(0), -1))[:, d], None
    before, last = states(layer, d, output, layer.h0[d])
    assert torch.equal(found["h_n"][d], last)
    if layer.mode == "lstm":
        c_before, c_last = states(layer, d, found["c_all"][d], layer.c0[d].float())
        assert torch.equal(found["c_n"][d], c_last.to(layer.c0.dtype))
        c_before = c_before[places].double()

    def operand(x: Tensor) -> Tensor:
        return rounded(x.to(layer.w_hh.dtype))

    rows, is_wide, hidden = layer.tokens()[1], layer.w_hh.dtype == torch.float32, layer.gi.size(-1)
    made = step_of(layer, d, rows, places, layer.gi, before[places].double(), c_before, operand)
    terms, ulps = hidden if layer.norm_hh is None else 4 * hidden, 4.0 if is_wide else 1.0
    if layer.w_hr is not None:  # the rounding of o·tanh(c), which may fall the other way
        terms, ulps = (64, 8.0) if is_wide else (4, 2.0)
    assert_accurate(output[places], made["output"], terms=terms, ulps=ulps)
    if layer.mode == "lstm":
        assert_accurate(found["c_all"][d, places], made["c_all"], terms=4 * hidden, ulps=8.0)
    if found["kept"].numel():
        assert_accurate(found["kept"][d, places], made["kept"], terms=4 * hidden, ulps=ulps)
    return made


def past(layer: Layer) -> Tensor:
    """(N,) bool: padding."""
    return torch.ones(layer.gi.size(0), dtype=torch.bool).index_fill(0, layer.places(), False)


def as_left(layer: Layer) -> Results:
    """What a forward would leave, by the oracle; NaN in padding."""
    found, padding = layer_oracle.forward(layer), past(layer)
    saved = {"output": found["output"].to(layer.w_hh.dtype), "c_all": found["c_all"].float()}
    saved["kept"] = found["kept"].to(layer.w_hh.dtype)
    for name in ("c_all", "kept"):
        if saved[name].numel():
            saved[name] = saved[name].index_fill(1, padding.nonzero()[:, 0], float("nan"))
    hats = zip(HATS, layer_oracle.hats(found, layer))
    return saved | {name: hat for name, hat in hats if hat is not None}


def gradients(layer: Layer) -> Grads:
    """Those by output, h_n, c_n and c_all: NaN in padding."""
    output, h_n, c_n, c_all = random_grads(layer)
    padding = past(layer)[:, None]
    c_all = None if c_all is None else c_all.masked_fill(padding, float("nan"))
    return output.masked_fill(padding, float("nan")), h_n, c_n, c_all


def check_backward(layer: Layer, found: Results, grads: Grads | None = None) -> Results:
    """A backward of what `check` found."""
    grads = gradients(layer) if grads is None else grads
    own = run_backward(layer, grads, found)
    made = replay(layer, grads, found, own)
    for name, value in own.items():
        try:
            terms = 4 * GATES[layer.mode] * layer.gi.size(-1) if value.dtype == torch.float32 else 2
            assert_accurate(value, made[name], terms=terms, ulps=2.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    return own


def replay(layer: Layer, grads: Grads, found: Results, own: Results) -> Results:
    """What each step must make of the step after: of `own`, which nothing but its rounding separates from the truth."""
    grads = tuple(None if g is None else g.double() for g in grads)
    made = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in own.items()}
    for d in range(layer.h0.size(0)):
        dh, dc = (
            None if s is None else torch.zeros_like(s[d], dtype=torch.float64) + (0.0 if grad is None else grad[d])
            for s, grad in zip((layer.h0, layer.c0), grads[1:3])
        )
        for rows, times, at in reversed(list(_walk(layer, d))):
            step = _StepBack(layer, d, rows, at, grads, found, own, made)
            dh[rows], dc_rows = step(dh[rows], None if dc is None else dc[rows])
            kept = 1.0 if layer.resets is None else (~layer.resets[times, rows, None]).double()
            dh[rows] *= kept
            if dc is not None:
                dc[rows] = dc_rows * kept
        made["dh0"][d] = dh
        if dc is not None:
            made["dc0"][d] = dc
    return made


def _walk(layer: Layer, d: int):
    """(rows, times, tokens) of each step of a direction, in its own order."""
    t, b = layer.tokens()
    lengths = torch.full((layer.h0.size(1),), layer.steps) if layer.lengths is None else layer.lengths
    nth, places = t if d == 0 else lengths[b] - 1 - t, layer.places()
    for s in range(layer.steps):
        yield b[nth == s], t[nth == s], places[nth == s]


class _StepBack:
    """The rows' step of tokens `at` in direction d, backward. Called with dL/dh and dL/dc after it, it returns those
    before it; its results by token go into `made`."""

    def __init__(self, layer: Layer, d: int, rows: Tensor, at: Tensor, grads: Grads, found: Results, own: Results,
                 made: Results):  # fmt: skip
        self.layer, self.d, self.rows, self.at, self.made, self.own = layer, d, rows, at, made, own
        self.grad_output, _, _, self.grad_c_all = grads
        output = found["output"].view(-1, layer.h0.size(0), layer.h0.size(2))[:, d]
        self.h = found["kept"][d, at, 0] if found["kept"].numel() else output[at]
        self.h_before = states(layer, d, output, layer.h0[d])[0][at].double()
        if GATES[layer.mode] > 1:
            self.kept = found["kept"][d, at].double().unbind(1)
        if layer.mode == "lstm":
            self.c = found["c_all"][d, at].double()
            self.c_before = states(layer, d, found["c_all"][d], layer.c0[d].to(self.c))[0][at].double()
        self.hats = {name: found[name][d, at].double() for name in HATS if name in found}

    def __call__(self, dh: Tensor, dc: Tensor | None) -> tuple[Tensor, Tensor | None]:
        layer, d, at, made = self.layer, self.d, self.at, self.made
        if self.grad_output is not None:
            dh = dh + self.grad_output.view(-1, layer.h0.size(0), dh.size(1))[at, d]
        dh, bypass = self.split(dh, layer.zone_h, layer.zoneout_h)
        if layer.w_hr is not None:
            made["grad_states"][at, d] = dh
            dh = rounded(self.own["grad_states"][at, d]) @ rounded(layer.w_hr[d])
        if layer.mode == "lstm":
            slopes, dc = self.lstm(dh, dc)
        elif layer.mode == "gru":
            slopes = self.gru(dh)
            bypass = bypass + dh * self.kept[2]
        else:
            h = self.h.double()
            slopes = (dh * (h > 0) if layer.mode == "rnn_relu" else dh * (1 - h**2),)
        made["slopes"][at, d] = torch.stack(slopes, 1)
        gates = self.own["slopes"][at, d][:, : GATES[layer.mode]]
        gates = gates.roll(-1, 1) if layer.mode == "gru" else gates  # from n, r, z to r, z, n
        if layer.norm_hh is not None:
            by_gate = torch.stack((*slopes[1:3], slopes[0]) if layer.mode == "gru" else slopes, 1)
            by_hat = (by_gate * layer.norm_hh[d].double()).flatten(1)
            through = unnormed(by_hat, self.hats["hat_hh"].flatten(1), self.hats["rstd_hh"])
            made["through"][at, d] = through.view(by_gate.shape)
            gates = self.own["through"][at, d]
        into = rounded(gates.contiguous()).flatten(1) @ rounded(layer.w_hh[d])
        return bypass + (into if layer.mask is None else into * layer.mask[d, self.rows].double()), dc

    def split(self, by: Tensor, zone: Tensor | None, rate: float) -> tuple[Tensor, Tensor]:
        """A gradient by the state after zoneout, as those by the new and by the old one."""
        stays = rate if zone is None else zone[self.d, self.at].double()
        return by * (1 - stays), by * stays

    def gru(self, dh: Tensor) -> tuple[Tensor, ...]:
        q, r, z, n = self.kept
        dn = dh * (1 - z) * (1 - n**2)
        return dn * r, dn * q * r * (1 - r), dh * (self.h_before - n) * z * (1 - z), dn

    def lstm(self, dh: Tensor, dc: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """(slopes, dL/dc before the step)."""
        layer, d, (i, f, g, o) = self.layer, self.d, self.kept
        dc = dc if self.grad_c_all is None else dc + self.grad_c_all[d, self.at]
        dc, bypass = self.split(dc, layer.zone_c, layer.zoneout_c)
        if layer.norm_c is None:
            changed = layer.zone_c is not None or layer.zoneout_c > 0.0
            squashed = (f * self.c_before + i * g if changed else self.c).tanh()
            dc = dc + dh * o * (1 - squashed**2)
        else:
            hat, norm = self.hats["hat_c"], layer.norm_c[d].double()
            squashed = (hat * norm + layer.bias_c[d].double()).tanh()
            slope = dh * o * (1 - squashed**2)
            self.made["slopes_c"][self.at, d] = slope
            dc = dc + unnormed(slope * norm, hat, self.hats["rstd_c"])
        slopes = (dc * g * i * (1 - i), dc * self.c_before * f * (1 - f), dc * i * (1 - g**2))
        return (*slopes, dh * squashed * o * (1 - o)), dc * f + bypass


def unnormed(by: Tensor, hat: Tensor, rstd: Tensor) -> Tensor:
    """A gradient through a layer norm."""
    return rstd[:, None] * (by - by.mean(1, keepdim=True) - hat * (by * hat).mean(1, keepdim=True))


def check_rows(layer: Layer, design: str, *sms: int) -> None:
    """A row's results have the same bits alone and in a batch, in another order of threads, on chips of `sms`
    multiprocessors; and that another row is NaN changes nothing."""
    layer.gi.unflatten(0, (layer.steps, -1))[:, -1] = float("nan")
    grads = dict(zip(FORWARD, gradients(layer)))
    hats = dict(zip(HATS, layer_oracle.hats(layer_oracle.forward(layer), layer)))

    def both(layer: Layer, grads: Results, hats: Results) -> Results:
        found = run(layer) | hats
        own = run_backward(layer, tuple(grads.values()), found)
        return {name: t.nan_to_num(7.0) for name, t in (found | own).items() if name not in HATS}

    def same(one: Results, other: Results) -> None:
        assert all([torch.equal(one[name], value) for name, value in other.items()])

    whole = both(layer, grads, hats)
    try:
        set_seed(5)
        same(whole, both(layer, grads, hats))
    finally:
        set_seed(0)
    for count in sms:
        with chip(design, count):
            same(whole, both(layer, grads, hats))
    for b in (0, layer.h0.size(1) - 2):
        parts = ({name: of_row(layer, name, t, b) for name, t in part.items()} for part in (grads, hats, whole))
        of_grads, of_hats, wanted = parts
        same(wanted, both(row(layer, b), of_grads, of_hats))
