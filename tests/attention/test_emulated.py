"""The CUDA decode kernel on the CPU: against the float64 oracle, in several schedules, its accesses checked."""

import math
import re

import pytest
import torch

from fused_ops import decode_attention
from fused_ops.attention import reference
from fused_ops.attention.reference import Score
from tests.emulation import every_schedule, multiprocessors, needs_emulator, run_on, set_seed
from tests.emulation.build import build_mutant
from tests.support import assert_accurate, leaves, randn, value_and_gradients

pytestmark = needs_emulator

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHIPS = (132, 1)  # multiprocessors: keys are split over blocks in pieces of 64, or not at all
OP = torch.ops.fused_ops.decode_attention_cuda


def check(lengths, dim=64, kv_heads=1, group=1, queries=1, dtype=torch.float32, capacity=None, scale=None,
          lengths_dtype=torch.int32, strided_lengths=False):  # fmt: skip
    """Caches hold NaN past each length; keys lie (batch, capacity, heads, dim) in memory, values the usual way."""
    capacity = max(*lengths, 1) + 3 if capacity is None else capacity
    q = randn(len(lengths), queries, kv_heads * group, dim, dtype=dtype).transpose(1, 2)
    k = randn(len(lengths), capacity, kv_heads, dim, dtype=dtype, seed=1).transpose(1, 2)
    v = randn(len(lengths), kv_heads, capacity, dim, dtype=dtype, seed=2)
    for b, length in enumerate(lengths):
        k[b, :, length:] = math.nan
        v[b, :, length:] = math.nan
    seqlens = torch.tensor(lengths, dtype=lengths_dtype)
    if strided_lengths:
        seqlens = torch.stack([seqlens, seqlens + 1000], 1)[:, 0]
    score = Score(dim**-0.5 if scale is None else scale, True, True)
    exact = reference.decode(q.double(), k.double(), v.double(), seqlens, None, *score)[0]
    own = reference.decode(q, k, v, seqlens, None, *score)[0]
    out = decode_attention(q, k, v, seqlens, scale=scale, backend="cuda")
    assert_accurate(out, exact, own, terms=dim)
    return out


@every_schedule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (64, 128, 256))
def test_every_type_and_head_dim(dtype, dim):
    check([70, 1, 130], dim, dtype=dtype, kv_heads=2, group=2)


@every_schedule
@pytest.mark.parametrize(
    "group, queries", ((1, 1), (2, 1), (3, 1), (8, 1), (9, 1), (1, 3), (2, 4), (7, 3), (64, 1), (13, 4)), ids=str
)
def test_every_number_of_rows(group, queries):
    check([66, 5], group=group, queries=queries)


@every_schedule
@pytest.mark.parametrize("lengths", ([0], [1], [63, 64, 65], [0, 200, 0], [2, 3, 4], [300, 1]), ids=str)
@pytest.mark.parametrize("chip", CHIPS)
def test_every_length(lengths, chip):
    with multiprocessors(chip):
        check(lengths, queries=3, group=2)


def test_an_empty_cache_and_an_empty_batch():
    assert (check([0, 0], capacity=0) == 0).all()
    q, cache = randn(0, 2, 1, 64), randn(0, 1, 5, 64)
    assert decode_attention(q, cache, cache, torch.zeros(0, dtype=torch.int64), backend="cuda").shape == (0, 2, 1, 64)


def test_lengths_of_either_type_at_any_stride_and_beyond_the_capacity():
    check([5, 70], lengths_dtype=torch.int64, strided_lengths=True)
    check([5, 70], strided_lengths=True)
    q, k, v = (randn(1, 1, n, 64, seed=i) for i, n in enumerate((1, 9, 9)))
    whole, beyond, negative = (OP(q, k, v, torch.tensor([n]), 0.1) for n in (9, 50, -3))
    assert torch.equal(whole, beyond) and (negative == 0).all()


def test_any_scale_and_large_scores():
    for scale in (0.0, -0.3, 3.0):
        check([70, 20], scale=scale, group=4)


