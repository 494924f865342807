"""Derivatives: a kernel's from the reference, PyTorch's fused ops' second derivative from eager maths."""

import gc
import weakref
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from fused_ops.core.autograd import distinct, reference_gradient, twice_differentiable, with_reference_gradient
from tests.support import leaves, randn, value_and_gradients

SUBSETS = list(product((False, True), repeat=3))


def maths(a, b, c, scale):
    """Two outputs; the second does not depend on `b`; `c` may be None."""
    first = scale * a.sin() * b.exp()
    second = a.square().sum(-1)
    return first if c is None else first + c * a, second


@pytest.fixture(scope="module")
def op():
    """A kernel (`op.calls` grows with its runs) with the reference's gradient, as a room builds one."""

    calls = []

    def kernel(a, b, c, scale):
        if not torch.compiler.is_compiling():
            calls.append(torch.is_grad_enabled())
        return tuple(out.clone() for out in maths(a, b, c, scale))

    backward = reference_gradient("core_test_bwd", "float scale", maths)
    call = with_reference_gradient(kernel, backward, maths)
    call.calls, call.backward = calls, backward
    return call


def inputs(subset=(True, True, True), dtype=torch.float64):
    return [randn(2, 3, dtype=dtype, seed=i, requires_grad=needs) for i, needs in enumerate(subset)]


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("with_c", [True, False])
def test_value_and_gradient_of_every_subset(op, subset, with_c):
    a, b, c = inputs(subset)
    c = c if with_c else None
    op.calls.clear()
    outs, grads = value_and_gradients(lambda *t: op(t, (0.5,)), [a, b, c])
    differentiable = any(t is not None and t.requires_grad for t in (a, b, c))
    assert op.calls == [not differentiable]  # once, and without a graph of its own
    wanted_outs, wanted = value_and_gradients(lambda *t: maths(*t, 0.5), [a, b, c])
    assert len(grads) == len(wanted) == sum(t is not None and t.requires_grad for t in (a, b, c))
    for have, want in zip((*outs, *grads), (*wanted_outs, *wanted)):
        torch.testing.assert_close(have, want)
    assert all(
        out.requires_grad == (a.requires_grad or b.requires_grad or (with_c and c.requires_grad)) for out in outs
    )


@pytest.mark.parametrize("with_c", [True, False])
def test_gradcheck_and_gradgradcheck(op, with_c):
    a, b, c = inputs()
    wanted = (a, b, c) if with_c else (a, b)

    def call(*t):
        return op((*t, *[None] * (3 - len(t))), (0.5,))

    assert gradcheck(call, wanted)
    assert gradgradcheck(call, wanted)


def test_outputs_without_a_gradient_count_as_zero(op):
    a, b, c = inputs()
    second = op((a, b, c), (0.5,))[1]
    found = torch.autograd.grad(second.sum(), (a, b, c), allow_unused=True)
    torch.testing.assert_close(found[0], 2 * a)
    assert all(grad is None or not grad.any() for grad in found[1:])


def test_the_same_object_twice_gets_both_gradients(op):
    a = inputs()[0]
    (grad,) = torch.autograd.grad(op((a, a, a), (0.5,))[0].sum(), a)
    (wanted,) = torch.autograd.grad(maths(a, a, a, 0.5)[0].sum(), a)
    torch.testing.assert_close(grad, wanted)
    assert gradgradcheck(lambda a: op((a, a, a), (0.5,)), a)


def test_distinct_replaces_repeated_objects_alone():
    a, b = randn(2), randn(2)
    result = distinct((a, b, None, a, None, b))
    assert result[0] is a and result[1] is b and result[2] is None and result[4] is None
    assert len({id(t) for t in result if t is not None}) == 4
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(result[3:6:2], (a, b)))


def test_backward_needs_retain_graph_to_run_twice(op):
    a, b, c = inputs()
    out = op((a, b, c), (0.5,))[0].sum()
    first = torch.autograd.grad(out, (a, b, c), retain_graph=True)
    second = torch.autograd.grad(out, (a, b, c))
    for x, y in zip(first, second):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, (a, b, c))


def test_an_input_changed_in_place_is_noticed(op):
    a, b, c = inputs()
    b = b.detach()
    out = op((a, b, c), (0.5,))[0].sum()
    b.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, a)


