"""What a call is made under: functorch, forward AD, odd tensors, autocast, fake CUDA tensors, torch.compile."""

import logging
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fused_ops
from fused_ops.core import device, dispatch
from fused_ops.core.dispatch import use_backend
from tests.core.conftest import FACTORS
from tests.support import randn

attention = fused_ops.scaled_dot_product_attention


class Tagged(torch.Tensor):
    """A subclass without a rule."""


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.vmap(f)(x),
        lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x))[0],
        lambda f, x: torch.func.jacrev(f)(x).sum(-1),
        lambda f, x: torch.func.jacfwd(f)(x).sum(-1),
        lambda f, x: torch.func.functionalize(f)(x),
    ],
    ids=["vmap", "grad", "jvp", "vjp", "jacrev", "jacfwd", "functionalize"],
)
def test_a_functorch_transform_takes_reference(make_op, transform):
    scaled, x = make_op("cpu", "reference"), randn(3)
    result = transform(scaled, x)
    assert set(scaled.calls) == {"reference"}
    wanted = transform(lambda x: x * FACTORS["reference"], x)
    torch.testing.assert_close(result, wanted)
    with pytest.raises(fused_ops.BackendUnavailable, match="functorch transform"):
        transform(lambda x: scaled(x, backend="cpu"), x)
    scaled(x)
    assert scaled.calls[-1] == "cpu"


def test_forward_mode_ad_takes_reference(make_op):
    scaled = make_op("cpu", "reference")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(randn(3), randn(3, seed=1))
        tangent = forward_ad.unpack_dual(scaled(dual)).tangent
        with pytest.raises(fused_ops.BackendUnavailable, match="forward-mode AD"):
            scaled(dual, backend="cpu")
    assert scaled.calls == ["reference"]
    torch.testing.assert_close(tangent, FACTORS["reference"] * randn(3, seed=1))


ODD = {
    "nested": lambda: torch.nested.nested_tensor([randn(2), randn(3)]),
    "jagged": lambda: torch.nested.nested_tensor([randn(2), randn(3)], layout=torch.jagged),
    "sparse": lambda: randn(3, 3).to_sparse(),
    "csr": lambda: randn(3, 3).to_sparse_csr(),
    "subclass": lambda: randn(3).as_subclass(Tagged),
}


@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning", "ignore:.*beta state:UserWarning")
@pytest.mark.parametrize("kind", ODD)
def test_nested_sparse_and_subclassed_tensors_take_reference(make_op, kind):
    scaled, odd = make_op("cpu", "reference"), ODD[kind]()
    out = scaled(odd)
    assert scaled.calls == ["reference"]
    assert type(out) is type(odd) and out.layout == odd.layout
    with pytest.raises(fused_ops.BackendUnavailable, match=r"dense strided|tensor subclass") as caught:
        scaled(odd, backend="cpu")
    assert kind != "subclass" or "Tagged" in str(caught.value)
    assert fused_ops.explain(scaled, odd).rows[0][1] == "refused"


def test_an_odd_tensor_counts_wherever_it_stands():
    q, k, v = (randn(1, 2, 4, 8, seed=i) for i in range(3))
    rows = fused_ops.explain(attention, q, k, v.as_subclass(Tagged)).rows
    assert [row for row in rows if row[1] == "refused" and "Tagged" in row[2]]
    torch.testing.assert_close(attention(q, k, v.as_subclass(Tagged)).as_subclass(torch.Tensor), attention(q, k, v))


def test_a_parameter_is_no_odd_tensor(make_op):
    scaled = make_op("cpu", "reference")
    scaled(torch.nn.Parameter(randn(3)))
    assert scaled.calls == ["cpu"]


@pytest.mark.parametrize("names", [("cpu", "reference"), ("reference",), ("cuda", "reference")])
@pytest.mark.parametrize("requested", [None, "reference"])
def test_an_op_that_autocast_lowers_sees_lowered_inputs(make_op, names, requested):
    scaled = make_op(*names, autocast="cast")
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled(randn(3), requested).dtype == torch.bfloat16
        assert scaled(randn(3, dtype=torch.float64), requested).dtype == torch.float64
        assert scaled(torch.arange(3), requested).dtype == torch.float32  # an integer times a Python float
        with torch.autocast("cpu", enabled=False):
            assert scaled(randn(3), requested).dtype == torch.float32
    assert scaled(randn(3), requested).dtype == torch.float32


def test_an_op_that_leaves_autocast_to_torch_takes_reference_uncast(make_op):
    scaled = make_op("cpu", "reference", autocast="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled(randn(3)).dtype == torch.float32
        with pytest.raises(fused_ops.BackendUnavailable, match="autocast"):
            scaled(randn(3), backend="cpu")
    assert scaled.calls == ["reference"]


@pytest.mark.parametrize("return_lse", [False, True])
def test_attention_under_autocast_gives_the_dtype_of_torch(return_lse):
    q, k, v = (randn(1, 2, 4, 8, seed=i) for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, return_lse=return_lse)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out = out[0] if return_lse else out
    assert out.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, atol=2e-2, rtol=2e-2)


