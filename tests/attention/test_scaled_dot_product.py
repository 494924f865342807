"""scaled_dot_product_attention: against torch's, against plain loops, and its derivatives."""

import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from fused_ops import scaled_dot_product_attention
from tests.attention.oracle import attend
from tests.support import assert_accurate, leaves, noncontiguous, randn, value_and_gradients

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MASKS = (None, "bool", "added", "per head")


def make(batch=2, heads=4, kv_heads=4, rows=5, columns=7, dim=8, value_dim=None, dtype=torch.float32, grad=False):
    shapes = (batch, heads, rows, dim), (batch, kv_heads, columns, dim), (batch, kv_heads, columns, value_dim or dim)
    return [randn(*shape, dtype=dtype, seed=i, requires_grad=grad) for i, shape in enumerate(shapes)]


def make_mask(kind, heads=4, rows=5, columns=7, dtype=torch.float32):
    """Row 2 sees no key."""
    if kind in (None, "causal"):
        return None
    seen = randn(rows, columns, seed=9) > -0.5
    seen[2] = False
    if kind == "bool":
        return seen
    bias = randn(heads, rows, columns, seed=10) if kind == "per head" else randn(rows, columns, seed=10)
    return bias.masked_fill(~seen, -math.inf).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", (*MASKS, "causal"), ids=str)
@pytest.mark.parametrize("kv_heads", (4, 2, 1))
def test_equals_torch(dtype, kind, kv_heads):
    causal = kind == "causal"
    mask = make_mask(kind, dtype=dtype)
    inputs = [*make(kv_heads=kv_heads, value_dim=6, dtype=dtype, grad=True), mask]
    if kind == "per head":
        mask.requires_grad_()

    def ours(q, k, v, bias):
        return scaled_dot_product_attention(q, k, v, bias, 0.0, causal, enable_gqa=kv_heads < 4)

    def theirs(q, k, v, bias):
        return F.scaled_dot_product_attention(q, k, v, bias, 0.0, causal, enable_gqa=kv_heads < 4)

    got, gradients = value_and_gradients(ours, leaves(*inputs))
    wanted, wanted_gradients = value_and_gradients(theirs, leaves(*inputs))
    exact, exact_gradients = value_and_gradients(theirs, leaves(*inputs, dtype=torch.float64))
    assert got[0].stride() == wanted[0].stride() and got[0].dtype == dtype
    assert_accurate(got[0], exact[0], wanted[0], terms=8)
    for gradient, torch_gradient, exact_gradient in zip(gradients, wanted_gradients, exact_gradients, strict=True):
        assert_accurate(gradient, exact_gradient, torch_gradient, factor=3.0, terms=8)


@pytest.mark.parametrize("shape", ((5, 8), (3, 5, 8), (2, 2, 3, 5, 8)), ids=str)
def test_any_number_of_leading_dimensions(shape):
    q, k, v = (randn(*shape, seed=i) for i in range(3))
    assert torch.equal(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    plain = scaled_dot_product_attention(q, k, v, window=(1, -1), is_causal=True)
    rows = torch.arange(5)
    seen = (rows <= rows[:, None]) & (rows >= rows[:, None] - 1)
    torch.testing.assert_close(plain, F.scaled_dot_product_attention(q, k, v, seen))


@pytest.mark.parametrize(
    "query, key",
    (
        ((2, 1, 5, 8), (2, 4, 7, 8)),
        ((2, 4, 5, 8), (1, 4, 7, 8)),
        ((1, 4, 5, 8), (2, 1, 7, 8)),
        ((5, 8), (2, 4, 7, 8)),
        ((2, 4, 5, 8), (7, 8)),
    ),
    ids=str,
)
def test_leading_dimensions_broadcast_like_torchs(query, key):
    q, k = randn(*query), randn(*key, seed=1)
    wanted = F.scaled_dot_product_attention(q, k, k)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, k), wanted)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, k, return_lse=True)[0], wanted)


@pytest.mark.parametrize("requires", [r for r in product((False, True), repeat=4) if any(r)], ids=str)
def test_every_subset_of_gradients(requires):
    inputs = [*make(), make_mask("per head")]
    for tensor, wanted in zip(inputs, requires):
        tensor.requires_grad_(wanted)
    got = value_and_gradients(scaled_dot_product_attention, leaves(*inputs))
    wanted = value_and_gradients(F.scaled_dot_product_attention, leaves(*inputs))
    torch.testing.assert_close(got, wanted)


