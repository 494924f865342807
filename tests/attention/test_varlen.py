"""varlen_attention: packed sequences against each sequence alone, and against plain loops."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fused_ops import scaled_dot_product_attention, varlen_attention
from fused_ops.attention import reference
from fused_ops.attention.reference import Score
from tests.attention.oracle import attend
from tests.support import assert_accurate, leaves, randn, value_and_gradients

LENGTHS = {
    "ragged": ([3, 1, 6], [5, 4, 6]),
    "some empty": ([0, 3, 0, 2, 0], [2, 0, 0, 5, 0]),
    "more queries than keys": ([5, 2], [2, 1]),
    "one": ([4], [4]),
    "nothing": ([0, 0], [0, 0]),
    "no queries": ([0, 0], [3, 1]),
    "no sequences": ([], []),
}
FEATURES = {
    "plain": {},
    "causal": dict(is_causal=True),
    "window": dict(window=(2, 0)),
    "causal window": dict(window=(1, -1), is_causal=True, softcap=1.5),
    "alibi": dict(alibi_slopes=True, is_causal=True),
    "sinks": dict(sinks=True, is_causal=True, scale=0.2),
}


def ends(lengths, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()], dtype=dtype)


def make(name, heads=4, kv_heads=2, dim=8, value_dim=6, dtype=torch.float64, grad=False):
    queries, keys = LENGTHS[name]
    shapes = (sum(queries), heads, dim), (sum(keys), kv_heads, dim), (sum(keys), kv_heads, value_dim)
    tensors = [randn(*shape, dtype=dtype, seed=i, requires_grad=grad) for i, shape in enumerate(shapes)]
    return tensors, (ends(queries), ends(keys), max(queries, default=0), max(keys, default=0))


def filled(options, dtype=torch.float64):
    options = dict(options)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=dtype)
    if "sinks" in options:
        options["sinks"] = torch.tensor([0.3, -2.0, -1.0, 2.0], dtype=dtype)
    return options


def one_by_one(q, k, v, lengths, options):
    queries, keys, *_ = (t.diff().tolist() if isinstance(t, torch.Tensor) else t for t in lengths)
    parts = []
    for a, b, c in zip(q.split(queries), k.split(keys), v.split(keys)):
        a, b, c = (t.transpose(0, 1) for t in (a, b, c))
        out, lse = scaled_dot_product_attention(
            a, b, c, enable_gqa=True, causal_alignment="bottom_right", return_lse=True, **options
        )
        parts.append((out.transpose(0, 1), lse))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", [name for name in LENGTHS if LENGTHS[name][0]])
def test_equals_each_sequence_alone(name, feature):
    tensors, lengths = make(name, grad=True)
    options = filled(FEATURES[feature])
    wanted, wanted_gradients = value_and_gradients(lambda *t: one_by_one(*t, lengths, options), leaves(*tensors))
    got, gradients = value_and_gradients(
        lambda *t: varlen_attention(*t, *lengths, return_lse=True, **options), leaves(*tensors)
    )
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradients, wanted_gradients)
    torch.testing.assert_close(varlen_attention(*tensors, *lengths, **options), wanted[0])


@pytest.mark.parametrize("feature", FEATURES)
def test_equals_plain_loops(feature):
    (q, k, v), lengths = make("ragged")
    options = filled(FEATURES[feature])
    out, lse = varlen_attention(q, k, v, *lengths, return_lse=True, **options)
    for i, (a, b) in enumerate(zip(lengths[0].tolist(), lengths[0].tolist()[1:])):
        c, d = lengths[1][i : i + 2].tolist()
        exact, exact_lse = attend(
            q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1),
            causal=options.get("is_causal", False), bottom_right=True, window=options.get("window", (-1, -1)),
            softcap=options.get("softcap"), slopes=options.get("alibi_slopes"), sinks=options.get("sinks"),
            scale=options.get("scale", 8**-0.5),
        )  # fmt: skip
        assert_accurate(out[a:b].transpose(0, 1), exact, terms=8)
        assert_accurate(lse[:, a:b], exact_lse, terms=8)


def test_no_sequences():
    tensors, lengths = make("no sequences", grad=True)
    out, lse = varlen_attention(*tensors, *lengths, return_lse=True)
    assert out.shape == (0, 4, 6) and lse.shape == (4, 0)
    out.sum().backward()


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", LENGTHS)
def test_the_path_that_reads_no_length_agrees(name, feature):
    """What runs on a GPU and in a trace with dropout."""
    tensors, lengths = make(name, grad=True)
    options = filled(FEATURES[feature])
    scale, window = options.get("scale", 8**-0.5), options.get("window", (-1, -1))
    score = Score(scale, options.get("is_causal", False), True, *window, options.get("softcap"))
    cu_q, cu_k, max_q, max_k = lengths

    def padded(q, k, v, lse):
        return reference._varlen_padded(
            q,
            k,
            v,
            options.get("alibi_slopes"),
            options.get("sinks"),
            cu_q,
            cu_k,
            max_q + 1,
            max_k + 2,
            lse,
            score,
            0.0,
        )

    wanted = value_and_gradients(
        lambda *t: varlen_attention(*t, *lengths, return_lse=True, **options), leaves(*tensors)
    )
    got = value_and_gradients(lambda *t: padded(*t, True), leaves(*tensors))
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(padded(*tensors, False)[0], wanted[0][0])


@pytest.mark.parametrize("read", (True, False))
def test_a_sequence_of_nan_does_not_reach_its_neighbours(read):
    (q, k, v), (cu_q, cu_k, max_q, max_k) = make("ragged")
    for t, cu in ((q, cu_q), (k, cu_k), (v, cu_k)):
        t[cu[1] : cu[2]] = math.nan
    inputs = [t.requires_grad_() for t in (q, k, v)]
    if read:
        out = varlen_attention(*inputs, cu_q, cu_k, max_q, max_k, is_causal=True)
    else:
        out = reference._varlen_padded(
            *inputs, None, None, cu_q, cu_k, max_q, max_k, False, Score(8**-0.5, True, True), 0.0
        )[0]
    kept = torch.ones(q.size(0), dtype=torch.bool)
    kept[cu_q[1] : cu_q[2]] = False
    assert out[kept].isfinite().all()
    gradients = torch.autograd.grad(out[kept].sum(), inputs)
    assert gradients[0][kept].isfinite().all()
    assert gradients[1][: cu_k[1]].isfinite().all() and gradients[2][cu_k[2] :].isfinite().all()


def test_first_and_second_derivatives():
    tensors, lengths = make("some empty", heads=2, kv_heads=1, dim=2, value_dim=1, grad=True)
    sinks = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)

    def run(q, k, v, sinks):
        with_lse = varlen_attention(q, k, v, *lengths, is_causal=True, sinks=sinks, return_lse=True)
        return varlen_attention(q, k, v, *lengths, is_causal=True), *with_lse

    assert gradcheck(run, (*tensors, sinks))
    assert gradgradcheck(run, (*tensors, sinks), fast_mode=True)


def test_dropout_keeps_the_mean_and_has_gradients():
    (q, k, _), lengths = make("ragged", dtype=torch.float32)
    v = torch.ones(15, 2, 6, requires_grad=True)
    out = torch.stack([varlen_attention(q, k, v, *lengths, dropout_p=0.5) for _ in range(200)])
    assert abs(out.mean().item() - 1.0) < 0.05 and out.std() > 0.1
    out.sum().backward()
    assert v.grad.isfinite().all() and (v.grad > 0).all()


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_both_integer_types(dtype):
    tensors, (cu_q, cu_k, *longest) = make("ragged")
    got = varlen_attention(*tensors, cu_q.to(dtype), cu_k.to(dtype), *longest)
    assert torch.equal(got, varlen_attention(*tensors, cu_q, cu_k, *longest))


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=f"{message} {sorted(changes)}")


@pytest.mark.parametrize(
    "changes, error, message",
    (
        bad("query must be a Tensor", TypeError, query=None),
        bad("query must be .total, heads, dim.", query=randn(10, 8)),
        bad("key must be of query's dtype", key=randn(15, 2, 8)),
        bad("key must be of head dim 8", key=randn(15, 2, 7, dtype=torch.float64)),
        bad("key must be of a head count that divides query's 4", query=randn(10, 4, 8, dtype=torch.float64),
            key=randn(15, 3, 8, dtype=torch.float64), value=randn(15, 3, 8, dtype=torch.float64)),
        bad("value must be", value=randn(15, 4, 6, dtype=torch.float64)),
        bad("cu_seqlens_q must be int32 or int64", cu_seqlens_q=torch.tensor([0.0, 3, 4, 10])),
        bad("cu_seqlens_q must be a Tensor", TypeError, cu_seqlens_q=[0, 3, 4, 10]),
        bad("cu_seqlens_k must be a vector of 4 numbers", cu_seqlens_k=torch.tensor([0, 15])),
        bad("cu_seqlens_q must be a vector of batch", cu_seqlens_q=torch.zeros(0, dtype=torch.int32)),
        bad("cu_seqlens_q must be non-decreasing from 0", cu_seqlens_q=torch.tensor([1, 3, 4, 10])),
        bad("cu_seqlens_q must be .* to the total length 10", cu_seqlens_q=torch.tensor([0, 3, 4, 9])),
        bad("cu_seqlens_k must be non-decreasing", cu_seqlens_k=torch.tensor([0, 9, 5, 15])),
        bad("max_seqlen_q must be at least the longest sequence of cu_seqlens_q, 6", max_seqlen_q=5),
        bad("max_seqlen_k must be the longest of 3", max_seqlen_k=1),
        bad("max_seqlen_q must be an int", TypeError, max_seqlen_q=torch.tensor(6)),
        bad("dropout_p must be", dropout_p=-0.1),
        bad("softcap must be positive", softcap=-1.0),
        bad("window must be", window=3),
        bad("sinks must be 4 floating-point numbers", sinks=randn(3)),
        bad("alibi_slopes must be a Tensor or None", TypeError, alibi_slopes=0.5),
    ),
)  # fmt: skip
def test_bad_arguments_are_named(changes, error, message):
    (q, k, v), (cu_q, cu_k, max_q, max_k) = make("ragged")
    given = dict(query=q, key=k, value=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k)
    with pytest.raises(error, match=message):
        varlen_attention(**{**given, **changes})