def gpu_qkv(dtype=torch.bfloat16):
    return [
        torch.empty(2, heads, length, 64, dtype=dtype, device="cuda") for heads, length in ((4, 17), (2, 33), (2, 33))
    ]


@pytest.mark.skipif(not device.TRITON_INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fake_cuda_tensors_go_through_a_gpu_ops_fake(dtype):
    # Without gradients: autograd aborts the process on a CUDA tensor that a torch built without CUDA is shown.
    with FakeTensorMode():
        q, k, v = gpu_qkv(dtype)
        out, lse = attention(q, k, v, enable_gqa=True, return_lse=True, backend="triton")
        assert (out.shape, out.dtype, out.device.type) == (q.shape, dtype, "cuda")
        assert (lse.shape, lse.dtype, lse.device.type) == (q.shape[:-1], torch.float32, "cuda")
        call = [out, lse], [q, k, v, None, None, None], [True, True, False, False, False, False]
        grads = torch.ops.fused_ops.attention_bwd(*call, 0.125, False, False, -1, -1, None)
        assert [grad.shape for grad in grads] == [q.shape, k.shape, *[(0,)] * 4]
        assert {(grad.dtype, grad.device.type) for grad in grads} == {(dtype, "cuda")}
    assert not torch.cuda.is_initialized() or torch.cuda.is_available()


@pytest.mark.skipif(not device.TRITON_INSTALLED, reason="triton is not installed")
def test_a_trace_over_fake_cuda_tensors_holds_the_gpu_op():
    with FakeTensorMode():
        traced = make_fx(lambda *qkv: attention(*qkv, enable_gqa=True, backend="triton"))(*gpu_qkv())
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert torch.ops.fused_ops.attention_fwd_triton.default in called


def compiled(fn, **options):
    torch._dynamo.reset()
    return torch.compile(fn, backend="aot_eager", fullgraph=True, **options)


def test_use_backend_compiles_without_a_graph_break(make_op):
    scaled = make_op("cpu", "reference")

    def fn(x):
        with use_backend("reference"):
            y = scaled(x)
            with use_backend(None):
                y = y + scaled(x)
        return y + scaled(x)

    x = randn(3)
    torch.testing.assert_close(compiled(fn)(x), x * (FACTORS["reference"] + 2 * FACTORS["cpu"]))
    assert dispatch._context is None


@pytest.mark.parametrize("names", [("cpu", "reference"), ("reference",)])
def test_a_compiled_function_follows_the_context_it_is_called_in(make_op, names):
    scaled, x = make_op(*names), randn(3)
    fn = compiled(lambda x: scaled(x) + 1)
    for context, served in [(None, names[0]), ("reference", "reference"), (None, names[0])]:
        with use_backend(context) if context else nullcontext():
            torch.testing.assert_close(fn(x), x * FACTORS[served] + 1)


def test_a_request_that_cannot_be_served_raises_from_a_compiled_function_too(make_op):
    scaled = make_op("cuda", "reference")
    with pytest.raises(Exception, match="needs a tensor on a GPU"):
        torch.compile(lambda x: scaled(x, backend="cuda"), backend="eager")(randn(3))
    assert scaled.calls == []


def test_nothing_is_logged_while_compiling_and_the_first_eager_call_still_is(make_op, caplog):
    scaled, x = make_op("cpu", "reference", cpu={"supports": lambda x: "never"}), randn(3)
    with caplog.at_level(logging.INFO, "fused_ops"):
        compiled(lambda x: scaled(x) * 2)(x)
        assert [record for record in caplog.records if record.name == "fused_ops"] == []
        scaled(x)
    assert [record.levelname for record in caplog.records if record.name == "fused_ops"] == ["INFO"]


def test_an_experimental_kernel_is_traced_by_name_and_passed_by_auto(make_op, gpu_kernel):
    scaled, x = make_op("cpu", "reference", cpu={"kernel": gpu_kernel.kernel}), randn(3)
    torch.testing.assert_close(compiled(lambda x: scaled(x))(x), x * FACTORS["reference"])
    torch.testing.assert_close(compiled(lambda x: scaled(x, backend="cpu"))(x), x * FACTORS["cpu"])
    gpu_kernel.verify()
    torch.testing.assert_close(compiled(lambda x: scaled(x))(x), x * FACTORS["cpu"])


def test_a_real_op_compiles_with_gradients_and_dynamic_shapes():
    fn = compiled(lambda q, k, v: attention(q, k, v, is_causal=True).square().sum(), dynamic=True)
    for length in (5, 9):
        qkv = [randn(2, 2, length, 8, seed=i, requires_grad=True) for i in range(3)]
        grads = torch.autograd.grad(fn(*qkv), qkv)
        wanted = torch.autograd.grad(attention(*qkv, is_causal=True).square().sum(), qkv)
        for grad, want in zip(grads, wanted):
            torch.testing.assert_close(grad, want)


def test_one_object_given_twice_compiles():
    x = randn(2, 2, 5, 8, requires_grad=True)
    fn = compiled(lambda x: attention(x, x, x))
    torch.testing.assert_close(fn(x), attention(x, x, x))
    (grad,) = torch.autograd.grad(fn(x).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(attention(x, x, x).sum(), x)[0])
