"""The C++ decode kernel: every variant of it, its lengths, its indifference to its neighbours, its derivatives."""

import math

import pytest
import torch
from torch.nn.functional import pad

import fused_ops
from fused_ops import BackendUnavailable, decode_attention, explain
from fused_ops.attention import reference
from fused_ops.core import extension
from tests.support import (
    assert_accurate,
    error,
    leaves,
    noncontiguous,
    poisoned_memory,
    randn,
    threads,
    value_and_gradients,
)

pytestmark = pytest.mark.skipif(not extension.has_kernel("decode_attention_cpu", "CPU"), reason="_C.so was not built")
LANES = (16, 8, 4)  # AVX-512, AVX2, the compiler's default; a processor without one runs the next
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(lengths, queries=1, group=1, kv_heads=2, capacity=None, dim=16, value_dim=None, dtype=torch.float32):
    """query, caches that hold NaN past each length, lengths."""
    batch, capacity = len(lengths), capacity or max([1, *lengths])
    tensors = [randn(batch, kv_heads * group, queries, dim, dtype=dtype)]
    for i, last in enumerate((dim, value_dim or dim)):
        cache = randn(batch, kv_heads, capacity, last, dtype=dtype, seed=i + 1)
        for b, length in enumerate(lengths):
            cache[b, :, length:] = math.nan
        tensors.append(cache)
    return *tensors, torch.tensor(lengths, dtype=torch.int32)


def kernel(q, k, v, lengths, sinks=None, scale=0.3, left=-1, lanes=16):
    return torch.ops.fused_ops.decode_attention_cpu(q, k, v, lengths, sinks, scale, left, lanes)


