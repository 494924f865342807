"""Winograd's minimal filtering: 3x3 convolutions of stride 1, channels_last, on the CPU."""

import pytest
import torch
import torch.nn.functional as F

import fused_ops
from fused_ops.conv import op, reference
from fused_ops.core import extension
from tests.conv.oracle import plain
from tests.support import assert_accurate, randn, threads

pytestmark = pytest.mark.skipif(not extension.has_kernel("conv2d_cpu", "CPU"), reason="_C.so was not built")
LANES = (16, 8, 4)
WEIGHTS = {"KCHW": torch.contiguous_format, "KHWC": torch.channels_last}


def last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def kernel(x, w, scale=None, shift=None, residual=None, padding=(1, 1), act=None, lanes=16):
    place = (1, 1), padding, (1, 1), 1
    return torch.ops.fused_ops.conv2d_cpu(x, w, scale, shift, residual, *place, reference.CODES[act], lanes=lanes)


def exact(x, w, scale=None, shift=None, residual=None, padding=(1, 1), act=None):
    if len(padding) == 4:
        top, left, bottom, right = padding
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    wide = [None if t is None else t.double() for t in (x, w, scale, shift, residual)]
    return plain(F.conv2d, *wide[:2], None, (1, 1), padding, (1, 1), 1, *wide[2:], act)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("layout", WEIGHTS)
def test_every_remainder(layout, lanes):
    for batch, channels, out_channels in ((1, 2, 1), (3, 7, 5), (1, 16, 16), (2, 33, 100), (1, 20, 41)):
        for space in ((1, 1), (3, 5), (4, 8), (9, 2)):
            for padding in ((0, 0), (1, 1), (2, 0), (0, 3), (1, 0, 2, 3)):
                size = [n + 2 * p if len(padding) == 2 else n + padding[i] + padding[i + 2]
                        for i, (n, p) in enumerate(zip(space, padding))]  # fmt: skip
                if min(size) < 3:
                    continue
                x = torch.empty(batch, channels, *space, memory_format=torch.channels_last)
                x.copy_(randn(*x.shape))
                w = randn(out_channels, channels, 3, 3, seed=1).contiguous(memory_format=WEIGHTS[layout])
                scale, shift = randn(out_channels, seed=2), randn(out_channels, seed=3)
                residual = last(randn(batch, out_channels, size[0] - 2, size[1] - 2, seed=4))
                call = (x, w, scale, shift, residual, padding)
                got = kernel(*call, act="relu6", lanes=lanes)
                assert got.is_contiguous(memory_format=torch.channels_last)
                assert_accurate(got, exact(*call, act="relu6"), terms=9 * channels + 3)


@pytest.mark.parametrize("count", [1, 2, 3], ids="{} threads".format)
def test_filters_and_tiles_that_are_made_in_several_turns(count):
    x, w = last(randn(1, 512, 9, 8)), last(randn(200, 512, 3, 3, seed=1))
    with threads(count):
        assert_accurate(kernel(x, w), exact(x, w), terms=9 * 512)


@pytest.mark.parametrize("kind", ["normal", "positive", "far from 0", "of many sizes"])
@pytest.mark.parametrize("channels, size", [(16, 32), (64, 28), (256, 14)])
def test_error_is_at_most_twice_that_of_pytorch(channels, size, kind):
    x, w = randn(1, channels, size, size), randn(channels, channels, 3, 3, seed=1)
    x = {"normal": x, "positive": x.relu(), "far from 0": x + 100, "of many sizes": x**5}[kind]
    want = exact(x, w)
    for layout in WEIGHTS.values():
        weight = w.contiguous(memory_format=layout)
        theirs = F.conv2d(last(x), weight, padding=1) - want
        ours = kernel(last(x), weight) - want
        assert ours.norm() <= 2 * theirs.norm()
        assert ours.abs().max() <= 2 * theirs.abs().max()


@pytest.mark.parametrize("lanes", LANES)
def test_reads_no_neighbour(lanes):
    """The images before and after are NaN, and so is what lies around image and weight."""
    x = torch.full((5, 6, 7, 5), float("nan"))
    x[2] = randn(6, 7, 5)
    w = torch.full((21, 45), float("nan"))
    w[1:20] = randn(19, 45, seed=1)
    w = w[1:20].view(19, 5, 3, 3)
    image = x[2:3].permute(0, 3, 1, 2)
    assert_accurate(kernel(image, w, lanes=lanes), exact(image, w), terms=48)
    images = kernel(x[1:4].permute(0, 3, 1, 2), w, lanes=lanes)
    assert torch.equal(images[1:2], kernel(image, w, lanes=lanes))
    assert images[::2].isnan().all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("act", [None, "relu", "relu6"])