def test_without_grad_there_is_no_graph(op):
    with torch.no_grad():
        assert all(out.grad_fn is None for out in op(tuple(inputs()), (0.5,)))


@pytest.mark.parametrize("subset", SUBSETS[1:])
def test_opcheck_of_the_derivative_op(op, subset):
    a, b, c = (t.detach() for t in inputs())
    grads = [randn(2, 3, dtype=torch.float64, seed=8), randn(2, dtype=torch.float64, seed=9)]
    for given in (grads, [None, grads[1]], [grads[0], None]):
        torch.library.opcheck(op.backward, (given, [a, b, c], list(subset), 0.5))


def test_the_derivative_op_is_right_in_a_compiled_graph_that_has_no_backward(op):
    a, b, c = (t.detach() for t in inputs())
    grads = [randn(2, 3, dtype=torch.float64, seed=8), randn(2, dtype=torch.float64, seed=9)]

    def fn(grads, tensors):
        return op.backward(grads, tensors, [True, True, True], 0.5)

    torch._dynamo.reset()
    found = torch.compile(fn, backend="aot_eager", fullgraph=True)(grads, [a, b, c])
    tensors = inputs()
    wanted = torch.autograd.grad(maths(*tensors, 0.5), tensors, grads)
    for grad, want in zip(found, wanted, strict=True):
        assert want.any()
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("expanded", [False, True])
def test_the_derivative_op_returns_fresh_contiguous_tensors(expanded):
    backward = reference_gradient(f"core_test_sum_bwd_{int(expanded)}", "", lambda a, b: (a + b,))
    a, b, grad = randn(2, 3), randn(2, 3, seed=1), randn(2, 3, seed=2).t().contiguous().t()
    if expanded:
        a, b, grad = randn(1, 3).expand(2, 3), randn(2, 1, seed=1).expand(2, 3), randn(3).expand(2, 3)
    found = backward([grad], [a, b], [True, True])
    pointers = {t.untyped_storage().data_ptr() for t in (*found, grad, a, b)}
    assert len(pointers) == 5
    for gradient in found:
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient, grad.contiguous())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("repeated", [False, True])
def test_compiles_whole_with_gradients(op, dynamic, repeated):
    def fn(a, b, c):
        first, second = op((a, a, c) if repeated else (a, b, c), (0.5,))
        return first.sum() + second.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (2, 5):
        wanted = [randn(rows, 3, seed=i, requires_grad=True) for i in range(3)]
        found = torch.autograd.grad(compiled(*wanted), wanted, allow_unused=True)
        for grad, want in zip(found, torch.autograd.grad(fn(*wanted), wanted, allow_unused=True)):
            assert (grad is None) == (want is None)
            if grad is not None:
                torch.testing.assert_close(grad, want)


class Marked(torch.autograd.Function):
    """x³, whose graph node carries an object that a test can watch."""

    @staticmethod
    def forward(ctx, x, marker):
        ctx.marker = marker
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad, None


class Watched:
    """A fused op without a second derivative, its maths, and how often each ran."""

    def __init__(self):
        self.fused_calls = self.maths_calls = 0
        self.marker = None

    def fused(self, a, b, c=None):
        self.fused_calls += 1
        marker = type("Marker", (), {})()
        self.marker = weakref.ref(marker)
        cube = Marked.apply(a, marker) * b
        return cube if c is None else cube + c, b * 2

    def maths(self, a, b, c=None):
        self.maths_calls += 1
        return a**3 * b if c is None else a**3 * b + c, b * 2

    def __call__(self, *tensors):
        return twice_differentiable(self.fused, self.maths, *tensors)

    def alive(self):
        gc.collect()
        return self.marker() is not None


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("with_c", [True, False])
def test_first_derivative_is_the_fused_ops_own(subset, with_c):
    watched = Watched()
    a, b, c = inputs(subset)
    tensors = [a, b, c if with_c else None]
    outs, grads = value_and_gradients(watched, tensors)
    assert (watched.fused_calls, watched.maths_calls) == (1, 0)
    wanted_outs, wanted = value_and_gradients(watched.maths, leaves(*tensors))
    for have, want in zip((*outs, *grads), (*wanted_outs, *wanted), strict=True):
        torch.testing.assert_close(have, want)