def compare(q, k, v, lengths, got=None, *, sinks=None, scale=0.3, left=-1, lanes=16):
    """The correctness rule against the reference, in float64 and in the dtype itself."""
    exact, torch_value = (
        reference.decode(
            *tensors, lengths, None if sinks is None else sinks.to(tensors[0].dtype), scale, True, True, left
        )
        for tensors in ([t.double() for t in (q, k, v)], [q, k, v])
    )
    got = kernel(q, k, v, lengths, sinks, scale, left, lanes) if got is None else got
    assert got.dtype == q.dtype and got.is_contiguous()
    assert_accurate(got, exact[0], torch_value[0], terms=q.size(-1) + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lanes", LANES)
def test_every_head_dim(lanes, dtype):
    for dim, value_dim in ((1, 1), (3, 7), (16, 64), (17, 5), (40, 100), (64, 15), (80, 128), (128, 33)):
        compare(*make([37, 1, 150], 1, 4, dim=dim, value_dim=value_dim, dtype=dtype), lanes=lanes)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("queries", (1, 2, 3, 5, 8))
@pytest.mark.parametrize("group", (1, 2, 3, 4, 7))
def test_every_number_of_rows(group, queries, lanes):
    compare(*make([300, 6, 2, 129], queries, group, dim=20, value_dim=72), lanes=lanes)


@pytest.mark.parametrize("lanes", LANES)
def test_every_length_around_a_split(lanes):
    lengths = [0, 1, 2, 15, 16, 17, 63, 127, 128, 129, 143, 144, 145, 255, 256, 257, 400]
    for queries in (1, 3):
        with poisoned_memory():
            compare(*make(lengths, queries, 2, 1, capacity=400, dim=8, value_dim=4), lanes=lanes)


@pytest.mark.parametrize("left", (0, 1, 5, 127, 128, 200, 1000))
def test_window_and_sinks(left):
    q, k, v, lengths = make([400, 3, 0, 130], 3, 2)
    sinks = torch.tensor([0.5, -40.0, 90.0, -math.inf])
    for chosen in (None, sinks):
        compare(q, k, v, lengths, sinks=chosen, left=left)
        got = decode_attention(q, k, v, lengths, scale=0.3, window=(left, 2), sinks=chosen, backend="cpu")
        assert torch.equal(got, kernel(q, k, v, lengths, chosen, left=left))


def test_wide_scores_do_not_overflow():
    q, k, v, lengths = make([300, 140], 2, 2)
    compare(q * 100, k, v, lengths, scale=3.0)
    compare(q * 100, k, v, lengths, scale=-3.0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_half_number_is_read_as_it_is(dtype):
    """One key, weight 1: the value comes back bit for bit."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(1, 64, 1, 1024)
    q = randn(1, 64, 1, 16, dtype=dtype)
    for lanes in LANES:
        got = kernel(q, randn(1, 64, 1, 16, dtype=dtype), values, torch.tensor([1]), lanes=lanes)
        assert torch.equal(got.isnan(), values.isnan()) and torch.equal(got.nan_to_num(1.0), values.nan_to_num(1.0))


def test_layouts():
    q, k, v, lengths = make([37, 150, 9], 2, 2, dim=24)
    want = kernel(q, k, v, lengths)
    by_position = [
        t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)
    ]  # (batch, capacity, heads, dim) inside
    wider = [pad(t, (3, 5), value=math.nan)[..., 3:-5] for t in (k, v)]
    for keys, values in (by_position, wider):
        assert torch.equal(kernel(noncontiguous(q), keys, values, lengths.long()), want)
    spaced = torch.stack([lengths, lengths + 1000], 1)[:, 0]
    assert torch.equal(kernel(q.transpose(0, 1).contiguous().transpose(0, 1), k, v, spaced), want)
    shared = [t[1:2].expand(3, -1, -1, -1) for t in (k, v)]
    compare(q, *shared, lengths)
    one = make([5, 2], dim=1)
    assert torch.equal(kernel(one[0], *(noncontiguous(t) for t in one[1:3]), one[3]), kernel(*one))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_and_threads_change_no_bit(dtype):
    q, k, v, lengths = make([700, 3, 257, 128, 1000], 2, 3, dim=40, dtype=dtype)
    want = kernel(q, k, v, lengths)
    for count in (1, 2, 3, 5):
        with threads(count):
            assert torch.equal(kernel(q, k, v, lengths), want)
    for b in range(len(lengths)):
        alone = [t[b : b + 1] for t in (q, k, v)]
        assert torch.equal(kernel(*alone, lengths[b : b + 1])[0], want[b])
        longer = [pad(t[b : b + 1], (0, 0, 0, 9), value=math.nan) for t in (k, v)]
        assert torch.equal(kernel(q[b : b + 1], *longer, lengths[b : b + 1])[0], want[b])


def test_nan_in_sight_is_seen_and_out_of_sight_is_not():
    q, k, v, lengths = make([200, 150], 3, 2, kv_heads=1)
    clean = kernel(q, k, v, lengths)
    for cache in (0, 1):
        broken = [t.clone() for t in (k, v)]
        broken[cache][0, 0, 198] = math.nan  # the last but one key: the first of three queries doesn't see it
        got = kernel(q, *broken, lengths)
        assert got[0, :, 1:].isnan().all()
        assert torch.equal(got[0, :, 0], clean[0, :, 0]) and torch.equal(got[1], clean[1])
    everywhere = torch.full_like(k, math.nan)
    assert kernel(q, everywhere, v, lengths).isnan().all()
    assert kernel(torch.full_like(q, math.nan), k, v, lengths).isnan().all()


def test_infinite_keys():
    """A key at -inf has no weight; where all are, the row is empty as in the reference; at +inf it is NaN."""
    q, k, v, lengths = make([140], 1, 1, kv_heads=1)
    q = q.abs()
    k[0, 0, 5] = -math.inf
    compare(q, k, v, lengths)
    assert (kernel(q, torch.full_like(k, -math.inf), v, lengths) == 0).all()
    k[0, 0, 6] = math.inf
    assert kernel(q, k, v, lengths).isnan().all()


def test_sizes_of_zero():
    for lengths, options in (([], {}), ([0, 0], {}), ([0], dict(capacity=7)), ([3], dict(queries=0))):
        q, k, v, seqlens = make(lengths, **options)
        got = decode_attention(q, k, v, seqlens, backend="cpu")
        assert got.shape == q.shape and (got == 0).all()
    q, k, v, seqlens = make([4])
    assert kernel(q, k, v[..., :0], seqlens).shape == (1, 2, 1, 0)
    mean = v.mean(2, keepdim=True)
    assert_accurate(kernel(q[..., :0], k[..., :0], v, seqlens), mean.double(), terms=4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("needs", ([1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]), ids=str)
def test_gradients(needs, dtype):
    *tensors, lengths = make([140, 0, 5], 2, 2, dim=8, value_dim=6, dtype=dtype)
    tensors = [t.requires_grad_(bool(n)) for t, n in zip([*tensors, randn(4, dtype=dtype)], needs)]

    def run(backend):
        return lambda q, k, v, sinks: decode_attention(q, k, v, lengths, sinks=sinks, backend=backend)

    (value,), got = value_and_gradients(run("cpu"), leaves(*tensors))
    (exact,), right = value_and_gradients(run("reference"), leaves(*tensors, dtype=torch.float64))
    (plain,), torch_gradients = value_and_gradients(run("reference"), leaves(*tensors))
    assert_accurate(value, exact, plain, terms=8)
    for gradient, wanted, theirs in zip(got, right, torch_gradients, strict=True):
        assert_accurate(gradient, wanted, theirs, factor=3, terms=140)


def test_twice_differentiable():
    *tensors, lengths = make([5, 3], 2, 1, dim=4)
    tensors = [t.nan_to_num(0.0).requires_grad_() for t in tensors]

    def second(backend):
        out = decode_attention(*tensors, lengths, backend=backend)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    torch.testing.assert_close(second("cpu"), second("reference"))


@pytest.mark.parametrize("sinks", (None, 4))
def test_opcheck(sinks):
    call = make([37, 0, 150], 2, 2, dim=12, value_dim=5)
    sinks = None if sinks is None else randn(sinks)
    torch.library.opcheck(torch.ops.fused_ops.decode_attention_cpu.default, (*call, sinks, 0.3, 20))


def test_compiled():
    def run(q, k, v, lengths):
        return decode_attention(q, k, v, lengths, window=(90, -1), backend="cpu").sin()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([37, 150], [1, 2, 150], [9, 0, 3, 129]):
        q, k, v, seqlens = make(lengths, 2, 2, capacity=150)
        assert torch.equal(compiled(q, k, v, seqlens), run(q, k, v, seqlens))
        q, k, v = (t.nan_to_num(0.0).requires_grad_() for t in (q, k, v))
        mine, theirs = (torch.autograd.grad(fn(q, k, v, seqlens).sum(), (q, k, v)) for fn in (compiled, run))
        torch.testing.assert_close(mine, theirs)
    with pytest.raises(RuntimeError, match="cache_seqlens must be between 0 and the capacity 150, got 151"):
        compiled(q, k, v, torch.tensor([1, 2, 3, 151], dtype=torch.int32))


def test_bad_lengths_are_named():
    q, k, v, _ = make([5, 11, 3], capacity=11)
    for wrong in ([5, 12, 3], [5, -1, 3]):
        for dtype in (torch.int32, torch.int64):
            bad = torch.tensor(wrong, dtype=dtype)
            with pytest.raises(ValueError, match="cache_seqlens must be between 0 and the capacity 11"):
                decode_attention(q, k, v, bad, backend="cpu")
            with pytest.raises(RuntimeError, match="cache_seqlens must be between 0 and the capacity 11"):
                kernel(q, k, v, bad)


def test_bad_arguments_to_the_raw_op_raise():
    q, k, v, lengths = make([5, 3])
    for bad in (
        (q.double(), k, v, lengths), (q, k[:, :, :2], v, lengths), (q, noncontiguous(k), v, lengths),
        (q, k, v, lengths[:1]), (q, k, v, lengths.float()), (q[0], k, v, lengths), (q[:, :1], k, v, lengths),
        (q, k, v, lengths, randn(3)), (q, k, v, lengths, randn(2).double()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            kernel(*bad)


@pytest.mark.parametrize(
    "change, reason",
    (
        (lambda q, k, v: (q, noncontiguous(k), v), "contiguous in their last dimension"),
        (lambda q, k, v: (q, k, noncontiguous(v)), "contiguous in their last dimension"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "takes float32, float16 and bfloat16"),
    ),
)
def test_what_it_refuses_runs_on_the_reference(change, reason):
    q, k, v, lengths = make([5, 3])
    tensors = change(q, k, v)
    with pytest.raises(BackendUnavailable, match=reason):
        decode_attention(*tensors, lengths, backend="cpu")
    torch.testing.assert_close(decode_attention(*tensors, lengths).float(), decode_attention(q, k, v, lengths))
    with pytest.raises(BackendUnavailable, match="has no softcap"):
        decode_attention(q, k, v, lengths, softcap=3.0, backend="cpu")


def test_auto_takes_it_for_few_rows():
    q, k, v, lengths = make([500, 300], 1, 4, dim=64)
    assert explain(decode_attention, q, k, v, lengths).chosen == "cpu"
    learned = v.nan_to_num(0.0).requires_grad_()
    assert explain(decode_attention, q, k, learned, lengths).chosen == "reference"
    with torch.no_grad():
        assert explain(decode_attention, q, k, learned, lengths).chosen == "cpu"
    many = randn(2, 8, 256, 64)
    assert explain(decode_attention, many, k, v, lengths).chosen == "reference"
    with fused_ops.use_backend("cpu"):
        assert explain(decode_attention, many, k, v, lengths).chosen == "cpu"


def test_the_comparison_rejects_wrong_kernels():
    """Mutants: a lost key, one too many, a shifted diagonal, mixed-up heads, a split that is not rescaled."""
    q, k, v, lengths = make([200, 150], 2, 2, capacity=210, dim=32)
    k, v = (t.nan_to_num(0.5) for t in (k, v))
    right = kernel(q, k, v, lengths)
    compare(q, k, v, lengths, right)
    halves = [kernel(q, k, v, lengths, left=99), kernel(q, k, v, lengths - 100)]
    mutants = {
        "last key lost": kernel(q, k, v, lengths - 1),
        "one key too many": kernel(q, k, v, lengths + 1),
        "window off by one": kernel(q, k, v, lengths, left=148),
        "positions exchanged": kernel(q.flip(2), k, v, lengths).flip(2),
        "heads mixed up": kernel(q[:, [0, 2, 1, 3]], k, v, lengths)[:, [0, 2, 1, 3]],
        "splits averaged": (halves[0] + halves[1]) / 2,
    }
    for name, wrong in mutants.items():
        assert error(wrong, right) > 1e-3, name
        with pytest.raises(AssertionError):
            compare(q, k, v, lengths, wrong)
