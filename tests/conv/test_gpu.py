"""The GPU kernels, on a GPU."""

import pytest
import torch
import torch.nn.functional as F

import fused_ops
from tests.conv.oracle import ACTIVATIONS, check_depthwise, check_kernel, inputs, plain
from tests.support import assert_accurate, leaves, value_and_gradients

pytestmark = pytest.mark.gpu
TRITON, CUDA = (pytest.mark.kernel(name) for name in ("conv.pointwise.fwd.triton", "conv.depthwise.fwd.cuda"))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


@pytest.fixture(autouse=True)
def _ieee():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@TRITON
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7, 4), (3, 96, 40, 17, 9), (1, 512, 129, 14, 14), (5, 64, 256, 1, 1)], ids=str
)
def test_triton_pointwise(shape, dtype, layout):
    batch, channels, out_channels, *space = shape
    for activation in (None, *ACTIVATIONS):
        a = inputs(batch, channels, out_channels, space, (1, 1), dtype=dtype, device="cuda",
                   residual=(batch, out_channels, *space))  # fmt: skip
        check_kernel("triton", a, (1, 0, 1, 1), activation, LAYOUTS[layout], channels)


@CUDA
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 7, 32, 72])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (2, 4)], ids=str)
def test_cuda_depthwise(kernel, channels, dtype):
    for stride, padding, dilation in ((1, 1, 1), (2, 3, 1), (3, 0, 1), (1, 4, 2)):
        place = ((stride, stride), (padding, padding), (dilation, dilation), channels)
        for activation in ("relu6", "gelu", None):
            check_depthwise(kernel, (15, 18), place, activation, dtype, "cuda")


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=TRITON), pytest.param("cuda", marks=CUDA)])
def test_gradients(backend):
    groups, kernel = (1, 1) if backend == "triton" else (8, 3)
    a = inputs(channels=8, kernel=(kernel, kernel), groups=groups, requires_grad=True)
    tensors = [a[key] for key in ("input", "weight", "bias", "scale", "shift")]

    def fused(x, w, b, s, t):
        x = x.contiguous(memory_format=torch.channels_last)
        return fused_ops.conv2d(x, w, b, groups=groups, scale=s, shift=t, activation="silu", backend=backend)

    def eager(x, w, b, s, t):
        return plain(F.conv2d, x, w, b, 1, 0, 1, groups, s, t, None, "silu")

    _, mine = value_and_gradients(fused, leaves(*tensors, device="cuda"))
    _, theirs = value_and_gradients(eager, leaves(*tensors, device="cuda"))
    _, exact = value_and_gradients(eager, leaves(*tensors, dtype=torch.float64))
    for got, right, torchs in zip(mine, exact, theirs, strict=True):
        assert_accurate(got, right, torchs, factor=3, terms=256)
