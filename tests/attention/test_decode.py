"""decode_attention against a full recompute; its planner; the CUDA kernel's registration."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fused_ops import BackendUnavailable, decode_attention, explain, scaled_dot_product_attention
from fused_ops.attention import reference
from fused_ops.attention.reference import Score
from fused_ops.core import extension
from tests.attention.oracle import attend
from tests.support import assert_accurate, leaves, randn, value_and_gradients

FEATURES = {
    "plain": {},
    "window": dict(window=(2, -1)),
    "softcap": dict(softcap=1.5, scale=0.4),
    "sinks": dict(sinks=True, window=(3, 0)),
}


def make(lengths, queries=3, heads=4, kv_heads=2, capacity=11, dim=8, value_dim=6, dtype=torch.float64, grad=False):
    """Caches hold NaN past each length."""
    batch = len(lengths)
    tensors = [randn(batch, heads, queries, dim, dtype=dtype)]
    for i, last in enumerate((dim, value_dim)):
        cache = randn(batch, kv_heads, capacity, last, dtype=dtype, seed=i + 1)
        for b, length in enumerate(lengths):
            cache[b, :, length:] = math.nan
        tensors.append(cache)
    return [t.requires_grad_(grad) for t in tensors], torch.tensor(lengths, dtype=torch.int32)


def filled(options):
    return {**options, **({"sinks": torch.tensor([0.3, -2.0, 1.0, 0.0]).double()} if "sinks" in options else {})}


LENGTHS = ([5, 11, 3], [7, 7, 7], [0, 4, 11], [1, 2, 0], [0], [])


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("queries", (1, 3))
def test_equals_plain_loops_and_reads_nothing_past_a_length(lengths, queries, feature):
    (q, k, v), seqlens = make(lengths, queries)
    options = filled(FEATURES[feature])
    out = decode_attention(q, k, v, seqlens, **options)
    assert out.shape == (len(lengths), 4, queries, 6)
    for b, length in enumerate(lengths):
        exact, _ = attend(
            q[b], k[b, :, :length], v[b, :, :length], causal=True, bottom_right=True, sinks=options.get("sinks"),
            window=options.get("window", (-1, -1)), softcap=options.get("softcap"), scale=options.get("scale", 8**-0.5),
        )  # fmt: skip
        assert_accurate(out[b], exact, terms=8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_step_by_step_equals_one_causal_pass(dtype):
    q, k, v = (randn(2, heads, 6, 8, dtype=dtype, seed=i) for i, heads in enumerate((4, 2, 2)))
    whole = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
    caches = [torch.full((2, 2, 9, 8), math.nan, dtype=dtype) for _ in range(2)]
    steps, at = [], 0
    for count in (1, 2, 1, 2):
        for cache, new in zip(caches, (k, v)):
            cache[:, :, at : at + count] = new[:, :, at : at + count]
        seqlens = torch.full((2,), at + count)
        steps.append(decode_attention(q[:, :, at : at + count], *caches, seqlens))
        at += count
    assert_accurate(torch.cat(steps, 2), exact, whole, terms=8)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_path_that_reads_no_length_agrees(lengths, feature):
    """What runs on a GPU without the kernel."""
    tensors, seqlens = make(lengths, grad=True)
    options = filled(FEATURES[feature])
    score = Score(options.get("scale", 8**-0.5), True, True, *options.get("window", (-1, -1)), options.get("softcap"))
    got = value_and_gradients(
        lambda q, k, v: reference._decode_masked(q, k, v, seqlens, options.get("sinks"), score), leaves(*tensors)
    )
    wanted = value_and_gradients(lambda *t: decode_attention(*t, seqlens, **options), leaves(*tensors))
    torch.testing.assert_close(got, wanted)


def test_nothing_past_a_length_reaches_a_gradient():
    tensors, seqlens = make([5, 0, 11], grad=True)
    out = decode_attention(*tensors, seqlens)
    gradients = torch.autograd.grad((out * randn(*out.shape, dtype=torch.float64)).sum(), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    for gradient in gradients[1:]:
        assert (gradient[0, :, 5:] == 0).all() and (gradient[1] == 0).all() and (gradient[2] != 0).any()


@pytest.mark.parametrize("read", (True, False))
def test_first_and_second_derivatives(read):
    tensors, seqlens = make([2, 0, 3], 2, 2, 1, 4, 2, 1, grad=True)
    tensors = [t.detach().nan_to_num(0.5).requires_grad_() for t in tensors]

    def run(q, k, v):
        if read:
            return decode_attention(q, k, v, seqlens)
        return reference._decode_masked(q, k, v, seqlens, None, Score(2**-0.5, True, True))

    assert gradcheck(run, tensors)
    assert gradgradcheck(run, tensors, fast_mode=True)


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=f"{message} {sorted(changes)}")


@pytest.mark.parametrize(
    "changes, error, message",
    (
        bad("query must be .batch, heads, length, dim.", query=randn(3, 4, 8, dtype=torch.float64)),
        bad("k_cache must be a Tensor", TypeError, k_cache=3),
        bad("k_cache must be of query's batch size 3", k_cache=randn(2, 2, 11, 8, dtype=torch.float64),
            v_cache=randn(2, 2, 11, 8, dtype=torch.float64)),
        bad("v_cache must be .3, 2, 11. ", v_cache=randn(3, 2, 10, 8, dtype=torch.float64)),
        bad("k_cache must be of query's dtype", k_cache=randn(3, 2, 11, 8)),
        bad("k_cache must be of a head count", k_cache=randn(3, 3, 11, 8, dtype=torch.float64),
            v_cache=randn(3, 3, 11, 8, dtype=torch.float64)),
        bad("cache_seqlens must be int32 or int64", cache_seqlens=torch.tensor([1.0, 2, 3])),
        bad("cache_seqlens must be a vector of 3 numbers", cache_seqlens=torch.tensor([1, 2])),
        bad("cache_seqlens must be between 0 and the capacity 11", cache_seqlens=torch.tensor([1, 12, 3])),
        bad("cache_seqlens must be between 0 and", cache_seqlens=torch.tensor([1, -1, 3])),
        bad("softcap must be positive", softcap=0.0),
        bad("sinks must be 4", sinks=randn(2)),
    ),
)  # fmt: skip
def test_bad_arguments_are_named(changes, error, message):
    (q, k, v), seqlens = make([5, 11, 3])
    with pytest.raises(error, match=message):
        decode_attention(**{"query": q, "k_cache": k, "v_cache": v, "cache_seqlens": seqlens, **changes})


def test_the_cuda_kernel_is_refused_on_the_cpu_with_the_reason():
    (q, k, v), seqlens = make([5, 11, 3])
    with pytest.raises(BackendUnavailable, match="cuda, which needs a tensor on a GPU"):
        decode_attention(q, k, v, seqlens, backend="cuda")
    assert explain(decode_attention, q, k, v, seqlens).chosen == "reference"


def needs_build():
    return pytest.mark.skipif(extension.host is None or not extension.host.nvcc_version, reason="built without nvcc")


@needs_build()
def test_the_cuda_kernel_is_registered():
    assert extension.has_kernel("decode_attention_cuda", "CUDA")


@pytest.mark.skipif(extension.host is None, reason="_host was not built")
@pytest.mark.parametrize("multiprocessors", (1, 66, 84, 132))
def test_the_planner_covers_the_cache_and_uses_the_chip(multiprocessors):
    plan = extension.host.plan_decode
    for batch, kv_heads in ((1, 1), (1, 8), (3, 8), (16, 8), (64, 32), (0, 8)):
        for capacity in (0, 1, 63, 64, 65, 1000, 8192, 131072):
            splits, keys = plan(batch, kv_heads, capacity, multiprocessors)
            assert 1 <= splits <= 256 and keys % 64 == 0
            assert splits * keys >= capacity > (splits - 1) * keys or splits == 1
            slots, rows = 2 * multiprocessors, max(batch * kv_heads, 1)
            busy = -(-rows * splits // slots) * max(keys, 64)  # keys that pass through the busiest slot
            alone = -(-rows // slots) * max(-(-capacity // 64), 1) * 64
            assert busy <= 1.5 * alone
    assert plan(1, 8, 131072, 132)[0] >= 32  # one long sequence: nearly every block slot of 132 chips
    assert plan(512, 8, 4096, 132)[0] == 1  # plenty of rows: no merging
