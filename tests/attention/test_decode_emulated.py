"""The split-KV decode kernel's own CUDA source, run thread by thread on the CPU, against the float64 oracle.

Needs g++ and the CUDA headers (no GPU): csrc/attention/decode.cuh is compiled with tests/attention/emulation.
"""

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fused_ops.attention import reference
from fused_ops.attention.reference import Score
from tests.gate import find_nvcc
from tests.support import assert_accurate, randn

ROOT = Path(__file__).parents[2]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None or find_nvcc() is None, reason="needs g++ and the CUDA headers")


def compiled(folder: Path, old: str = "", new: str = ""):
    """The emulated kernel, with one piece of its source replaced."""
    text = (ROOT / "csrc/attention/decode.cuh").read_text()
    assert old in text
    (folder / "attention").mkdir()
    (folder / "attention/decode.cuh").write_text(text.replace(old, new) if old else text)
    dryrun = subprocess.run([find_nvcc(), "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    toolkit = re.search(r"^#\$ TOP=(.+)$", dryrun, re.M)[1].strip()
    here = ROOT / "tests/attention/emulation"
    includes = [f"-I{path}" for path in (folder, here, ROOT / "csrc", f"{toolkit}/include")]
    library = folder / "decode.so"
    flags = ["-std=c++20", "-shared", "-fPIC", "-w", *(["-O0", "-DFLOAT32_ALONE"] if old else ["-O1"])]
    subprocess.run([COMPILER, *flags, *includes, str(here / "decode.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).decode


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("decode"))


def run(kernel, q, k, v, lengths, scale, splits):
    out = torch.full_like(q, math.nan, memory_format=torch.contiguous_format)
    numbers = [*q.shape, k.size(1), k.size(2), splits, int(lengths.dtype == torch.int64)]
    strides = [*q.stride(), *k.stride()[:3], *v.stride()[:3], lengths.stride(0)]
    arrays = [(ctypes.c_int64 * len(values))(*values) for values in (numbers, strides)]
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (q, k, v, lengths, out)]
    kernel(DTYPES[q.dtype], *arrays, *addresses, ctypes.c_double(scale))
    return out


def check(
    kernel, lengths, dim=64, kv_heads=1, group=1, queries=1, splits=1, dtype=torch.float32, capacity=None, **options
):
    """Caches hold NaN past each length; keys lie (batch, capacity, heads, dim) in memory, values the usual way."""
    capacity = max(*lengths, 1) + 3 if capacity is None else capacity
    q = randn(len(lengths), queries, kv_heads * group, dim, dtype=dtype).transpose(1, 2)
    k = randn(len(lengths), capacity, kv_heads, dim, dtype=dtype, seed=1).transpose(1, 2)
    v = randn(len(lengths), kv_heads, capacity, dim, dtype=dtype, seed=2)
    for b, length in enumerate(lengths):
        k[b, :, length:] = math.nan
        v[b, :, length:] = math.nan
    scale, score_dtype = options.get("scale", dim**-0.5), options.get("lengths_dtype", torch.int32)
    seqlens = torch.tensor(lengths, dtype=score_dtype)
    if options.get("strided_lengths"):
        seqlens = torch.stack([seqlens, seqlens + 1000], 1)[:, 0]
    score = Score(scale, True, True)
    exact = reference.decode(q.double(), k.double(), v.double(), seqlens, None, *score)[0]
    own = reference.decode(q, k, v, seqlens, None, *score)[0]
    out = run(kernel, q, k, v, seqlens, scale, splits)
    assert_accurate(out, exact, own, terms=dim)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (64, 128, 256))
@pytest.mark.parametrize("splits", (1, 3))
def test_every_type_and_head_dim(kernel, dtype, dim, splits):
    check(kernel, [70, 1, 130], dim, dtype=dtype, splits=splits, kv_heads=2, group=2)


@pytest.mark.parametrize(
    "group, queries", ((1, 1), (2, 1), (3, 1), (8, 1), (9, 1), (1, 3), (2, 4), (7, 3), (64, 1), (13, 4)), ids=str
)
def test_every_number_of_rows(kernel, group, queries):
    check(kernel, [66, 5], group=group, queries=queries, splits=2)


@pytest.mark.parametrize("lengths", ([0], [1], [63, 64, 65], [0, 200, 0], [2, 3, 4]), ids=str)
@pytest.mark.parametrize("splits", (1, 2, 5))
def test_every_length(kernel, lengths, splits):
    check(kernel, lengths, splits=splits, queries=3, group=2)


def test_an_empty_cache(kernel):
    assert (check(kernel, [0, 0], capacity=0) == 0).all()


def test_lengths_of_either_type_at_any_stride_and_beyond_the_capacity(kernel):
    check(kernel, [5, 70], lengths_dtype=torch.int64, strided_lengths=True, splits=2)
    check(kernel, [5, 70], strided_lengths=True)
    q, k, v = (randn(1, 1, n, 64, seed=i) for i, n in enumerate((1, 9, 9)))
    whole, beyond, negative = (run(kernel, q, k, v, torch.tensor([n]), 0.1, 1) for n in (9, 50, -3))
    assert torch.equal(whole, beyond) and (negative == 0).all()


def test_any_scale_and_large_scores(kernel):
    for scale in (0.0, -0.3, 3.0):
        check(kernel, [70, 20], scale=scale, splits=2, group=4)


def test_the_same_call_gives_the_same_bits(kernel):
    first, second = (check(kernel, [150, 90], group=4, splits=3) for _ in range(2))
    assert torch.equal(first, second)


def test_nan_in_sight_is_seen(kernel):
    q, k, v = (randn(1, 1, n, 64, seed=i) for i, n in enumerate((1, 9, 9)))
    k[0, 0, 4] = math.nan
    assert run(kernel, q, k, v, torch.tensor([9]), 0.1, 1).isnan().all()
    assert run(kernel, q, k, v, torch.tensor([4]), 0.1, 1).isfinite().all()


MUTANTS = {
    "keys past the end are read": ("if (key < end) {", "if (true) {"),
    "lane groups are not merged": ("state.template merge_warp<Layout::kLanes>();", ""),
    "unwritten splits are read": ("if (statistics[s].y == 0.0f) continue;", ""),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_caught(name, tmp_path):
    wrong = compiled(tmp_path, *MUTANTS[name])
    with pytest.raises(AssertionError, match="error"):
        check(wrong, [200, 3, 70], group=2, queries=3, splits=3)