FEATURES = {
    "plain": {},
    "causal": dict(is_causal=True),
    "bottom right": dict(is_causal=True, causal_alignment="bottom_right"),
    "bottom right alone": dict(causal_alignment="bottom_right"),
    "window": dict(window=(2, 1)),
    "left window, causal": dict(window=(1, -1), is_causal=True),
    "window of none": dict(window=(0, 0)),
    "right window, bottom right": dict(window=(-1, 1), causal_alignment="bottom_right"),
    "window, bottom right, causal": dict(window=(2, 0), is_causal=True, causal_alignment="bottom_right"),
    "softcap": dict(softcap=0.7),
    "softcap, causal": dict(softcap=2.0, is_causal=True),
    "alibi": dict(alibi_slopes=True),
    "alibi, causal, bottom right": dict(alibi_slopes=True, is_causal=True, causal_alignment="bottom_right"),
    "alibi, softcap, window": dict(alibi_slopes=True, softcap=1.5, window=(3, 2)),
    "sinks": dict(sinks=True),
    "sinks, causal, bottom right": dict(sinks=True, is_causal=True, causal_alignment="bottom_right"),
    "everything": dict(
        sinks=True, alibi_slopes=True, softcap=1.5, window=(3, 2), is_causal=True, causal_alignment="bottom_right"
    ),
    "scale": dict(scale=0.3),
    "negative scale, causal": dict(scale=-0.3, is_causal=True),
    "scale 0, causal": dict(scale=0.0, is_causal=True),
}


def filled(options, heads=4, dtype=torch.float64):
    options = dict(options)
    if options.get("alibi_slopes"):
        options["alibi_slopes"] = torch.tensor([0.5, 0.25, 0.125, 1.0][:heads], dtype=dtype)
    if options.get("sinks"):
        options["sinks"] = torch.tensor([0.3, -math.inf, -1.0, 2.0][:heads], dtype=dtype)
    return options


def by_loops(q, k, v, mask, options):
    renamed = dict(
        causal=options.get("is_causal", False),
        bottom_right=options.get("causal_alignment") == "bottom_right",
        window=options.get("window", (-1, -1)),
        softcap=options.get("softcap"),
        slopes=options.get("alibi_slopes"),
        sinks=options.get("sinks"),
        scale=options.get("scale", q.size(-1) ** -0.5),
    )
    outs, lses = zip(*(attend(*one, mask=mask, **renamed) for one in zip(q, k, v)))
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("kind", MASKS, ids=str)
@pytest.mark.parametrize("rows, columns", ((5, 7), (7, 5), (1, 6)), ids=str)
def test_equals_plain_loops(name, kind, rows, columns):
    options = filled(FEATURES[name])
    q, k, v = make(kv_heads=2, rows=rows, columns=columns, dtype=torch.float64)
    mask = None if kind is None or rows < 3 or options.get("is_causal") else make_mask(kind, 4, rows, columns).double()
    mask = mask if mask is None or kind != "bool" else mask.bool()
    exact, exact_lse = by_loops(q, k, v, mask, options)
    out = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options)
    assert_accurate(out, exact, terms=8)
    out, lse = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, return_lse=True, **options)
    assert_accurate(out, exact, terms=8)
    assert_accurate(lse, exact_lse, terms=8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_lower_precision(name, dtype):
    q, k, v = make(1, rows=9, columns=130, dtype=dtype)
    options = filled(FEATURES[name], dtype=torch.float32)
    exact = scaled_dot_product_attention(*(t.double() for t in (q, k, v)), **filled(FEATURES[name]))
    out, lse = scaled_dot_product_attention(q, k, v, return_lse=True, **options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch_own = F.scaled_dot_product_attention(q, k, v)
    torch_exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    scale = (torch_own.double() - torch_exact).abs().max().item()  # what F loses on inputs of this size
    for value in (out, scaled_dot_product_attention(q, k, v, **options)):
        floor = 4 * torch.finfo(dtype).eps * exact.abs().max().item()
        assert (value.double() - exact).abs().max().item() <= max(2 * scale, floor)


def test_a_row_that_sees_no_key_gives_zero_and_zero_gradients():
    for options in (
        dict(attn_mask=make_mask("bool")),
        dict(attn_mask=make_mask("added")),
        dict(is_causal=True, causal_alignment="bottom_right"),
        dict(window=(0, 0), causal_alignment="bottom_right"),
    ):
        for lse in (False, True):
            q, k, v = make(rows=5, columns=7 if "attn_mask" in options else 2, grad=True)
            out = scaled_dot_product_attention(q, k, v, return_lse=lse, **options)
            out, row_lse = out if lse else (out, None)
            blind = 2 if "attn_mask" in options else 0
            assert (out[:, :, blind] == 0).all() and out.isfinite().all()
            if lse:
                assert (row_lse[:, :, blind] == -math.inf).all()
            gradients = torch.autograd.grad((out * randn(*out.shape, seed=3)).sum(), (q, k, v))
            assert all(gradient.isfinite().all() for gradient in gradients)
            assert (gradients[0][:, :, blind] == 0).all()


@pytest.mark.parametrize("batch, rows, columns", ((0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (1, 1, 1)), ids=str)
@pytest.mark.parametrize("options", ({}, {"is_causal": True}, {"sinks": True}, {"return_lse": True}), ids=str)
def test_sizes_zero_and_one(batch, rows, columns, options):
    q, k, v = make(batch, rows=rows, columns=columns, grad=True)
    got = scaled_dot_product_attention(q, k, v, **filled(options, dtype=torch.float32))
    out = got[0] if "return_lse" in options else got
    assert out.shape == (batch, 4, rows, 8)
    if columns == 0:
        assert (out == 0).all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_strided_and_expanded_inputs():
    q, k, v = make(rows=6, columns=6)
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True, softcap=2.0)
    odd = noncontiguous(q), k.transpose(1, 2).contiguous().transpose(1, 2), noncontiguous(v)
    torch.testing.assert_close(scaled_dot_product_attention(*odd, is_causal=True, softcap=2.0), wanted)
    one = k[:, :1].expand(2, 4, 6, 8)
    torch.testing.assert_close(
        scaled_dot_product_attention(q, one, one), scaled_dot_product_attention(q, one.clone(), one.clone())
    )


@pytest.mark.parametrize("name", FEATURES)
def test_first_and_second_derivatives(name):
    options = filled(FEATURES[name], heads=2)
    kv_heads = 1 if "causal" in name else 2
    q, k, v = make(1, 2, kv_heads, 3, 2, 2, dtype=torch.float64, grad=True)
    extra = [t.requires_grad_() for t in (options.get("alibi_slopes"), options.get("sinks")) if t is not None]
    if "sinks" in options:
        extra[-1] = options["sinks"] = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)

    def run(q, k, v, *per_head):
        given = dict(zip([n for n in ("alibi_slopes", "sinks") if n in options], per_head))
        return scaled_dot_product_attention(q, k, v, enable_gqa=kv_heads < 2, **{**options, **given})

    assert gradcheck(run, (q, k, v, *extra))
    assert gradgradcheck(run, (q, k, v, *extra), fast_mode=True)


@pytest.mark.parametrize("kind", ("bool", "per head"))
def test_derivatives_of_the_mask_and_the_log_sum_exp(kind):
    inputs = make(1, 1, 1, 3, 3, 2, dtype=torch.float64, grad=True)
    mask = make_mask(kind, 1, 3, 3)
    seen = [0, 1]  # row 2 sees no key: its log-sum-exp is -inf
    if kind != "bool":
        mask = randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
        inputs.append(mask)

    def run(q, k, v, bias=mask):
        out, lse = scaled_dot_product_attention(q, k, v, bias, return_lse=True)
        return out, lse[..., seen], scaled_dot_product_attention(q, k, v, bias)

    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs, fast_mode=True)


