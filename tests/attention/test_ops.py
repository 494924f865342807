"""The registered ops (schema, fake kernel), and torch.compile with and without gradients, at changing sizes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.overrides import TorchFunctionMode

from fused_ops import decode_attention, scaled_dot_product_attention, varlen_attention
from fused_ops.attention import reference
from tests.support import leaves, randn, value_and_gradients

OPS = torch.ops.fused_ops
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
SCORE = (0.3, True, True, 2, -1, None)
PLAIN = (0.3, True, True, -1, -1, None)


def packed():
    q, k, v = randn(10, 4, 8), randn(15, 2, 8, seed=1), randn(15, 2, 6, seed=2)
    return q, k, v, None, randn(4, seed=3), torch.tensor([0, 3, 4, 10]), torch.tensor([0, 5, 9, 15])


def cached():
    q, k, v = randn(3, 4, 2, 8), randn(3, 2, 11, 8, seed=1), randn(3, 2, 11, 6, seed=2)
    return q, k, v, torch.tensor([5, 0, 11]), None


def dense():
    q, k, v = (randn(2, 4, 5, 8, seed=i) for i in range(3))
    return q, k, v, randn(4, 5, 5, seed=4), None, None


CALLS = {
    "varlen forward": lambda: (OPS.varlen_attention_fwd, (*packed(), 6, 6, True, *SCORE)),
    "varlen forward without lse": lambda: (OPS.varlen_attention_fwd, (*packed(), 6, 6, False, *PLAIN)),
    "varlen backward": lambda: (
        OPS.varlen_attention_bwd,
        ([randn(10, 4, 6), randn(4, 10)], list(packed()), [*(True, True, False, False, True), False, False],
         6, 6, True, *SCORE),
    ),
    "decode forward": lambda: (OPS.decode_attention_fwd, (*cached(), *SCORE)),
    "decode backward": lambda: (
        OPS.decode_attention_bwd, ([randn(3, 4, 2, 6)], list(cached()), [True, True, True, False, False], *PLAIN)
    ),
    "attention backward": lambda: (
        OPS.attention_bwd, ([randn(2, 4, 5, 8), None], list(dense()), [True, False, True, True, False, False], *SCORE)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    target, arguments = CALLS[name]()
    opcheck(target.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_fake_kernels_of_the_gpu_ops(dtype):
    with FakeTensorMode():
        q = torch.empty(2, 5, 6, 64, dtype=dtype, device="cuda").transpose(1, 2)
        k = torch.empty(2, 3, 9, 64, dtype=dtype, device="cuda")
        seqlens = torch.empty(2, dtype=torch.int32, device="cuda")
        out, lse = OPS.attention_fwd_triton(q, k, k, 0.125, True, False)
        assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous() and out.device.type == "cuda"
        assert lse.shape == (2, 6, 5) and lse.dtype == torch.float32
        decoded = OPS.decode_attention_cuda(q, k, k, seqlens, 0.125)
        assert decoded.shape == q.shape and decoded.dtype == dtype and decoded.is_contiguous()


class NoReads(TorchFunctionMode):
    """Fails where a value of a tensor would decide what happens next, which stalls a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        reads = {"tolist", "item", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__index__", "__float__"}
        assert func.__name__ not in reads, f"reads a value back: {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lse", (True, False))
def test_on_a_gpu_no_length_is_read_back(monkeypatch, lse):
    monkeypatch.setattr(reference, "readable", lambda lengths: False)
    q, k, v, _, sinks, *ends = packed()
    with NoReads():
        for extra in ({}, dict(sinks=sinks, softcap=2.0, window=(1, 1), alibi_slopes=sinks.abs())):
            varlen_attention(q, k, v, *ends, 6, 6, is_causal=True, return_lse=lse, **extra)
        q, k, v, seqlens, _ = cached()
        decode_attention(q, k, v, seqlens, window=(2, 0), sinks=sinks)
        decode_attention(q, k, v, seqlens)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="tolist"), NoReads():
        decode_attention(q, k, v, seqlens)


def compiled_equals_eager(fn, calls):
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for inputs in calls:
        torch.testing.assert_close(
            value_and_gradients(compiled, leaves(*inputs)), value_and_gradients(fn, leaves(*inputs))
        )


@pytest.mark.parametrize(
    "options",
    (
        dict(is_causal=True),
        dict(is_causal=True, causal_alignment="bottom_right", window=(3, -1)),
        dict(sinks=torch.tensor([0.1, 0.2]), return_lse=True),
    ),
    ids=str,
)
def test_compiled_attention(options):
    sizes = ((2, 5, 7), (3, 8, 4))[: 1 if "sinks" in options else 2]
    calls = [
        [randn(b, 2, rows, 8, requires_grad=True)] + [randn(b, 2, cols, 8, seed=i, requires_grad=True) for i in (1, 2)]
        for b, rows, cols in sizes
    ]
    compiled_equals_eager(lambda q, k, v: scaled_dot_product_attention(q, k, v, **options), calls)


