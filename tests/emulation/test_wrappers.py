"""The twins of csrc/common/{sync,async_copy,mma}.cuh: small kernels' results, in several orders of threads."""

import re

import pytest
import torch

from tests.emulation.kernels import HERE, every_schedule, needs_kernels, run
from tests.gate import ROOT
from tests.support import randn

pytestmark = needs_kernels

WORDS = {torch.float32: "words_float", torch.int32: "words_int", torch.int64: "words_long"}


def integers(*shape, dtype=torch.float32, seed=0):
    """Small enough for sums to be exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run_into(name, entry, out, *arguments):
    """A call that gives a copy of `out` to `entry(..., out=, ...)`, which stands in `arguments` as None."""

    def call(seed, checked):
        mine = out.clone()
        run(name, entry, *(mine if a is None else a.clone() if torch.is_tensor(a) else a for a in arguments),
            seed=seed, checked=checked)  # fmt: skip
        return mine

    return every_schedule(call)


def test_a_barrier_orders_shared_memory():
    x = randn(200)
    assert torch.equal(run_into("basics", "reverse", torch.empty(200), x, None, 1), x.flip(0))


def test_neighbouring_bytes_are_no_race():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(run_into("basics", "bytes", torch.empty(256, dtype=torch.uint8), x, None), x ^ 1)


@pytest.mark.parametrize("rows", (1, 2, 3, 8, 21))
def test_counted_barriers_pass_buffers_between_warps(rows):
    x = integers(rows, 32)
    assert torch.equal(run_into("sync", "produce", torch.empty(32), x, None), 2 * x.sum(0))


@pytest.mark.parametrize("turns", (0, 1, 2, 5))
def test_counted_barriers_are_of_their_own_threads(turns):
    x = randn(128)
    halves = x.view(2, 64)
    wanted = torch.stack([half.flip(0) if turns + i & 1 else half for i, half in enumerate(halves)]).flatten()
    assert torch.equal(run_into("sync", "halves", torch.empty(128), x, None, turns), wanted)


@pytest.mark.parametrize("blocks", (1, 2, 13))
def test_blocks_wait_for_a_released_flag(blocks):
    x = integers(blocks, 32)
    flags = torch.zeros(blocks, dtype=torch.int32)
    assert torch.equal(run_into("sync", "chain", torch.empty(blocks, 32), x, None, flags), x.cumsum(0))


@pytest.mark.parametrize("fenced", (0, 1))
@pytest.mark.parametrize("blocks", (1, 5, 40))
def test_the_last_block_sums_what_all_have_written(blocks, fenced):
    x, counter = integers(blocks, 16), torch.zeros(1, dtype=torch.int32)
    out = run_into("sync", "last", torch.empty(1), x, torch.empty(blocks), None, counter, fenced)
    assert out == x.sum()


@pytest.mark.parametrize("n, threads", ((1, 32), (33, 32), (100, 64), (400, 96)))
@pytest.mark.parametrize("steps", (1, 2, 5))
def test_the_grid_waits_for_all_its_blocks(n, threads, steps):
    x, counter = integers(n), torch.zeros(1, dtype=torch.int32)
    wanted = x
    for _ in range(steps):
        wanted = wanted + wanted.roll(-1)

    def call(seed, checked):
        first, second, count = x.clone(), torch.empty(n), counter.clone()
        run("sync", "steps", first, second, count, steps, threads, seed=seed, checked=checked)
        return first if steps % 2 == 0 else second

    assert torch.equal(every_schedule(call), wanted)


@pytest.mark.parametrize("dtype", WORDS, ids=str)
@pytest.mark.parametrize("name, scopes", (("sync", 3), ("hopper", 1)))
def test_words_at_every_scope(name, scopes, dtype):
    words = torch.arange(5 * scopes).to(dtype) + 1
    wanted = words.clone().view(scopes, 5)
    value = wanted[:, 0] + wanted[:, 1]
    old = wanted[:, 2] + wanted[:, 3]
    wanted = torch.stack([value, value + 1, wanted[:, 2] + value, wanted[:, 3] + value, old], 1)
    assert torch.equal(run_into(name, WORDS[dtype], words, None).view(scopes, 5), wanted)


@pytest.mark.parametrize("size", (4, 8, 16))
@pytest.mark.parametrize("stages", (2, 4))
@pytest.mark.parametrize("tiles, threads", ((0, 32), (1, 32), (3, 33), (9, 64)))
def test_copies_pass_through_the_stages_of_a_pipeline(size, stages, tiles, threads):
    x = randn(tiles, threads * size // 4)
    out = run_into("async_copy", "staged", torch.empty_like(x), x, None, size, threads, stages)
    assert torch.equal(out, x.flip(1))


@pytest.mark.parametrize("size", (4, 8, 16))
@pytest.mark.parametrize("n", (1, 3, 4, 17, 31, 64))
def test_copies_are_filled_up_with_zeros(size, n):
    x = torch.randint(1, 256, (n,), dtype=torch.uint8)
    out = run_into("async_copy", "padded", torch.empty(32 * size, dtype=torch.uint8), x, None, size)
    assert torch.equal(out, torch.nn.functional.pad(x, (0, 32 * size - n)))


def rows_of(count):
    """Which row of 32 lane i's address is, and the matrices that the first 8 `count` of them make."""
    return (5 * torch.arange(8 * count) + 3) % 32


