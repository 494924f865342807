"""opcheck on every op, and torch.compile(fullgraph=True) with gradients and a dynamic batch."""

import pytest
import torch
from torch import nn

import fused_ops
from fused_ops.conv import modules
from fused_ops.core import extension
from tests.conv.oracle import inputs
from tests.support import assert_accurate, leaves, randn

NEEDS_KERNELS = pytest.mark.skipif(not extension.has_kernel("conv2d_cpu", "CPU"), reason="_C.so was not built")
ONE = ((1, 1), (0, 0), (1, 1))


@NEEDS_KERNELS
@pytest.mark.parametrize("residual", [None, (2, 8, 9, 7)], ids=["", "residual"])
def test_opcheck_pointwise_and_onednn(residual):
    a = inputs(kernel=(1, 1), residual=residual)
    tensors = (a["input"], a["weight"], a["scale"], a["shift"], a["residual"])
    for op in (torch.ops.fused_ops.conv2d_cpu, torch.ops.fused_ops.conv2d_onednn):
        torch.library.opcheck(op.default, (*tensors, *ONE, 1, 2))
    last = [t if t is None or t.dim() < 4 else t.contiguous(memory_format=torch.channels_last) for t in tensors]
    torch.library.opcheck(torch.ops.fused_ops.conv2d_onednn.default, (*last, *ONE, 1, 1))


@NEEDS_KERNELS
def test_opcheck_depthwise():
    a = inputs(out_channels=6, groups=6)
    call = (a["input"], a["weight"], a["scale"], None, None, (2, 2), (1, 1), (1, 1), 6, 1)
    torch.library.opcheck(torch.ops.fused_ops.conv2d_cpu.default, call)


@NEEDS_KERNELS
def test_opcheck_with_batch_norm():
    a = inputs(out_channels=6, groups=6)
    mean, var = randn(6, seed=8), randn(6, seed=9).abs()
    for extra in ((a["bias"], mean, var, a["scale"], a["shift"]), (None, mean.double(), var, None, None)):
        call = (a["input"], a["weight"], *extra, 1e-3, None, (2, 2), (0, 1, 1, 0), (1, 1), 6, 2)
        torch.library.opcheck(torch.ops.fused_ops.conv_bn_act2d_cpu.default, call)


def test_opcheck_backward():
    a = inputs(residual=(2, 8, 7, 5))
    grads = [randn(2, 8, 7, 5)]
    needs = [True, True, False, True, True, True]
    tensors = [a[key] for key in ("input", "weight", "bias", "scale", "shift", "residual")]
    torch.library.opcheck(torch.ops.fused_ops.conv2d_bwd.default, (grads, tensors, needs, *ONE, 1, "relu"))


def compiled(fn):
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True)


def test_compiled_with_gradients_at_several_batch_sizes():
    a = inputs(requires_grad=True)

    def fn(x, w, b, scale, shift):
        y = fused_ops.conv2d(x, w, b, 1, 1, scale=scale, shift=shift, activation="relu")
        y = fused_ops.max_pool2d(y, 2)
        y = fused_ops.batch_norm_act(y, None, None, training=True, activation="silu")
        return fused_ops.causal_conv1d(y.flatten(2), w[:, 0].flatten(1)[:, :4])

    run = compiled(fn)
    for batch in (2, 3, 5):
        tensors = leaves(
            randn(batch, 6, 9, 8, requires_grad=True), *(a[k] for k in ("weight", "bias", "scale", "shift"))
        )
        got, want = run(*tensors), fn(*tensors)
        assert_accurate(got, want.double(), terms=54)
        mine, theirs = (torch.autograd.grad(y.square().sum(), tensors) for y in (got, want))
        for grad, right in zip(mine, theirs):
            assert_accurate(grad, right.double(), factor=3, terms=4000)


@NEEDS_KERNELS
def test_compiled_cpu_backend_at_several_batch_sizes():
    for groups, kernel in ((1, 1), (6, 3), (1, 3)):
        w, scale = randn(6, 6 // groups, kernel, kernel), randn(6).abs()

        def fn(x, w=w, scale=scale, groups=groups):
            return fused_ops.conv2d(x, w, groups=groups, scale=scale, activation="relu6", backend="cpu")

        run = compiled(fn)
        for batch in (2, 3, 5):
            x = randn(batch, 6, 9, 8)
            assert_accurate(run(x), fn(x).double(), terms=54)
            assert run(x).stride() == fn(x).stride()


def test_compiled_modules():
    x = randn(2, 3, 10, 10)
    chain = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 3), nn.GELU())
    chain(x)
    fused_ops.fuse(chain)
    block = modules.ConvBNAct2d(3, 8, 3)
    for module in (chain, block):
        run = compiled(module)
        run(x).sum().backward()
        assert all(p.grad is not None for p in module.parameters())
        module.eval()
        with torch.no_grad():
            assert_accurate(run(x), module(x).double(), terms=72)


def test_fake_tensors_on_a_gpu_give_shape_and_strides():
    with torch._subclasses.FakeTensorMode():
        x, w = torch.empty(2, 6, 9, 7, device="cuda"), torch.empty(6, 1, 3, 3, device="cuda")
        x = x.to(memory_format=torch.channels_last)
        y = torch.ops.fused_ops.conv2d_cuda(x, w, None, None, None, (2, 2), (1, 1), (1, 1), 6, 0)
        assert y.shape == (2, 6, 5, 4) and y.is_contiguous(memory_format=torch.channels_last) and y.is_cuda
