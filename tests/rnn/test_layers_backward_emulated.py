"""The layers' CUDA backward on the CPU: against the formulas in float64, its accesses checked."""

import re
from contextlib import nullcontext

import pytest
import torch

import fused_ops.rnn.layers  # noqa: F401  (defines the op)
from tests.emulation import capability, every_schedule, multiprocessors, needs_emulator, run_on, set_seed
from tests.emulation.build import build_mutant
from tests.rnn import layer_oracle
from tests.rnn.layer_oracle import GATES, Layer, layer_case, random_grads
from tests.support import assert_accurate

pytestmark = needs_emulator

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# W_hh this small fits into a cluster; a chip without clusters takes the grid.
DESIGNS = {"cluster": nullcontext, "grid": lambda: capability(80)}
CASES = {
    "plain": {},
    "one step": {"time": 1, "hidden": 1, "directions": 2},
    "wide": {"time": 3, "batch": 2, "hidden": 96},
    "lengths and resets": {
        "time": 4, "batch": 9, "hidden": 19, "directions": 2, "lengths": [4, 0, 3, 1, 2, 4, 1, 2, 3], "resets": True
    },
    "packed and resets": {
        "time": 5, "batch": 5, "hidden": 12, "directions": 2, "lengths": [5, 4, 2, 2, 1], "packed": True, "resets": True
    },
}  # fmt: skip


@pytest.fixture(params=DESIGNS)
def design(request):
    with DESIGNS[request.param]():
        yield request.param


def saved(layer: Layer) -> tuple[torch.Tensor, ...]:
    """output, c_all and kept as a forward leaves them: zeros, NaN and NaN in padding."""
    found, dtype = layer_oracle.forward(layer), layer.w_hh.dtype
    past = torch.ones(found["output"].size(0), dtype=torch.bool).index_fill(0, layer.places(), False)
    c_all = found["c_all"].float()
    if c_all.numel():
        c_all = c_all.masked_fill(past[:, None], float("nan"))
    kept = found["kept"].to(dtype)
    if kept.numel():
        kept = kept.masked_fill(past[:, None, None], float("nan"))
    return found["output"].to(dtype), c_all, kept


def given(layer: Layer, seed: int = 11) -> tuple[torch.Tensor | None, ...]:
    """Gradients by output, h_n, c_n and c_all: NaN in padding."""
    grads = list(random_grads(layer, seed))
    past = torch.ones(layer.gi.size(0), dtype=torch.bool).index_fill(0, layer.places(), False)
    for i in (0, 3):
        if grads[i] is not None:
            grads[i] = grads[i].masked_fill(past[:, None], float("nan"))
    return tuple(grads)