def test_what_is_not_finite_is_where_pytorch_has_it(act, lanes):
    x, w = randn(1, 8, 9, 10), randn(6, 8, 3, 3, seed=1)
    x[0, 2, 4, 4], x[0, 3, 7, 1], x[0, 1, 0, 8], x[0, 5, 8, 5] = float("inf"), float("nan"), -float("inf"), 3e38
    w[2, 2] = 0
    w[4, 0, 1, 1] = float("inf")
    got = kernel(last(x), w, act=act, lanes=lanes)
    want = plain(F.conv2d, x, w, None, (1, 1), (1, 1), (1, 1), 1, None, None, None, act)  # overflows as floats do
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isposinf(), want.isposinf()) and torch.equal(got.isneginf(), want.isneginf())
    small = want.abs() < 1e30
    assert_accurate(got[small], want[small].double(), terms=72)


def test_sums_that_overflow_only_on_the_way():
    """d1 + d2 is past the largest float, what the definition sums is not."""
    x, w = torch.full((1, 2, 6, 6), 3e38), torch.zeros(3, 2, 3, 3)
    w[:, :, 1, 1] = torch.tensor([[0.5, 0.25], [0.5, -0.5], [1.0, 0.0]])
    assert torch.equal(kernel(last(x), w), F.conv2d(x, w, padding=1))


@pytest.mark.parametrize(
    "batch, channels, out_channels, size, kind, taken",
    [
        (1, 64, 64, 28, {}, True),
        (1, 64, 64, 28, {"stride": 2}, False),
        (1, 64, 64, 28, {"dilation": 2, "padding": 2}, False),
        (1, 64, 64, 28, {"groups": 2}, False),
        (1, 8, 64, 28, {}, False),
        (1, 16, 16, 56, {}, False),
        (1, 64, 64, 7, {}, False),
        (4, 512, 512, 7, {}, False),
        (8, 512, 512, 7, {}, True),
    ],
    ids=str,
)
def test_auto_takes_it_where_it_is_faster(batch, channels, out_channels, size, kind, taken):
    kind = {"padding": 1, **kind}
    x = last(randn(batch, channels, size, size))
    w = randn(out_channels, channels // kind.get("groups", 1), 3, 3, seed=1)
    with torch.no_grad():
        assert (fused_ops.explain(fused_ops.conv2d, x, w, **kind).chosen == "cpu") is taken
        assert fused_ops.explain(fused_ops.conv2d, x.contiguous(), w, **kind).chosen == "reference"
        got, want = fused_ops.conv2d(x, w, **kind), F.conv2d(x, w, **kind)
    assert got.stride() == want.stride()
    assert torch.equal(got, kernel(x, w) if taken else want)
    assert_accurate(got, F.conv2d(x.double(), w.double(), **kind), terms=9 * channels)


def test_a_chain_is_one_call_without_kept_weights(monkeypatch):
    from fused_ops.conv import kept

    monkeypatch.setattr(kept, "_kept", {})
    chain = torch.nn.Sequential(torch.nn.Conv2d(32, 48, 3, padding=1, bias=False), torch.nn.BatchNorm2d(48),
                                torch.nn.ReLU()).eval().requires_grad_(False)  # fmt: skip
    chain[1].running_mean.normal_(), chain[1].running_var.uniform_(0.5, 2.0)
    x = last(randn(1, 32, 14, 14))
    want = chain.double()(x.double())
    fused_ops.fuse(chain.float().to(memory_format=torch.channels_last))
    assert_accurate(chain(x), want, terms=9 * 32 + 3)
    assert not kept._kept


def test_the_op_is_traced_as_it_runs():
    call = (last(randn(2, 16, 9, 8)), last(randn(20, 16, 3, 3, seed=1)), None, None, None)
    torch.library.opcheck(torch.ops.fused_ops.conv2d_cpu.default, (*call, (1, 1), (1, 1), (1, 1), 1, 1))
    assert op.filtered(*call[:2], (1, 1), (1, 1), (1, 1))