def test_rows_that_start_anywhere_are_copied():
    q = randn(2, 3, 8, 128, dtype=torch.float16).transpose(1, 2)
    k, v = (randn(2, 70, 2, 128, dtype=torch.float16, seed=i).transpose(1, 2) for i in (1, 2))
    seqlens = torch.tensor([70, 33])
    wanted = decode_attention(q.contiguous(), k.contiguous(), v.contiguous(), seqlens, backend="cuda")
    assert torch.equal(decode_attention(q, k, v, seqlens, backend="cuda"), wanted)
    odd = [torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for t in (k, v)]
    assert torch.equal(decode_attention(q, *odd, seqlens, backend="cuda"), wanted)


def test_every_schedule_gives_the_same_bits():
    found = []
    for seed in range(4):
        set_seed(seed)
        found.append(check([150, 90], group=4))
    set_seed(0)
    assert all(torch.equal(found[0], other) for other in found)


def test_nan_in_sight_is_seen():
    q, k, v = (randn(1, 1, n, 64, seed=i) for i, n in enumerate((1, 9, 9)))
    k[0, 0, 4] = math.nan
    assert OP(q, k, v, torch.tensor([9]), 0.1).isnan().all()
    assert OP(q, k, v, torch.tensor([4]), 0.1).isfinite().all()


def test_gradients():
    tensors = [randn(2, n, m, 64, seed=i, requires_grad=True) for i, (n, m) in enumerate(((4, 2), (2, 100), (2, 100)))]
    seqlens = torch.tensor([100, 37])
    got = value_and_gradients(lambda *t: decode_attention(*t, seqlens, backend="cuda"), leaves(*tensors))
    exact = value_and_gradients(lambda *t: decode_attention(*t, seqlens), leaves(*tensors, dtype=torch.float64))
    for value, exact_value in zip((*got[0], *got[1]), (*exact[0], *exact[1]), strict=True):
        assert_accurate(value, exact_value, factor=3.0, terms=100)


def test_opcheck_and_a_compiled_graph():
    q, k, v = (randn(2, n, m, 64, seed=i) for i, (n, m) in enumerate(((4, 2), (2, 70), (2, 70))))
    seqlens = torch.tensor([70, 3])
    torch.library.opcheck(OP.default, (q, k, v, seqlens, 0.125))

    def run(*tensors):
        return decode_attention(*tensors, backend="cuda") * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, seqlens), run(q, k, v, seqlens))


# What is replaced in decode.cuh, and what is said of it.
MUTANTS = {
    "keys past the end are read": ("if (key < end) {", "if (true) {", "AssertionError: error inf"),
    "lane groups are not merged": ("state.template merge_warp<Layout::kLanes>();", "", "AssertionError: error"),
    "unwritten splits are read": ("if (statistics[s].y == 0.0f) continue;", "", "AssertionError: error inf"),
    "accumulators overtake the queries": (
        "__syncthreads();  // the queries are no longer needed", "//",
        r"decode_split_kernel<float, 64, 8>: block .* race: writes shared memory.* read \(.*decode.cuh:\d+\)",
    ),
    "one group of lanes shuffles alone": (
        "state.template merge", "if (group == 0) state.template merge", r"__shfl_xor_sync at .*decode.cuh:\d+"
    ),
}  # fmt: skip
# float32 and head dim 64 alone: compiled in less than half the time.
FEWER = (
    ("attention/decode.cu", "using T = decltype(zero);", "using T = float;"),
    ("attention/decode.cu", "if (dim == 128) return launch_rows<T, 128>(p, units, scope.stream());", ""),
    ("attention/decode.cu", "return launch_rows<T, 256>(p, units, scope.stream());", ""),
)
CASE = "from tests.attention.test_emulated import check; check([200, 3, 70], group=2, queries=3)"


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_caught(name, tmp_path):
    old, new, said = MUTANTS[name]
    wrong = ("attention/decode.cuh", old, new)
    library = build_mutant(tmp_path / "build", "attention/decode.cu", wrong, *FEWER)
    done = run_on(library, CASE, tmp_path / "package")
    assert done.returncode == 1 and re.search(said, done.stderr), done.stderr


def test_the_same_case_passes_with_the_right_kernel():
    exec(CASE, {})
