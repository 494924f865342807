"""The layers' CUDA forward on the CPU: against the formulas in float64, its accesses checked."""

import re
from contextlib import contextmanager

import pytest
import torch

import fused_ops.rnn.layers  # noqa: F401  (defines the op)
from fused_ops.core import extension
from tests.emulation import capability, every_schedule, multiprocessors, needs_emulator, run_on, set_seed
from tests.emulation.build import build_mutant
from tests.rnn import layer_oracle
from tests.rnn.layer_oracle import GATES, Layer, layer_case
from tests.support import assert_accurate

pytestmark = needs_emulator
needs_host = pytest.mark.skipif(extension.host is None, reason="_host was not built")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What the planner takes: W_hh this small fits into a cluster; a chip without clusters takes the grid.
DESIGNS = {"cluster": (90, 16), "grid": (80, 20)}
ENDED = {"time": 4, "batch": 9, "hidden": 19, "directions": 2, "lengths": [4, 0, 3, 1, 2, 4, 4, 4, 3]}
PACKED = {"time": 5, "batch": 5, "hidden": 12, "directions": 2, "lengths": [5, 4, 2, 2, 1], "packed": True}
CASES = {
    "one of all": {"time": 1, "batch": 1, "hidden": 1},
    "no biases": {"hidden": 33, "bias": False},
    "17 rows": {"time": 2, "batch": 17, "hidden": 40},
    "33 rows": {"time": 2, "batch": 33, "hidden": 9, "directions": 2},
    "lengths and resets": {**ENDED, "resets": True},
    "packed and resets": {**PACKED, "resets": True},
}


@contextmanager
def chip(design: str, sms: int | None = None):
    version, count = DESIGNS[design]
    with capability(version), multiprocessors(sms or count):
        yield


@pytest.fixture(params=DESIGNS)
def design(request):
    with chip(request.param):
        yield request.param


def run(layer: Layer, keep: bool = True) -> dict[str, torch.Tensor]:
    found = torch.ops.fused_ops.rnn_layer_fwd_cuda(*layer.fwd_arguments(keep))
    return dict(zip(("output", "h_n", "c_n", "c_all", "kept"), found, strict=True))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To what the tensor cores multiply, in float64: float32 to tf32, to the nearest, ties away from zero."""
    if x.dtype != torch.float32:
        return x.double()
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def states(layer: Layer, d: int, of_tokens: torch.Tensor, first: torch.Tensor):
    """(before each of `places()`, after each row's last): one direction's states among what a run left, zeroed where a
    step resets them."""
    t, b = layer.tokens()
    lengths = torch.full((layer.h0.size(1),), layer.steps) if layer.lengths is None else layer.lengths
    step = t if d == 0 else lengths[b] - 1 - t
    after = torch.stack([first, *[torch.zeros_like(first)] * layer.steps])
    after[step + 1, b] = of_tokens[layer.places()].to(first.dtype)
    before = after[step, b]
    if layer.resets is not None:
        before = before.masked_fill(layer.resets[t, b, None], 0.0)
    return before, after[lengths, torch.arange(first.size(0))]


def check(layer: Layer) -> dict[str, torch.Tensor]:
    """Each step against what the formulas make of the states that the run itself left before it: nothing but one
    step's rounding separates the two."""
    found, places, lstm = run(layer), layer.places(), layer.mode == "lstm"
    hidden, directions = layer.h0.size(2), layer.h0.size(0)
    output = found["output"].view(-1, directions, hidden)
    ulps = 4.0 if layer.w_hh.dtype == torch.float32 else 1.0
    for d in range(directions):
        before, last = states(layer, d, output[:, d], layer.h0[d])
        assert torch.equal(found["h_n"][d], last)
        c_before = None
        if lstm:
            c_before, c_last = states(layer, d, found["c_all"][d], layer.c0[d].float())
            assert torch.equal(found["c_n"][d], c_last.to(layer.c0.dtype))
        gh = rounded(before) @ rounded(layer.w_hh[d]).t()
        if layer.b_hn is not None:
            gh[:, 2 * hidden :] += layer.b_hn[d].double()
        gi = layer.gi[places, d].double().flatten(1)
        h, c, kept = layer_oracle._step(
            layer.mode, gi, gh, before.double(), None if c_before is None else c_before.double()
        )
        assert_accurate(output[places, d], h, terms=hidden, ulps=ulps)
        if lstm:
            assert_accurate(found["c_all"][d, places], c, terms=hidden, ulps=8.0)
        if kept is not None:
            assert_accurate(found["kept"][d, places], kept, terms=hidden, ulps=ulps)
    past = torch.ones(output.size(0), dtype=torch.bool).index_fill(0, places, False)
    assert not output[past].any(), "zeros past a length"
    return found


def plan(layer: Layer, design: str, sms: int) -> dict:
    size, (directions, batch, hidden) = layer.w_hh.element_size(), layer.h0.shape
    version = DESIGNS[design][0]
    return extension.host.plan_rnn_layer(layer.mode, False, hidden, batch, directions, size, sms, 227 * 1024, version)


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name].nan_to_num(7.0), other[name].nan_to_num(7.0)) for name in one)


