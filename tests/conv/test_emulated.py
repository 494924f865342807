"""The CUDA depthwise kernel on the CPU: against the float64 oracle, its accesses checked."""

import re

import pytest
import torch
import torch.nn.functional as F

import fused_ops
from tests.conv.oracle import ACTIVATIONS, check_depthwise, check_kernel, inputs, plain
from tests.emulation import every_schedule, needs_emulator, run_on
from tests.emulation.build import build_mutant
from tests.support import assert_accurate, leaves, randn, value_and_gradients

pytestmark = needs_emulator
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@every_schedule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("size", (3, 5, 7))
def test_windows(size, stride, dtype):
    for padding, space in ((0, (9, 11)), (size // 2, (7, 7)), (size, (8, 16))):
        place = ((stride, stride), (padding, padding), (1, 1), 16)
        check_depthwise((size, size), space, place, "relu6", dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", (3, 8))
@pytest.mark.parametrize("kernel", ((3, 3), (2, 4), (1, 5), (4, 1)), ids=str)
def test_any_kernel_stride_and_dilation(kernel, channels, dtype):
    for stride, padding, dilation in (((1, 1), 0, 1), ((1, 1), 2, 2), ((2, 2), 1, 1), ((3, 4), 3, 2)):
        place = (stride, (padding, padding), (dilation, dilation), channels)
        check_depthwise(kernel, (9, 11), place, "silu", dtype, "cpu")


@pytest.mark.parametrize("activation", (None, *ACTIVATIONS))
def test_what_follows_the_sum(activation):
    """Any part of it, and NaN where the input has one."""
    a = inputs(2, 4, 4, (9, 11), (3, 3), 4, residual=(2, 4, 9, 11))
    a["input"][0, :, 4, 4] = float("nan")
    for parts in (("scale", "shift", "residual", "bias"), ("shift",), ("scale", "residual"), ()):
        some = {key: a[key] if key in ("input", "weight", *parts) else None for key in a}
        check_kernel("cuda", some, ((1, 1), (1, 1), (1, 1), 4), activation, torch.channels_last, 9)


def test_a_single_row_and_channels_that_start_anywhere():
    check_depthwise((3, 3), (1, 2), ((1, 1), (1, 1), (1, 1), 8), "gelu", torch.float32, "cpu")
    wide = randn(2, 8, 6, 7).contiguous(memory_format=torch.channels_last)
    x = torch.empty(wide.numel() + 1)[1:].as_strided(wide.shape, wide.stride()).copy_(wide)
    w = randn(8, 1, 3, 3)
    assert x.data_ptr() % 16 == 4
    assert_accurate(
        fused_ops.conv2d(x, w, groups=8, backend="cuda"), F.conv2d(x.double(), w.double(), groups=8), terms=9
    )


def test_gradients():
    a = inputs(channels=8, kernel=(3, 3), groups=8, requires_grad=True)
    tensors = [a[key] for key in ("input", "weight", "bias", "scale", "shift")]

    def fused(x, w, b, s, t):
        x = x.contiguous(memory_format=torch.channels_last)
        return fused_ops.conv2d(x, w, b, groups=8, scale=s, shift=t, activation="silu", backend="cuda")

    def eager(x, w, b, s, t):
        return plain(F.conv2d, x, w, b, 1, 0, 1, 8, s, t, None, "silu")

    _, mine = value_and_gradients(fused, leaves(*tensors))
    _, theirs = value_and_gradients(eager, leaves(*tensors))
    _, exact = value_and_gradients(eager, leaves(*tensors, dtype=torch.float64))
    for got, right, torchs in zip(mine, exact, theirs, strict=True):
        assert_accurate(got, right, torchs, factor=3, terms=256)


def test_opcheck_and_a_compiled_graph():
    x, w = randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last), randn(8, 1, 3, 3)
    place = ((1, 1), (1, 1), (1, 1), 8)
    torch.library.opcheck(torch.ops.fused_ops.conv2d_cuda.default, (x, w, randn(8), None, None, *place, 1))

    def run(x, w):
        return fused_ops.conv2d(x, w, None, *place, activation="relu", backend="cuda") * 2

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x, w), run(x, w))


# What is replaced in depthwise.cuh, and what is said of it.
MUTANTS = {
    "the window is a column off": ("const int j = column - i * STRIDE;", "const int j = column - i * STRIDE - 1;",
                                   "AssertionError: error"),
    "rows above the image are read": ("if (y < 0 || y >= s.height) continue;", "if (y >= s.height) continue;",
                                      r"depthwise_fwd_kernel<float, 4, 3, 1>: .* out of bounds: reads 16 bytes .*"
                                      r"before the start of an input .*depthwise.cuh:\d+"),
}  # fmt: skip
CASE = (
    "import torch; from tests.conv.oracle import check_depthwise;"
    "check_depthwise((3, 3), (9, 11), ((1, 1), (1, 1), (1, 1), 8), None, torch.float32, 'cpu')"
)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_caught(name, tmp_path):
    old, new, said = MUTANTS[name]
    fewer = ("conv/depthwise.cu", "using T = decltype(zero);", "using T = float;")
    library = build_mutant(tmp_path / "build", "conv/depthwise.cu", ("conv/depthwise.cuh", old, new), fewer)
    done = run_on(library, CASE, tmp_path / "package")
    assert done.returncode == 1 and re.search(said, done.stderr), done.stderr


def test_the_same_case_passes_with_the_right_kernel():
    exec(CASE, {})
