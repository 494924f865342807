"""The Triton kernels, interpreted on the CPU, against the float64 oracle; and wrong kernels, which must be caught."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from fused_ops import explain, scaled_dot_product_attention
from fused_ops.core.device import TRITON_INTERPRETED
from tests.support import assert_accurate, leaves, noncontiguous, randn, value_and_gradients

pytestmark = [
    pytest.mark.skipif(not TRITON_INTERPRETED, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

# batch, heads, kv_heads, rows, columns, dim
SHAPES = [
    (1, 2, 2, 5, 7, 8),
    (2, 1, 1, 1, 1, 1),
    (1, 2, 1, 130, 150, 16),
    (1, 1, 1, 150, 130, 40),
    (1, 6, 2, 17, 65, 64),
    (1, 3, 1, 64, 128, 80),
    (1, 1, 1, 3, 129, 128),
    (1, 1, 1, 33, 31, 256),
    (1, 1, 1, 3, 0, 8),
    (0, 2, 2, 3, 4, 8),
    (1, 2, 2, 0, 4, 8),
]
CAUSAL = {
    "full": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
}


def make(batch, heads, kv_heads, rows, columns, dim, dtype=torch.float32, grad=False):
    shapes = (batch, heads, rows, dim), (batch, kv_heads, columns, dim), (batch, kv_heads, columns, dim)
    return [randn(*shape, dtype=dtype, seed=i, requires_grad=grad) for i, shape in enumerate(shapes)]


def on_triton(q, k, v, **options):
    return scaled_dot_product_attention(q, k, v, enable_gqa=True, return_lse=True, backend="triton", **options)


def check(q, k, v, run=on_triton, **options):
    exact, exact_lse = scaled_dot_product_attention(
        q.double(), k.double(), v.double(), enable_gqa=True, return_lse=True, backend="reference", **options
    )
    own = scaled_dot_product_attention(q, k, v, enable_gqa=True, backend="reference", **options)
    out, lse = run(q, k, v, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert_accurate(out, exact, own, terms=q.size(-1))
    assert_accurate(lse, exact_lse, terms=q.size(-1))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, causal, dtype):
    check(*make(*shape, dtype=dtype), **CAUSAL[causal])


@pytest.mark.parametrize("scale", (0.3, -0.3, 0.0))
@pytest.mark.parametrize("causal", CAUSAL)
def test_any_scale(scale, causal):
    check(*make(1, 1, 1, 70, 140, 8), scale=scale, **CAUSAL[causal])


def test_large_scores_do_not_overflow():
    q, k, v = make(1, 2, 2, 20, 140, 16)
    check(q * 8, k * 8, v)
    out, lse = on_triton(q - 100.0, k.abs() + 10.0, v, is_causal=True)  # every score far below zero
    assert out.isfinite().all() and lse.isfinite().all() and (lse < -1000).all()


def test_any_strides():
    q, k, v = make(2, 3, 3, 9, 70, 16)
    for odd in (
        [noncontiguous(t) for t in (q, k, v)],
        [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)],
        [q.transpose(2, 3).contiguous().transpose(2, 3), k[:, :1].expand_as(k), v[:1].expand_as(v)],
    ):
        check(*odd, is_causal=True, causal_alignment="bottom_right")


def test_values_out_of_sight_are_not_read():
    """What lies between the rows of a wider tensor is NaN, and so is what lies beyond its last row."""
    q, k, v = make(1, 1, 1, 5, 6, 8)
    wide = [torch.full((1, 1, t.size(2) + 140, 24), math.nan) for t in (q, k, v)]
    for whole, t in zip(wide, (q, k, v)):
        whole[:, :, : t.size(2), :8] = t
    inside = [whole[:, :, : t.size(2), :8] for whole, t in zip(wide, (q, k, v))]
    assert torch.equal(on_triton(*inside)[0], on_triton(q, k, v)[0])


@pytest.mark.parametrize("causal", CAUSAL)
def test_gradients(causal):
    inputs = make(1, 4, 2, 7, 5, 8, grad=True)
    options = CAUSAL[causal]
    got = value_and_gradients(lambda *t: on_triton(*t, **options), leaves(*inputs))[1]
    reference = dict(enable_gqa=True, return_lse=True, backend="reference", **options)
    exact = value_and_gradients(
        lambda *t: scaled_dot_product_attention(*t, **reference), leaves(*inputs, dtype=torch.float64)
    )[1]
    for gradient, exact_gradient in zip(got, exact, strict=True):
        assert_accurate(gradient, exact_gradient, factor=3.0, terms=8)


def test_second_derivatives():
    q, k, v = make(1, 1, 1, 3, 4, 8, grad=True)

    def second(backend):
        out = scaled_dot_product_attention(q, k, v, backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (q, k, v))

    torch.testing.assert_close(second("triton"), second("reference"))


def test_compiles_to_one_graph():
    run = torch.compile(on_triton, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        inputs = make(1, 2, 2, rows, 7, 8, grad=True)
        got, wanted = (value_and_gradients(fn, leaves(*inputs)) for fn in (run, on_triton))
        torch.testing.assert_close(got, wanted)


def test_the_op():
    q, k, v = make(1, 4, 2, 5, 7, 16)
    torch.library.opcheck(
        torch.ops.fused_ops.attention_fwd_triton.default, (q, k, v, 0.25, True, False),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "change, reason",
    (
        (dict(attn_mask=torch.ones(5, 7, dtype=torch.bool)), "mask"),
        (dict(softcap=2.0), "softcap"),
        (dict(dropout_p=0.5), "dropout"),
        (dict(value=randn(1, 1, 7, 4)), "head dim"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_lacks_is_refused_with_the_reason(change, reason):
    q, k, v = make(1, 1, 1, 5, 7, 8)
    rows = explain(
        scaled_dot_product_attention, **{"query": q, "key": k, "value": v, "backend": "triton", **change}
    ).rows
    assert rows[0][:2] == ("triton", "refused") and reason in rows[0][2]


MUTANTS = {
    "the causal mask is left out": ("i_n + o_col[None, :] <= o_row[:, None] + diagonal", "i_n + o_col[None, :] >= 0"),
    "one key too many": ("<= o_row[:, None] + diagonal", "<= o_row[:, None] + diagonal + 1"),
    "the last keys are not masked": ("m_col = i_n + o_col < keys", "m_col = i_n + o_col < keys + BLOCK_N"),
    "the accumulator is not rescaled": ("b_acc = b_acc * b_decay[:, None]", "b_acc = b_acc"),
    "the sum is not rescaled": ("b_sum = b_sum * b_decay + ", "b_sum = b_sum + "),
    "exponentials to base e": ("b_p = tl.exp2(b_s - b_top[:, None])", "b_p = tl.exp(b_s - b_top[:, None])"),
    "the wrong key head": ("i_kv = i_h // group", "i_kv = i_h % group"),
    "a block is skipped": ("clear = clear // BLOCK_N * BLOCK_N", "clear = (clear + BLOCK_N - 1) // BLOCK_N * BLOCK_N"),
    "the log-sum-exp forgets the sum": ("(b_max + tl.log2(b_sum)) * LN_2", "b_max * LN_2"),
    "negative scales are not turned": ("b_q = tl.where(scale < 0, -b_q, b_q)", "b_q = b_q"),
    "the diagonal is at the top left": (
        "minimum(keys, i_m * BLOCK_M + diagonal + 1)",
        "minimum(keys, i_m * BLOCK_M + 1)",
    ),
}


def mutant(tmp_path, old, new):
    """The kernels' module with one piece of its source replaced."""
    from importlib.util import module_from_spec, spec_from_file_location

    from fused_ops.attention import triton_kernels

    source = inspect.getsource(triton_kernels)
    assert source.count(old) >= 1
    path = tmp_path / "mutant_kernels.py"
    path.write_text(source.replace(old, new))
    spec = spec_from_file_location("mutant_kernels", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def battery(kernels):
    def run(q, k, v, scale=None, is_causal=False, causal_alignment="top_left"):
        scale = q.size(-1) ** -0.5 if scale is None else scale
        return kernels.attention_fwd(q, k, v, scale, is_causal, causal_alignment == "bottom_right")

    inputs = make(1, 6, 2, 70, 200, 8)
    check(*(t * 3 for t in inputs), run=run)
    check(*make(1, 1, 1, 100, 60, 8), run=run, is_causal=True, causal_alignment="bottom_right")
    check(*make(1, 1, 1, 130, 300, 8), run=run, is_causal=True, causal_alignment="bottom_right", scale=-0.5)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_caught(name, tmp_path):
    with pytest.raises(AssertionError, match="error"):
        battery(mutant(tmp_path, *MUTANTS[name]))


def test_the_right_kernel_passes_the_same_battery(tmp_path):
    battery(mutant(tmp_path, "LN_2", "LN_2"))


def test_torchs_formula():
    q, k, v = make(1, 2, 2, 6, 6, 8)
    torch.testing.assert_close(
        on_triton(q, k, v, is_causal=True)[0], F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )
