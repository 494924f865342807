"""The attention kernels on a GPU, against the float64 oracle on the CPU."""

import math

import pytest
import torch

from fused_ops import decode_attention, scaled_dot_product_attention, varlen_attention
from tests.support import assert_accurate, leaves, randn, value_and_gradients

pytestmark = pytest.mark.gpu
TRITON, CUDA = (pytest.mark.kernel(name) for name in ("attention.fwd.triton", "attention.decode.cuda"))

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAUSAL = {
    "full": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
}
# batch, heads, kv_heads, rows, columns, dim
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 6, 2, 17, 65, 64),
    (1, 4, 4, 129, 127, 16),
    (1, 3, 1, 300, 511, 80),
    (2, 8, 8, 1023, 1025, 128),
    (1, 8, 1, 257, 300, 256),
    (1, 2, 2, 200, 333, 33),
    (1, 2, 2, 70, 0, 64),
    (0, 2, 2, 5, 5, 64),
]


def make(batch, heads, kv_heads, rows, columns, dim, dtype, grad=False):
    shapes = (batch, heads, rows, dim), (batch, kv_heads, columns, dim), (batch, kv_heads, columns, dim)
    return [randn(*s, dtype=dtype, seed=i, device="cuda", requires_grad=grad) for i, s in enumerate(shapes)]


@TRITON
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_forward(shape, causal, dtype):
    q, k, v = make(*shape, dtype)
    options = dict(enable_gqa=True, **CAUSAL[causal])
    exact, exact_lse = scaled_dot_product_attention(*(t.double().cpu() for t in (q, k, v)), return_lse=True, **options)
    own = scaled_dot_product_attention(q.cpu(), k.cpu(), v.cpu(), backend="reference", **options)
    out, lse = scaled_dot_product_attention(q, k, v, return_lse=True, backend="triton", **options)
    assert_accurate(out, exact, own, terms=shape[-1])
    assert_accurate(lse, exact_lse, terms=shape[-1])


@TRITON
def test_triton_at_any_strides():
    q, k, v = make(2, 4, 4, 100, 100, 64, torch.float16)
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True, backend="triton")
    packed = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2)  # (batch, length, 3, heads, dim)
    views = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    assert torch.equal(scaled_dot_product_attention(*views, is_causal=True, backend="triton"), wanted)
    odd = [torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for t in (q, k, v)]
    assert torch.equal(scaled_dot_product_attention(*odd, is_causal=True, backend="triton"), wanted)


@TRITON
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_triton_gradients(dtype):
    inputs = make(2, 4, 2, 65, 130, 64, dtype, grad=True)
    options = dict(enable_gqa=True, is_causal=True, causal_alignment="bottom_right")

    def run(backend):
        return lambda *t: scaled_dot_product_attention(*t, backend=backend, **options)

    got = value_and_gradients(run("triton"), leaves(*inputs))[1]
    own = value_and_gradients(run("reference"), leaves(*inputs, device="cpu"))[1]
    exact = value_and_gradients(run("reference"), leaves(*inputs, dtype=torch.float64, device="cpu"))[1]
    for gradient, torch_gradient, exact_gradient in zip(got, own, exact, strict=True):
        assert_accurate(gradient, exact_gradient, torch_gradient, factor=3.0, terms=64)


@TRITON
def test_triton_beyond_32_bit_offsets():
    k = torch.empty(3, 1, 9_000_000, 128, dtype=torch.float16, device="cuda")  # the last batch lies 2.3e9 elements in
    k[:, :, :-300] = 3.0  # what a wrapped offset would find
    k[:, :, -300:] = randn(3, 1, 300, 128, dtype=torch.float16, device="cuda")
    q, tail = randn(3, 1, 5, 128, dtype=torch.float16, device="cuda"), k[:, :, -300:]
    got = scaled_dot_product_attention(q, tail, tail, backend="triton")
    assert torch.equal(got, scaled_dot_product_attention(q, tail.clone(), tail.clone(), backend="triton"))


@CUDA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (64, 128, 256))
@pytest.mark.parametrize(
    "heads, kv_heads, queries", ((1, 1, 1), (8, 8, 1), (6, 2, 1), (16, 2, 1), (8, 2, 3), (64, 1, 1), (8, 1, 8)), ids=str
)
def test_cuda_decode(heads, kv_heads, queries, dim, dtype):
    lengths = [0, 1, 64, 777, 4096]
    q = randn(len(lengths), heads, queries, dim, dtype=dtype)
    k, v = (randn(len(lengths), kv_heads, 4099, dim, dtype=dtype, seed=i) for i in (1, 2))
    for b, length in enumerate(lengths):
        k[b, :, length:] = math.nan
        v[b, :, length:] = math.nan
    for integers in (torch.int32, torch.int64):
        seqlens = torch.tensor(lengths, dtype=integers)
        exact = decode_attention(q.double(), k.double(), v.double(), seqlens)
        own = decode_attention(q, k, v, seqlens)
        on_gpu = [t.cuda() for t in (q, k, v, seqlens)]
        out = decode_attention(*on_gpu, backend="cuda")
        assert_accurate(out, exact, own, terms=dim)
        assert torch.equal(out, decode_attention(*on_gpu, backend="cuda"))
        assert_accurate(decode_attention(*on_gpu, backend="reference"), exact, own, terms=dim)


@CUDA
def test_cuda_decode_of_other_layouts():
    q = randn(2, 3, 8, 128, dtype=torch.float16, device="cuda").transpose(1, 2)  # (batch, heads, 3, dim)
    k, v = (randn(2, 500, 2, 128, dtype=torch.float16, seed=i, device="cuda").transpose(1, 2) for i in (1, 2))
    seqlens = torch.tensor([[500, 9], [33, 9]], device="cuda")[:, 0]
    wanted = decode_attention(q.contiguous(), k.contiguous(), v.contiguous(), seqlens.clone(), backend="cuda")
    assert torch.equal(decode_attention(q, k, v, seqlens, backend="cuda"), wanted)
    odd = [torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for t in (k, v)]  # rows that start anywhere
    assert torch.equal(decode_attention(q, *odd, seqlens, backend="cuda"), wanted)


@CUDA
def test_cuda_decode_has_gradients():
    q = randn(2, 4, 2, 64, device="cuda", requires_grad=True)
    k, v = (randn(2, 2, 100, 64, seed=i, device="cuda", requires_grad=True) for i in (1, 2))
    seqlens = torch.tensor([100, 37], device="cuda")
    got = value_and_gradients(lambda *t: decode_attention(*t, seqlens, backend="cuda"), leaves(q, k, v))
    exact = value_and_gradients(
        lambda *t: decode_attention(*t, seqlens.cpu()), leaves(q, k, v, dtype=torch.float64, device="cpu")
    )
    for value, exact_value in zip((*got[0], *got[1]), (*exact[0], *exact[1]), strict=True):
        assert_accurate(value, exact_value, factor=3.0, terms=100)


@TRITON
@CUDA
def test_a_graph_captures_both_kernels():
    """No value is read back and nothing is allocated outside the pool: lengths may change between replays."""
    q, k, v = make(2, 4, 2, 1, 300, 64, torch.float16)
    seqlens = torch.tensor([300, 20], device="cuda")

    def run():
        dense = scaled_dot_product_attention(q, k, v, enable_gqa=True, backend="triton")
        return dense, decode_attention(q, k, v, seqlens, backend="cuda")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    seqlens.copy_(torch.tensor([7, 290], device="cuda"))
    graph.replay()
    for got, wanted in zip(outputs, run()):
        assert torch.equal(got, wanted)


def test_varlen_reads_no_length_back():
    q, k, v = (randn(n, heads, 32, seed=n, device="cuda") for n, heads in ((10, 4), (15, 2), (15, 2)))
    ends = torch.tensor([0, 3, 3, 10]), torch.tensor([0, 5, 9, 15])
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = [t.pin_memory().to("cuda", non_blocking=True) for t in ends]
        out, lse = varlen_attention(q, k, v, *on_gpu, 7, 6, is_causal=True, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact, exact_lse = varlen_attention(
        q.double().cpu(), k.double().cpu(), v.double().cpu(), *ends, 7, 6, is_causal=True, return_lse=True
    )
    assert_accurate(out, exact, terms=32)
    assert_accurate(lse, exact_lse, terms=32)
