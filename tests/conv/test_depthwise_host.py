"""The body and index maps of the CUDA depthwise kernel, compiled for the host and run thread by thread."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_ops.conv import reference
from tests.conv.oracle import ACTIVATIONS, plain
from tests.support import assert_accurate, randn

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(scope="module")
def depthwise(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None or not CSRC.is_dir():
        pytest.skip("needs a C++ compiler and the sources")
    library = tmp_path_factory.mktemp("depthwise") / "depthwise.so"
    source = Path(__file__).with_name("depthwise_host.cpp")
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library)).depthwise

    def run(x, w, scale, shift, residual, stride, padding, dilation, activation, vector, window):
        batch, channels, height, width = x.shape
        size = F.conv2d(x, w, None, stride, padding, dilation, channels).shape
        out = torch.full((batch, *size[2:], channels), float("nan"))
        rows = x.permute(0, 2, 3, 1).contiguous()
        taps = w.flatten(1).t().contiguous()
        other = None if residual is None else residual.permute(0, 2, 3, 1).contiguous()
        tensors = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (rows, taps, scale, shift, other, out)]
        sizes = (ctypes.c_int64 * 6)(batch, channels, height, width, *size[2:])
        geometry = (ctypes.c_int * 8)(*w.shape[2:], *stride, *padding, *dilation)
        assert loaded(*tensors, sizes, geometry, reference.CODES[activation], vector, window) == 0
        return out.permute(0, 3, 1, 2)

    return run


def call(kernel, stride, padding, dilation, channels, space=(9, 11), batch=2):
    x, w = randn(batch, channels, *space), randn(channels, 1, *kernel)
    place = ((stride, stride + 1 if stride > 2 else stride), (padding, padding), (dilation, dilation))
    residual = randn(*F.conv2d(x, w, None, *place, channels).shape, seed=4)
    return x, w, randn(channels, seed=2), randn(channels, seed=3), residual, *place


def exact(x, w, scale, shift, residual, stride, padding, dilation, activation):
    wide = [None if t is None else t.double() for t in (x, w, scale, shift, residual)]
    return plain(F.conv2d, *wide[:2], None, stride, padding, dilation, x.size(1), *wide[2:], activation)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5, 7])
def test_window_variants(depthwise, size, stride):
    for padding in (0, size // 2, size):
        for space in ((9, 11), (7, 7), (8, 16)):
            case = call((size, size), stride, padding, 1, 8, space)
            assert_accurate(depthwise(*case, "relu6", 4, size), exact(*case, "relu6"), terms=size * size)


@pytest.mark.parametrize("vector", [1, 4])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5), (4, 1)], ids=str)
def test_generic_variant(depthwise, kernel, vector):
    for stride, padding, dilation in ((1, 0, 1), (1, 2, 2), (2, 1, 1), (3, 3, 2)):
        case = call(kernel, stride, padding, dilation, 4 if vector == 4 else 3)
        assert_accurate(depthwise(*case, "silu", vector, 0), exact(*case, "silu"), terms=16)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_epilogue(depthwise, activation):
    x, w, scale, shift, residual, *place = call((3, 3), 1, 1, 1, 4)
    x[0, :, 4, 4] = float("nan")
    for parts in ((scale, shift, residual), (None, shift, None), (scale, None, residual), (None, None, None)):
        got, want = depthwise(x, w, *parts, *place, activation, 4, 3), exact(x, w, *parts, *place, activation)
        assert torch.equal(got.isnan(), want.isnan())
        assert_accurate(got, want, terms=9)


def test_the_comparison_rejects_a_wrong_window(depthwise):
    """A mutant: the window kernel told the wrong padding."""
    x, w, scale, shift, residual, *place = call((3, 3), 1, 1, 1, 4)
    wrong = depthwise(x.roll(1, 3), w, scale, shift, residual, *place, None, 4, 3)
    with pytest.raises(AssertionError):
        assert_accurate(wrong, exact(x, w, scale, shift, residual, *place, None), terms=9)
