"""The direct kernel: any other channels_last convolution without groups, on the CPU."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_ops
from fused_ops.conv import kept, op, reference
from fused_ops.core import extension
from tests.conv.oracle import plain
from tests.support import assert_accurate, randn

pytestmark = pytest.mark.skipif(not extension.has_kernel("conv2d_cpu", "CPU"), reason="_C.so was not built")


def last(*shape, seed=0):
    return torch.empty(*shape, memory_format=torch.channels_last).copy_(randn(*shape, seed=seed))


@pytest.mark.parametrize("lanes", (16, 8, 4))
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 2), (7, 7)], ids=str)
def test_every_remainder(size, lanes):
    strides, dilations, pads = ((1, 1), (2, 2), (3, 1)), ((1, 1), (2, 1), (1, 2)), ((0, 0), (3, 3), (1, 0, 2, 3))
    for batch, channels, filters, (height, width) in ((1, 3, 5, (9, 4)), (2, 17, 33, (5, 11)), (1, 8, 100, (3, 3))):
        for stride, dilation, padding in product(strides, dilations, pads):
            top, left, bottom, right = padding if len(padding) == 4 else padding * 2
            wide = F.pad(randn(batch, channels, height, width).double(), (left, right, top, bottom))
            if any(wide.size(i + 2) <= dilation[i] * (size[i] - 1) for i in (0, 1)):
                continue
            x, w = last(batch, channels, height, width), last(filters, channels, *size, seed=1)
            scale, shift = randn(filters, seed=2), randn(filters, seed=3)
            shape = F.conv2d(wide, w.double(), None, stride, 0, dilation).shape
            residual = last(*shape, seed=4)
            call = (x, w, scale, shift, residual, stride, padding, dilation, 1, reference.CODES["relu"])
            got = torch.ops.fused_ops.conv2d_cpu(*call, lanes=lanes)
            given = [t.double() for t in (w, scale, shift, residual)]
            want = plain(F.conv2d, wide, given[0], None, stride, (0, 0), dilation, 1, *given[1:], "relu")
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert_accurate(got, want, terms=w[0].numel() + 3)


@pytest.mark.parametrize("lanes", (16, 8, 4))
@pytest.mark.parametrize("filters", [64, 68], ids="{} filters".format)
def test_an_output_that_no_cache_holds(filters, lanes):
    x, w, residual = last(1, 6, 512, 128), last(filters, 6, 1, 1, seed=1), last(1, filters, 512, 128, seed=2)
    call = (x, w, None, None, residual, (1, 1), (0, 0), (1, 1), 1, reference.CODES["relu"])
    got = torch.ops.fused_ops.conv2d_cpu(*call, lanes=lanes)
    want = plain(F.conv2d, x.double(), w.double(), None, 1, 0, 1, 1, None, None, residual.double(), "relu")
    assert_accurate(got, want, terms=8)


def test_what_is_not_finite_is_where_pytorch_has_it():
    x, w = last(1, 4, 9, 8), last(5, 4, 3, 3, seed=1)
    x[0, :, 4, 4], x[0, 1, 0, 7], x[0, 2, 8, 0] = float("inf"), float("nan"), -float("inf")
    for act in (None, "relu", "relu6"):
        call = (x, w, None, None, None, (2, 2), (1, 1), (1, 1), 1, reference.CODES[act])
        got, want = torch.ops.fused_ops.conv2d_cpu(*call), reference.ACTIVATIONS[act](F.conv2d(x, w, None, 2, 1))
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_channels_last_are_refused():
    with pytest.raises(RuntimeError, match="weight must be channels_last where input is"):
        torch.ops.fused_ops.conv2d_cpu(
            last(1, 4, 9, 8), randn(5, 4, 3, 3), None, None, None, (2, 2), (1, 1), (1, 1), 1, 0
        )


@pytest.mark.parametrize(
    "channels, size, kernel, stride, taken",
    [(64, 28, 3, 2, True), (64, 56, 3, 2, False), (3, 96, 7, 2, True), (3, 224, 7, 2, False), (64, 14, 3, 1, False)],
    ids=str,
)
def test_a_chain_takes_it_where_pixels_are_few(channels, size, kernel, stride, taken, monkeypatch):
    monkeypatch.setattr(kept, "_kept", {})
    conv = nn.Conv2d(channels, 64, kernel, stride, kernel // 2, bias=False)
    chain = nn.Sequential(conv, nn.BatchNorm2d(64), nn.ReLU()).eval().requires_grad_(False)
    chain[1].running_mean.normal_(), chain[1].running_var.uniform_(0.5, 2.0)
    x = last(1, channels, size, size)
    want = chain.double()(x.double())
    fused_ops.fuse(chain.float().to(memory_format=torch.channels_last))
    with fused_ops.use_backend("cpu"):
        assert_accurate(chain(x), want, terms=conv.weight[0].numel() + 3)
    place = (conv.stride, conv.padding, conv.dilation)
    assert op.direct(x, conv.weight, *place) is taken
    assert bool(kept._kept) is not (taken or op.filtered(x, conv.weight, *place))