@pytest.mark.parametrize("count", (1, 2, 4))
@pytest.mark.parametrize("suffix", ("", "_trans"))
def test_ldmatrix_deals_rows_out_to_lanes(count, suffix):
    x = torch.arange(256, dtype=torch.int16).view(32, 8)
    out = run_into("mma", f"load_x{count}{suffix}", torch.empty(32 * count, dtype=torch.int32), x, None)
    matrices = x[rows_of(count)].view(count, 8, 8)
    matrices = matrices.mT if suffix else matrices
    wanted = matrices.reshape(count, 32, 2).transpose(0, 1)  # lane, matrix, two elements
    assert torch.equal(out.view(torch.int16).view(32, count, 2), wanted)


@pytest.mark.parametrize("count", (1, 2, 4))
@pytest.mark.parametrize("suffix", ("", "_trans"))
def test_stmatrix_collects_them_again(count, suffix):
    x = torch.arange(1, 64 * count + 1, dtype=torch.int16).view(32, count, 2)
    before = torch.arange(-256, 0, dtype=torch.int16).view(32, 8)
    out = run_into("hopper", f"store_x{count}{suffix}", before, x.view(torch.int32), None)
    matrices = x.transpose(0, 1).reshape(count, 8, 8)
    wanted = before.clone()
    wanted[rows_of(count)] = (matrices.mT if suffix else matrices).reshape(8 * count, 8)
    assert torch.equal(out, wanted)


MMA = {
    torch.float16: ("multiply_half", 16),
    torch.bfloat16: ("multiply_bfloat16", 16),
    torch.float32: ("multiply_tf32", 8),
}


def tf32(x):
    """Rounded to 10 bits of fraction, ties away from zero."""
    return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", MMA, ids=str)
def test_mma_multiplies_integers_exactly(dtype):
    entry, k = MMA[dtype]
    a, b, c = integers(16, k, dtype=dtype), integers(k, 8, dtype=dtype, seed=1), integers(16, 8, seed=2)
    assert torch.equal(run_into("mma", entry, c, a, b, None), a.float() @ b.float() + c)


@pytest.mark.parametrize("dtype", MMA, ids=str)
def test_mma_rounds_the_exact_sum_once(dtype):
    entry, k = MMA[dtype]
    a, b, c = randn(16, k), randn(k, 8, seed=1), randn(16, 8, seed=2)
    a, b = (tf32(x) if dtype == torch.float32 else x.to(dtype) for x in (a, b))
    exact = a.double() @ b.double() + c.double()
    assert torch.equal(run_into("mma", entry, c, a, b, None), exact.float())


def run_into_once(entry, out, a, b):
    mine = out.clone()
    run("mma", entry, a, b, mine)
    return mine


def test_mma_takes_special_values():
    values = [0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, float("inf"), -float("inf"), float("nan")]
    a, b = torch.zeros(16, 16, dtype=torch.float16), torch.zeros(16, 8, dtype=torch.float16)
    a[: len(values), 3], b[3] = torch.tensor(values, dtype=torch.float16), 1
    out = run_into_once("multiply_half", torch.zeros(16, 8), a, b)
    torch.testing.assert_close(out[: len(values), 0], a[: len(values), 3].float(), rtol=0, atol=0, equal_nan=True)


def test_mma_leaves_out_the_lower_bits_of_tf32():
    a, b = randn(16, 8), randn(8, 8, seed=1)
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b)]
    zeros = torch.zeros(16, 8)
    assert torch.equal(run_into_once("multiply_tf32", zeros, a, b), run_into_once("multiply_tf32", zeros, *cut))


def test_tf32_is_rounded_to_nearest_ties_away():
    x = torch.cat([randn(1000), torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, 0.0, 3e-39])])
    out = run_into("mma", "round_tf32", torch.empty(len(x), dtype=torch.int32), x, None)
    assert torch.equal(out.view(torch.float32), tf32(x))
    special = torch.tensor([float("inf"), -float("inf"), float("nan")])
    out = run_into("mma", "round_tf32", torch.empty(3, dtype=torch.int32), special, None).view(torch.float32)
    assert torch.equal(out[:2], special[:2]) and out[2].isnan()


@pytest.mark.parametrize("header", ("sync", "async_copy", "mma"))
def test_every_wrapper_names_its_section_and_is_assembled(header):
    """A kernel here uses each, so that the gate has ptxas assemble it; the twin names its section too."""
    real, twin = ((ROOT / folder / f"{header}.cuh").read_text() for folder in ("csrc/common", "csrc/emulation/common"))
    real = real.rpartition("// namespace detail")[2]
    names = set(re.findall(r"^__device__ inline \w+ (\w+)\(", real, re.M))
    names |= set(re.findall(r"^FUSED_OPS_\w+\((\w+), \"", real, re.M))
    sources = [path.read_text() for path in sorted(HERE.glob("kernels/*.cu"))]
    for name in names:
        used = rf"\b{name}\b|\b(?:LOAD|STORE)\({name.partition('_')[2]}," if "matrix" in name else rf"\b{name}\b"
        assert any(re.search(used, source) for source in sources), f"no kernel uses {name}"
    sections = set(re.findall(r'^// "([\w{}., /]+)"', real, re.M)) | set(
        re.findall(r'^// "\w+" and "(\w+)"', real, re.M)
    )
    assert names and sections and all(f'"{section}"' in twin for section in sections), sections