def test_compiled_attention_of_one_tensor():
    compiled_equals_eager(
        lambda x: scaled_dot_product_attention(x, x, x, is_causal=True),
        [[randn(2, 2, n, 8, requires_grad=True)] for n in (5, 9)],
    )


def test_compiled_varlen():
    def run(q, k, v, cu_q, cu_k):
        return varlen_attention(q, k, v, cu_q, cu_k, q.size(0), k.size(0), is_causal=True, return_lse=True)

    calls = []
    for queries, keys in (([3, 0, 4], [3, 2, 4]), ([2, 6], [5, 7]), ([1, 1, 1, 2], [1, 3, 4, 2])):
        ends = [torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]) for lengths in (queries, keys)]
        tensors = [randn(sum(n), h, 8, requires_grad=True, seed=h) for n, h in ((queries, 4), (keys, 2), (keys, 2))]
        calls.append([*tensors, *ends])
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for q, k, v, *ends in calls:
        got, wanted = (
            value_and_gradients(lambda *t, fn=fn, ends=ends: fn(*t, *ends)[0], leaves(q, k, v))
            for fn in (compiled, run)
        )
        torch.testing.assert_close(got, wanted)
    with pytest.raises(ValueError, match="cu_seqlens_q must be non-decreasing"):
        compiled(*calls[0][:3], calls[0][3] + 1, calls[0][4])


def test_compiled_varlen_with_dropout_has_the_gradients_of_its_own_mask():
    q, k = randn(40, 2, 8), randn(40, 2, 8, seed=1)
    v = torch.ones(40, 2, 8, requires_grad=True)
    ends = torch.tensor([0, 15, 40])
    run = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    out = run(q, k, v, ends, ends, 25, 25, dropout_p=0.5)
    (gradient,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(gradient.sum(), out.sum())  # both are the sum of the weights that were kept


def test_compiled_decode():
    calls = []
    for batch, queries, capacity, lengths in ((2, 1, 9, (4, 9)), (3, 2, 12, (0, 5, 7))):
        caches = [randn(batch, 2, capacity, 8, seed=i, requires_grad=True) for i in (1, 2)]
        calls.append(([randn(batch, 4, queries, 8, requires_grad=True), *caches], torch.tensor(lengths)))
    torch._dynamo.reset()
    compiled = torch.compile(decode_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for tensors, lengths in calls:
        got, wanted = (
            value_and_gradients(lambda *t, fn=fn, n=lengths: fn(*t, n), leaves(*tensors))
            for fn in (compiled, decode_attention)
        )
        torch.testing.assert_close(got, wanted)
    with pytest.raises(ValueError, match="cache_seqlens must be between 0 and the capacity"):
        compiled(*calls[0][0], torch.tensor([10, 1]))


def test_compiled_without_gradients():
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    q, k, v = (randn(2, 2, 6, 8, seed=i) for i in range(3))
    torch.testing.assert_close(compiled(q, k, v, softcap=2.0), scaled_dot_product_attention(q, k, v, softcap=2.0))


def test_functorch_and_forward_ad():
    q, k, v = (randn(3, 2, 4, 8, dtype=torch.float64, seed=i) for i in range(3))
    mapped = torch.func.vmap(lambda *t: scaled_dot_product_attention(*t, softcap=3.0))(q, k, v)
    torch.testing.assert_close(mapped, scaled_dot_product_attention(q, k, v, softcap=3.0))
    gradient = torch.func.grad(lambda q: scaled_dot_product_attention(q, k, v, return_lse=True)[1].sum())(q)
    wanted = torch.autograd.grad(scaled_dot_product_attention(q.requires_grad_(), k, v, return_lse=True)[1].sum(), q)
    torch.testing.assert_close(gradient, wanted[0])
    tangent = randn(3, 2, 4, 8, dtype=torch.float64, seed=5)
    _, derivative = torch.func.jvp(
        lambda k: scaled_dot_product_attention(q.detach(), k, v, sinks=k[0, :, 0, 0]), (k,), (tangent,)
    )
    step = 1e-6
    above, below = (
        scaled_dot_product_attention(q.detach(), k + d * tangent, v, sinks=(k + d * tangent)[0, :, 0, 0])
        for d in (step, -step)
    )
    torch.testing.assert_close(derivative, (above - below) / (2 * step), atol=1e-6, rtol=1e-6)


def test_autocast_lowers_the_inputs_like_torch():
    q, k, v = (randn(2, 4, 5, 8, seed=i) for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        got = scaled_dot_product_attention(q, k, v, is_causal=True)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert got.dtype == torch.bfloat16 and torch.equal(got, wanted)