def test_second_derivative_is_the_maths():
    watched = Watched()
    tensors = inputs()
    out = watched(*tensors)[0].sum()
    torch.autograd.grad(out, tensors, retain_graph=True)
    assert watched.maths_calls == 0
    torch.autograd.grad(out, tensors, create_graph=True)
    assert watched.maths_calls == 1
    assert gradcheck(watched, tensors)
    assert gradgradcheck(watched, tensors)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(watched.fused(*tensors)[0].sum(), tensors[0], create_graph=True)[0].sum().backward()


def test_the_inner_graph_is_freed_with_the_saved_tensors():
    watched, tensors = Watched(), inputs()
    out = watched(*tensors)
    assert watched.alive()
    out[0].sum().backward(retain_graph=True)
    assert watched.alive()
    first = [t.grad.clone() for t in tensors]
    out[0].sum().backward()
    assert not watched.alive()
    for tensor, grad in zip(tensors, first):
        torch.testing.assert_close(tensor.grad, 2 * grad, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        out[0].sum().backward()


def test_the_inner_graph_is_freed_with_an_output_nobody_wants():
    watched, tensors = Watched(), inputs()
    out = watched(*tensors)
    assert watched.alive()
    del out
    assert not watched.alive()


def test_nothing_is_kept_when_no_gradient_is_wanted():
    watched = Watched()
    assert all(out.grad_fn is None for out in watched(*inputs((False, False, False))))
    assert not watched.alive()
    with torch.no_grad():
        watched(*inputs())
    assert not watched.alive()


def test_fused_may_return_a_tensor_alone():
    x = randn(4, dtype=torch.float64, requires_grad=True)

    def call(x):
        return twice_differentiable(lambda x: x.sigmoid(), lambda x: 1 / (1 + torch.exp(-x)), x)

    assert isinstance(call(x), torch.Tensor)
    assert gradcheck(call, x) and gradgradcheck(call, x)


def test_duplicates_get_both_gradients():
    watched, a = Watched(), inputs()[0]
    assert gradcheck(lambda a: watched(a, a, a), a)
    assert gradgradcheck(lambda a: watched(a, a, a), a)


def test_outputs_without_a_gradient_reach_no_input_they_do_not_depend_on():
    watched, (a, b, c) = Watched(), inputs()
    found = torch.autograd.grad(watched(a, b, c)[1].sum(), (a, b, c), allow_unused=True)
    assert not any(grad is not None and grad.any() for grad in (found[0], found[2]))
    torch.testing.assert_close(found[1], torch.full_like(b, 2.0))


def test_an_integer_output_has_no_gradient():
    def both(x):
        return x * 2, x.argmax(-1)

    x = randn(2, 3, requires_grad=True)
    value, index = twice_differentiable(both, both, x)
    assert value.requires_grad and not index.requires_grad
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], torch.full_like(x, 2.0))


def test_under_transforms_and_forward_mode_it_is_the_op_itself():
    def twice(x):
        return twice_differentiable(torch.sin, torch.sin, x)

    x = randn(3, requires_grad=True)
    torch.testing.assert_close(torch.vmap(twice)(x), x.sin())
    torch.testing.assert_close(torch.func.grad(lambda x: twice(x).sum())(x), x.cos())
    torch.testing.assert_close(torch.func.jvp(twice, (x,), (torch.ones_like(x),))[1], x.cos())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        torch.testing.assert_close(forward_ad.unpack_dual(twice(dual)).tangent, x.cos())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(twice, backend="aot_eager", fullgraph=True)(x), x.sin())


def test_attention_gains_the_second_derivative_that_torch_lacks():
    q, k, v = (randn(1, 1, 2, 4, dtype=torch.float64, seed=i, requires_grad=True) for i in range(3))

    def fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def plain(q, k, v):
        return torch.softmax(q @ k.transpose(-2, -1) / 2.0, -1) @ v

    with pytest.raises(RuntimeError, match="not implemented"):
        (grad,) = torch.autograd.grad(fused(q, k, v).sum(), q, create_graph=True)
        grad.sum().backward()
    assert gradgradcheck(lambda *t: twice_differentiable(fused, plain, *t), (q, k, v))