def run(layer: Layer, grads, kept) -> tuple[torch.Tensor, ...]:
    slopes, _, _, _, dh0, dc0 = torch.ops.fused_ops.rnn_layer_bwd_cuda(*layer.bwd_arguments(grads, *kept))
    return slopes, dh0, dc0


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To what the tensor cores multiply, in float64: float32 to tf32, to the nearest, ties away from zero."""
    if x.dtype != torch.float32:
        return x.double()
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def replay(layer: Layer, grads, kept, slopes) -> tuple[torch.Tensor, ...]:
    """What each step must make of `slopes`, those of the step after, which nothing but their own rounding separates
    from the truth; in float64."""
    gates, lstm = GATES[layer.mode], layer.mode == "lstm"
    directions, batch, hidden = layer.h0.shape
    output, c_all, values = (t.double() for t in kept)
    output = output.view(-1, directions, hidden)
    grad_output, grad_h_n, grad_c_n, grad_c_all = (None if g is None else g.double() for g in grads)
    zero = torch.zeros(hidden, dtype=torch.float64)
    found, dh0, dc0 = torch.zeros_like(slopes, dtype=torch.float64), torch.zeros_like(layer.h0.double()), []
    for d in range(directions):
        w = rounded(layer.w_hh[d]).view(gates, hidden, hidden)
        w = (w.roll(1, 0) if layer.mode == "gru" else w).flatten(0, 1)  # slopes n, r, z of gates r, z, n
        for b in range(batch):
            length = layer.steps if layer.lengths is None else int(layer.lengths[b])
            times = range(length) if d == 0 else range(length - 1, -1, -1)
            tokens = [(t * batch if layer.starts is None else int(layer.starts[t])) + b for t in times]
            reset = [layer.resets is not None and bool(layer.resets[t, b]) for t in times]
            dh = zero if grad_h_n is None else grad_h_n[d, b]
            dc = zero if grad_c_n is None else grad_c_n[d, b]
            for s in range(length - 1, -1, -1):
                before = layer.h0[d, b].double() if s == 0 else output[tokens[s - 1], d]
                before = zero if reset[s] else before
                token = tokens[s]
                dh = dh if grad_output is None else dh + grad_output.view(output.shape)[token, d]
                if lstm:
                    c_before = layer.c0[d, b].double() if s == 0 else c_all[d, tokens[s - 1]]
                    dc = dc if grad_c_all is None else dc + grad_c_all[d, token]
                    i, f, g, o = values[d, token]
                    tanh_c = c_all[d, token].tanh()
                    dc = dc + dh * o * (1 - tanh_c**2)
                    of_f = dc * (zero if reset[s] else c_before) * f * (1 - f)
                    now = [dc * g * i * (1 - i), of_f, dc * i * (1 - g**2), dh * tanh_c * o * (1 - o)]
                    dh, dc = zero, dc * f
                elif layer.mode == "gru":
                    n_h, r, z, n = values[d, token]
                    dn = dh * (1 - z) * (1 - n**2)
                    now = [dn * r, dn * n_h * r * (1 - r), dh * (before - n) * z * (1 - z), dn]
                    dh = dh * z
                else:
                    h = output[token, d]
                    now = [dh * (h > 0) if layer.mode == "rnn_relu" else dh * (1 - h**2)]
                    dh = zero
                found[token, d] = torch.stack(now)
                dh = dh + rounded(slopes[token, d, :gates]).flatten() @ w
                dh, dc = (zero, zero) if reset[s] else (dh, dc)
            dh0[d, b] = dh
            dc0.append(dc)
    return found, dh0, torch.stack(dc0).view(dh0.shape) if lstm else torch.zeros(0)


def check(layer: Layer, grads=None) -> tuple[torch.Tensor, ...]:
    kept, grads = saved(layer), given(layer) if grads is None else grads
    found = run(layer, grads, kept)
    terms = GATES[layer.mode] * layer.h0.size(-1)
    for name, value, wanted in zip(("slopes", "dh0", "dc0"), found, replay(layer, grads, kept, found[0]), strict=True):
        try:
            assert_accurate(value, wanted, terms=terms if value.dtype == torch.float32 else 1, ulps=2.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", GATES)
def test_the_formulas_are_autograds(mode, case):
    layer = layer_case(mode, dtype=torch.float64, **CASES[case])
    grads, found = random_grads(layer), layer_oracle.forward(layer)
    exact = layer_oracle.backward(layer, grads)
    again = replay(layer, grads, (found["output"], found["c_all"], found["kept"]), exact["slopes"])
    for name, value in zip(("slopes", "dh0", "dc0"), again, strict=True):
        torch.testing.assert_close(value, exact[name].to(value.dtype), rtol=1e-9, atol=1e-9, msg=name)


@every_schedule
@pytest.mark.parametrize("case", ("lengths and resets", "packed and resets"))
@pytest.mark.parametrize("mode", GATES)
def test_slopes_in_every_schedule(mode, case, design):
    check(layer_case(mode, dtype=torch.float16, **CASES[case]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", GATES)
def test_slopes(mode, case, dtype, design):
    check(layer_case(mode, dtype=dtype, **CASES[case]))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("mode", GATES)
def test_whole_sequences_are_as_accurate_as_autograd(mode, dtype, design):
    layer = layer_case(mode, dtype=dtype, time=5, batch=2, hidden=20)
    grads = random_grads(layer)
    exact = layer_oracle.backward(layer.to(torch.float64), [None if g is None else g.double() for g in grads])
    own = layer_oracle.backward(layer, grads)
    for name, value in zip(("slopes", "dh0", "dc0"), run(layer, grads, saved(layer)), strict=True):
        assert_accurate(value, exact[name], own[name].to(dtype), factor=3.0, terms=20)


@pytest.mark.parametrize("which", range(4))
def test_each_gradient_alone(which, design):
    layer = layer_case("lstm", dtype=torch.float16, **CASES["lengths and resets"])
    check(layer, tuple(g if i == which else None for i, g in enumerate(given(layer))))


def test_no_gradient_at_all_is_zeros(design):
    layer = layer_case("gru", dtype=torch.bfloat16)
    assert all(not t.any() for t in check(layer, (None,) * 4))


def test_no_rows_and_no_steps(design):
    for sizes in ({"batch": 0}, {"time": 0}, {"lengths": [0, 0, 0]}):
        layer = layer_case("lstm", dtype=torch.float16, **sizes)
        grads = given(layer)
        slopes, dh0, dc0 = run(layer, grads, saved(layer))
        assert slopes.shape == (layer.gi.size(0), 1, 4, 6) and not slopes.any()
        assert torch.equal(dh0, grads[1]) and torch.equal(dc0, grads[2])


def row(layer: Layer, grads, kept, b: int) -> tuple:
    """The same of row b alone; padded."""
    time, batch = layer.steps, layer.h0.size(1)

    def pick(value, axis):
        if value is None or value.numel() == 0:
            return value
        return value.unflatten(axis, (time, batch)).select(axis + 1, b).contiguous()

    parts = {
        "gi": pick(layer.gi, 0),
        "resets": layer.resets[:, b : b + 1].contiguous(),
        "lengths": layer.lengths[b : b + 1],
    }
    parts |= {
        name: None if (t := getattr(layer, name)) is None else t[:, b : b + 1].contiguous() for name in ("h0", "c0")
    }
    states = [None if g is None else g[:, b : b + 1].contiguous() for g in grads[1:3]]
    alone = Layer(**vars(layer) | parts)
    return (
        alone,
        (pick(grads[0], 0), *states, pick(grads[3], 1)),
        (pick(kept[0], 0), pick(kept[1], 1), pick(kept[2], 1)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ("rnn_tanh", "gru", "lstm"))
def test_a_row_is_the_same_alone_in_any_batch_and_again(mode, dtype, design):
    layer = layer_case(mode, time=3, batch=19, hidden=21, lengths=[3, 1, 2] * 6 + [3], resets=True, dtype=dtype)
    grads, kept = given(layer), saved(layer)
    whole = run(layer, grads, kept)
    set_seed(5)
    again = run(layer, grads, kept)
    set_seed(0)
    with multiprocessors(4 if design == "cluster" else 7):  # 16 or 32 rows to a group
        crowded = run(layer, grads, kept)
    for first, second, third in zip(whole, again, crowded, strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)
    for b in (0, 7, 18):
        slopes, dh0, dc0 = run(*row(layer, grads, kept, b))
        assert torch.equal(slopes, whole[0].unflatten(0, (3, 19))[:, b])
        assert torch.equal(dh0[:, 0], whole[1][:, b])
        assert dc0.numel() == 0 or torch.equal(dc0[:, 0], whole[2][:, b])


def test_groups_that_do_not_fit_at_once_come_one_after_the_other():
    layer = layer_case("lstm", time=3, batch=70, hidden=40, directions=2, dtype=torch.float16, resets=True)
    with capability(80), multiprocessors(3):
        check(layer)


def test_opcheck():
    layer = layer_case("lstm", dtype=torch.float16)
    arguments = layer.bwd_arguments(random_grads(layer), *saved(layer))
    torch.library.opcheck(torch.ops.fused_ops.rnn_layer_bwd_cuda.default, arguments)


def test_what_it_cannot_serve_is_said():
    layer = layer_case("gru", dtype=torch.float16)
    grads, kept = given(layer), saved(layer)

    def refused(said, layer=layer, grads=grads, kept=kept):
        with pytest.raises(RuntimeError, match=said):
            run(layer, grads, kept)

    refused("mode must be", Layer(**vars(layer) | {"mode": "lru"}))
    refused("w_hh has the wrong shape", Layer(**vars(layer) | {"w_hh": layer.w_hh[:, 1:]}))
    refused("only an LSTM has gradients of c", grads=(*grads[:2], grads[1], None))
    refused("c0 is the LSTM's", Layer(**vars(layer) | {"c0": layer.h0}))
    refused("grad_output must be contiguous", grads=(grads[0].t().contiguous().t(), *grads[1:]))
    refused("from a tensor of Float", grads=(grads[0].float(), *grads[1:]))
    with capability(80), multiprocessors(1):
        large = layer_case("gru", hidden=400, time=1, batch=1, dtype=torch.float16)
        refused("does not fit", large, given(large), saved(large))


# What is replaced in layer_bwd.cuh or layer_bwd_state.cuh, and what is said of it. Of the kernels, the half-precision
# GRU's alone are built.
MUTANTS = {
    "nobody waits for the others' slopes": ("exchange.wait(turn);", "", "race: reads shared memory"),
    "sums are read before all warps have left theirs": (
        "      __syncthreads();\n    }\n    if constexpr", "    }\n    if constexpr", "race: .* shared memory"
    ),
    "slopes of one gate meet another's weights": ("(part + 2) % 3", "(part + 1) % 3", "slopes: error"),
    "what a reset cuts comes through": ("reset = !last && resets(state, step + 1)", "reset = false", "slopes: error"),
    "units past the last have weights": ("unit >= hidden ||", "", "out of bounds: reads 2 bytes"),
}  # fmt: skip
LESS = (
    (
        "rnn/layer_bwd.cu",
        "with_variant(extras.variant(), run)",
        "run(std::integral_constant<Variant, Variant::plain>{})",
    ),
    ("common/dtype.h", "case ScalarType::Float: return visit(float{});", ""),
    ("common/dtype.h", "case ScalarType::BFloat16: return visit(__nv_bfloat16{});", ""),
    ("rnn/layer_launch.h", "if (kind == Kind::lstm) visit(std::integral_constant<Kind, Kind::lstm>{});", ""),
    ("rnn/layer_launch.h", "else if (kind == Kind::gru)", ""),
    ("rnn/layer_launch.h", "else visit(std::integral_constant<Kind, Kind::rnn>{});", ""),
)
CASE = (
    "import torch; from tests.rnn.test_layers_backward_emulated import *; "
    "check(layer_case('gru', dtype=torch.float16, **CASES['lengths and resets']))"
)


def mutant_library(name, folder):
    old, new, _ = MUTANTS[name]
    file = "layer_bwd_state.cuh" if "% 3" in old else "layer_bwd.cuh"
    return build_mutant(folder, "rnn/layer_bwd.cu", (f"rnn/{file}", old, new), *LESS)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_caught(name, tmp_path):
    done = run_on(mutant_library(name, tmp_path / "build"), CASE, tmp_path / "package")
    assert done.returncode == 1 and re.search(MUTANTS[name][-1], done.stderr), done.stderr