def test_dropout_is_torchs():
    q, k, v = make(rows=40, columns=40)
    torch.manual_seed(3)
    got = scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(3)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, dropout_p=0.4))
    ones = torch.ones(1, 4, 40, 8)
    kept = torch.stack(
        [scaled_dot_product_attention(q[:1], k[:1], ones, dropout_p=0.5, softcap=5.0) for _ in range(30)]
    )
    assert abs(kept.mean().item() - 1.0) < 0.02 and kept.std() > 0.05


def test_torchs_own_samples():
    from torch.testing._internal.common_methods_invocations import op_db

    info = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    samples = list(info.sample_inputs("cpu", torch.float32, requires_grad=True))
    assert len(samples) > 20
    for sample in samples:
        arguments = (sample.input, *sample.args)
        results = []
        for fn in (scaled_dot_product_attention, F.scaled_dot_product_attention):
            torch.manual_seed(1)
            results.append(value_and_gradients(partial(fn, **sample.kwargs), leaves(*arguments)))
        torch.testing.assert_close(*results, equal_nan=True)


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message)


@pytest.mark.parametrize(
    "changes, error, message",
    (
        bad("query must be a Tensor", TypeError, query=[1.0]),
        bad("key must be .*, 8. like query", key=randn(2, 4, 7, 6)),
        bad("key must be of query's dtype", key=randn(2, 4, 7, 8, dtype=torch.float64)),
        bad("value must be .*7, Dv. like key", value=randn(2, 4, 6, 8)),
        bad("attn_mask must be broadcastable", attn_mask=randn(3, 7)),
        bad("attn_mask must be None when is_causal", attn_mask=randn(5, 7), is_causal=True),
        bad("attn_mask must be bool or floating point", attn_mask=torch.ones(5, 7, dtype=torch.int8)),
        bad("dropout_p must be between", dropout_p=1.5),
        bad("causal_alignment must be", causal_alignment="middle"),
        bad("window must be", window=(1,)),
        bad("window must be", window=(-2, 0)),
        bad("softcap must be positive", softcap=0.0),
        bad("alibi_slopes must be", alibi_slopes=randn(3)),
        bad("sinks must be", sinks=randn(4, 1)),
        bad("key must be broadcastable to query's", key=randn(2, 2, 7, 8), value=randn(2, 2, 7, 8)),
        bad("key must be of a head count", key=randn(2, 3, 7, 8), value=randn(2, 3, 7, 8), enable_gqa=True),
    ),
)
def test_bad_arguments_are_named(changes, error, message):
    q, k, v = make()
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**{"query": q, "key": k, "value": v, **changes})