@needs_host
def test_these_designs_share_the_units_among_several_blocks(design):
    for sizes in (CASES["lengths and resets"], CASES["packed and resets"], {"hidden": 37, "directions": 2}):
        found = plan(layer_case("lstm", dtype=torch.float16, **sizes), design, DESIGNS[design][1])
        assert found["design"] == design and found["slices"] > 1 and found["groups"] > 1


@every_schedule
@pytest.mark.parametrize("case", ("lengths and resets", "packed and resets"))
@pytest.mark.parametrize("mode", ("gru", "lstm"))
def test_steps_in_every_schedule(mode, case, design):
    check(layer_case(mode, dtype=torch.float16, **CASES[case]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", GATES)
def test_steps_of_every_kind(mode, dtype, design):
    check(layer_case(mode, time=4, batch=3, hidden=37, directions=2, dtype=dtype, lengths=[4, 0, 2], resets=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode, dtype", [("lstm", torch.bfloat16), ("gru", torch.float32)], ids=str)
def test_steps_of_every_shape(mode, dtype, case, design):
    check(layer_case(mode, dtype=dtype, **CASES[case]))


# (design, multiprocessors, layer, what the planner makes of it)
PARTITIONS = {
    "cluster of 8, 32 rows": ("cluster", 8, {"mode": "lstm", "batch": 30, "hidden": 64}, {"rows": 32, "slices": 8}),
    "cluster of 5, 16 rows": ("cluster", 5, {"mode": "gru", "batch": 10, "hidden": 36}, {"rows": 16, "slices": 5}),
    "cluster of 14": ("cluster", 132, {"mode": "rnn_relu", "batch": 2, "hidden": 550}, {"slices": 14, "splits": 4}),
    "whole sums of a warp": ("cluster", 132, {"mode": "lstm", "batch": 1, "hidden": 30}, {"splits": 1}),
    "grid, 32 rows": ("grid", 3, {"mode": "lstm", "batch": 80, "hidden": 16}, {"rows": 32, "groups": 3}),
    "grid, 16 rows, launch after launch": (
        "grid", 2, {"mode": "gru", "batch": 40, "hidden": 23, "directions": 2}, {"rows": 16, "launches": 3}
    ),
    "grid, sums of 8 warps": ("grid", 8, {"mode": "lstm", "batch": 2, "hidden": 270}, {"splits": 8}),
    "grid, sums of 4 warps": ("grid", 5, {"mode": "gru", "batch": 3, "hidden": 130}, {"splits": 4, "slices": 5}),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTITIONS)
@needs_host
def test_every_partition(name):
    design, sms, sizes, wanted = PARTITIONS[name]
    layer = layer_case(time=2, dtype=torch.float16, **sizes)
    found = plan(layer, design, sms)
    assert {"design": design, **wanted}.items() <= found.items(), found
    with chip(design, sms):
        check(layer)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("mode", GATES)
def test_whole_sequences_are_as_accurate_as_torch(mode, dtype, design):
    layer = layer_case(mode, time=9, batch=2, hidden=20, directions=2, dtype=dtype)
    exact, own, found = layer_oracle.forward(layer.to(torch.float64)), layer_oracle.forward(layer), run(layer)
    for name, value in found.items():
        assert_accurate(value, exact[name], own[name].to(value.dtype), terms=20)


def row(layer: Layer, b: int) -> Layer:
    """Row b alone; of a padded layer."""
    batch = layer.h0.size(1)
    parts = vars(layer) | {
        "gi": layer.gi.view(layer.steps, batch, *layer.gi.shape[1:])[:, b],
        "h0": layer.h0[:, b : b + 1].contiguous(),
        "c0": None if layer.c0 is None else layer.c0[:, b : b + 1].contiguous(),
        "lengths": None if layer.lengths is None else layer.lengths[b : b + 1],
        "resets": None if layer.resets is None else layer.resets[:, b : b + 1].contiguous(),
    }
    return Layer(**{**parts, "gi": parts["gi"].contiguous()})


@pytest.mark.parametrize("mode, dtype", [("gru", torch.bfloat16), ("lstm", torch.float32)], ids=str)
def test_a_row_is_the_same_alone_and_in_any_batch_and_partition(mode, dtype, design):
    layer = layer_case(mode, 3, 18, 70, 2, dtype, lengths=[3, 2, 1] * 6, resets=True)
    whole, alone_of = run(layer), {b: run(row(layer, b)) for b in (0, 7, 17)}
    for sms in (6, 13):
        with chip(design, sms):
            assert same(run(layer), whole)
    for b, alone in alone_of.items():
        length = int(layer.lengths[b])
        tokens = torch.arange(length) * 18 + b
        assert torch.equal(alone["output"], whole["output"].view(3, 18, -1)[:, b])
        assert torch.equal(alone["h_n"][:, 0], whole["h_n"][:, b])
        assert torch.equal(alone["kept"][:, :length], whole["kept"][:, tokens])
        if mode == "lstm":
            assert torch.equal(alone["c_n"][:, 0], whole["c_n"][:, b])
            assert torch.equal(alone["c_all"][:, :length], whole["c_all"][:, tokens])


def test_runs_repeat_bitwise(design):
    layer = layer_case("lstm", dtype=torch.float16, **ENDED)
    try:
        runs = [set_seed(seed) or run(layer) for seed in (0, 5, 6)]
    finally:
        set_seed(0)
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


@pytest.mark.parametrize("mode", GATES)
def test_nothing_is_kept_for_a_call_without_derivatives(mode, design):
    layer = layer_case(mode, hidden=8, dtype=torch.bfloat16)
    kept, bare = run(layer), run(layer, keep=False)
    assert bare["c_all"].numel() == bare["kept"].numel() == 0
    assert all(torch.equal(bare[name], kept[name]) for name in ("output", "h_n", "c_n"))


def test_no_rows_and_no_steps(design):
    for sizes in ({"batch": 0}, {"time": 0}, {"lengths": [0, 0, 0]}):
        layer = layer_case("lstm", dtype=torch.float16, **sizes)
        found = run(layer)
        assert found["output"].shape == (layer.gi.size(0), 6) and not found["output"].any()
        assert torch.equal(found["h_n"], layer.h0) and torch.equal(found["c_n"], layer.c0)


@pytest.mark.parametrize("resets", (True, False))
def test_resets_everywhere_or_nowhere(resets, design):
    layer = layer_case("gru", dtype=torch.float16, directions=2, hidden=10)
    layer.resets = torch.full((layer.steps, 3), resets)
    found = check(layer)
    layer.resets = None
    assert same(found, run(layer)) is not resets


def test_the_op_as_torch_sees_it():
    for mode in ("lstm", "rnn_tanh"):
        layer = layer_case(mode, 2, 2, 5, 2, torch.float16)
        torch.library.opcheck(torch.ops.fused_ops.rnn_layer_fwd_cuda.default, layer.fwd_arguments())


def test_what_it_cannot_serve_is_said():
    layer = layer_case("gru", dtype=torch.float16)
    for change, said in (
        ({"mode": "elman"}, "mode must be .*, got elman"),
        ({"steps": 4}, "there must be steps·batch tokens, got 15"),
        ({"h0": layer.h0[:, :2]}, "there must be steps·batch tokens"),
        ({"w_hh": layer.w_hh[:, :17]}, "w_hh has the wrong shape"),
        ({"gi": layer.gi.half()}, "a kernel reads Float from a tensor of Half"),
        ({"c0": layer.h0}, "c0 is the LSTM's"),
        ({"lengths": torch.tensor([1, 2])}, "lengths has the wrong shape"),
    ):
        with pytest.raises(RuntimeError, match=said):
            run(Layer(**(vars(layer) | change)))
    wide = layer_case("gru", 1, 1, 700, 1, torch.float16)
    with (
        chip("grid", 1),
        pytest.raises(RuntimeError, match=r"W_hh of hidden size 700 does not fit into the .* 1 multip"),
    ):
        run(wide)


# What is replaced in a file of csrc/rnn, and what is said of it.
MUTANTS = {
    "cluster: both turns in one place": (
        "exchange.cuh", "return tiles_ + (step & 1) * rows_ * stride_;", "return tiles_;",
        r"race: (writes|reads) shared memory",
    ),
    "grid: one block is not waited for": (
        "exchange.cuh", "awaited_ += blocks_;", "awaited_ += blocks_ - 1;", r"race: (reads|writes) a tensor"
    ),
    "grid: arrived before all have published": (
        "exchange.cuh", "__syncthreads();\n    if (threadIdx.x == 0) atomic", "if (threadIdx.x == 0) atomic",
        r"race: (reads|writes) a tensor",
    ),
    "sums are read before they are there": (
        "layer_fwd.cuh", "exchange.stride());\n    __syncthreads();", "exchange.stride());",
        r"race: reads shared memory|which nobody has written",
    ),
    "a reset forgets to reach the others": (
        "layer_fwd.cuh", "state.reset ? 0.0f : state.h", "state.h", "AssertionError: error"
    ),
    "a row that has ended goes on": (
        "layer_fwd.cuh", "if (!cell.there || step >= cell.length) continue;\n      float product",
        "if (!cell.there) continue;\n      float product", "AssertionError"
    ),
}  # fmt: skip
# The mutants' library holds one of the kernels: it compiles in a fraction of the time.
ONE_KIND = tuple(
    (f"rnn/{file}", old, f"[](auto visit) {{ visit({only}); }}({then}")
    for file, old, only, then in (
        ("layer_fwd.cu", 'dispatch_float(dtype, "rnn_layer_fwd", [&]', "__half{}", "[&]"),
        ("layer_fwd.cu", "with_variant(extras.variant(), ", "std::integral_constant<Variant, Variant::plain>{}", ""),
        ("layer_fwd_launch.h", "with_kind(kind, ", "std::integral_constant<Kind, Kind::gru>{}", ""),
    )
)
CASE = "from tests.rnn.test_layers_emulated import check_both_designs; check_both_designs()"


def check_both_designs():
    layer = layer_case("gru", dtype=torch.float16, **CASES["lengths and resets"])
    for name in DESIGNS:
        with chip(name):
            check(layer)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_caught(name, tmp_path):
    file, old, new, said = MUTANTS[name]
    library = build_mutant(tmp_path / "build", "rnn/layer_fwd.cu", *ONE_KIND, (f"rnn/{file}", old, new))
    done = run_on(library, CASE, tmp_path / "package")
    assert done.returncode == 1 and re.search(said, done.stderr), done.stderr


def test_the_same_case_passes_with_the_right_kernel():
    check_both_designs()
