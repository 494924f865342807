"""The CPU kernels: C++ 1x1 and depthwise, and oneDNN behind the same op."""

import pytest
import torch
import torch.nn.functional as F

import fused_ops
from fused_ops.conv import op, reference
from fused_ops.core import extension
from tests.conv.oracle import ACTIVATIONS, inputs, plain
from tests.support import assert_accurate, error, randn

pytestmark = pytest.mark.skipif(not extension.has_kernel("conv2d_cpu", "CPU"), reason="_C.so was not built")
LANES = (16, 8, 4)  # AVX-512, AVX2, the compiler's default; a processor without one runs the next


def kernel(x, w, scale, shift, residual, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, act=None, lanes=16):
    code = reference.CODES[act]
    return torch.ops.fused_ops.conv2d_cpu(
        x, w, scale, shift, residual, stride, padding, dilation, groups, code, lanes=lanes
    )


def exact(x, w, scale, shift, residual, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, act=None):
    wide = [None if t is None else t.double() for t in (x, w, scale, shift, residual)]
    return plain(F.conv2d, wide[0], wide[1], None, stride, padding, dilation, groups, *wide[2:], act)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("batch", [1, 3])
def test_pointwise_at_every_remainder(batch, lanes):
    for channels in (1, 7, 33):
        for out_channels in (1, 5, 16, 41):
            for space in ((1, 1), (7, 7), (3, 29), (13, 1)):
                x, w = randn(batch, channels, *space), randn(out_channels, channels, 1, 1, seed=1)
                scale, shift = randn(out_channels, seed=2), randn(out_channels, seed=3)
                residual = randn(batch, out_channels, *space, seed=4)
                call = (x, w, scale, shift, residual)
                assert_accurate(kernel(*call, act="relu6", lanes=lanes), exact(*call, act="relu6"), terms=channels + 3)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)], ids=str)
def test_pointwise_channels_last_at_every_remainder(stride, lanes):
    for batch in (1, 3):
        for channels in (1, 7, 33):
            for out_channels in (1, 5, 16, 41, 100):
                for space in ((1, 1), (7, 7), (3, 29), (13, 1)):
                    x = randn(batch, channels, *space).to(memory_format=torch.channels_last)
                    w = randn(out_channels, channels, 1, 1, seed=1)
                    scale, shift = randn(out_channels, seed=2), randn(out_channels, seed=3)
                    y = F.conv2d(x, w, None, stride)
                    call = (x, w, scale, shift, torch.empty_like(y).copy_(randn(*y.shape, seed=4)), stride)
                    if not op.vectorised(
                        x, w, stride, (0, 0), (1, 1), 1
                    ):  # laid out as a contiguous one is, with a stride
                        continue
                    got = kernel(*call, act="relu6", lanes=lanes)
                    assert got.stride() == y.stride()
                    assert_accurate(got, exact(*call, act="relu6"), terms=channels + 3)


def test_pointwise_channels_last_reads_no_neighbour():
    """All pixels but one row are NaN, and so is what lies around the weights."""
    x = torch.full((1, 5, 6, 7), float("nan")).to(memory_format=torch.channels_last)
    x[:, :, 2] = randn(5, 7)
    w = torch.full((21, 5), float("nan"))
    w[1:20] = randn(19, 5, seed=1)
    w = w[1:20].view(19, 5, 1, 1)
    got = kernel(x, w, None, None, None)[:, :, 2]
    assert_accurate(got, exact(x, w, None, None, None)[:, :, 2], terms=8)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [(1, 2), (3, 3), (5, 5), (4, 7)], ids=str)
def test_depthwise_at_every_remainder(kernel_size, stride, lanes):
    for padding in (0, 1, 3):
        for dilation in (1, 2, 3):
            for space in ((9, 13), (17, 40)):
                if any(n + 2 * padding < dilation * (k - 1) + 1 for n, k in zip(space, kernel_size)):
                    continue
                x, w = randn(2, 3, *space), randn(3, 1, *kernel_size, seed=1)
                scale, shift = randn(3, seed=2), randn(3, seed=3)
                place = ((stride, stride), (padding, padding), (dilation, dilation), 3)
                residual = randn(*F.conv2d(x, w, None, *place).shape, seed=4)
                call = (x, w, scale, shift, residual, *place)
                got = kernel(*call, act="relu", lanes=lanes)
                assert_accurate(got, exact(*call, act="relu"), terms=w[0].numel() + 3)


def test_reach_past_the_image_reads_no_neighbour():
    """Every plane but one is NaN: a kernel that reads outside its plane shows it."""
    x = torch.full((1, 3, 8, 8), float("nan"))
    x[:, 1] = randn(8, 8)
    w = randn(3, 1, 5, 5)
    for stride in (1, 2, 3):
        place = ((stride, stride), (2, 2), (1, 1), 3)
        got = kernel(x, w, None, None, None, *place)[:, 1]
        assert_accurate(got, exact(x, w, None, None, None, *place)[:, 1], terms=25)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", ["1x1", "depthwise", "3x3"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_pass_through_as_in_torch(activation, shape, backend):
    channels, groups, size = 8, (8 if shape == "depthwise" else 1), (1 if shape == "1x1" else 3)
    x, w = randn(1, channels, 9, 9), randn(8, channels // groups, size, size)
    x[0, :, 0, 0], x[0, :, 4, 4], x[0, :, 8, 8] = float("nan"), float("inf"), -float("inf")
    for residual in (None, randn(1, 8, 10 - size, 10 - size)):
        got = fused_ops.conv2d(x, w, groups=groups, activation=activation, residual=residual, backend=backend)
        y = F.conv2d(x, w, groups=groups)
        want = reference.ACTIVATIONS[activation](y if residual is None else y + residual)
        assert torch.equal(got.isnan(), want.isnan())
        assert_accurate(got[~got.isnan()], want[~want.isnan()].double(), terms=72)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_cpu_backend_is_the_definition(activation, groups, layout):
    a = inputs(out_channels=12, groups=groups, residual=(2, 12, 5, 4))
    place = ((2, 2), (1, 1), (1, 1), groups)
    x, w = (a[key].to(memory_format=layout) for key in ("input", "weight"))
    for residual in (None, a["residual"], a["residual"][:, :, :1]):
        for bias, scale, shift in (
            (a["bias"], a["scale"], a["shift"]),
            (None, None, a["shift"]),
            (a["bias"], None, None),
        ):
            got = fused_ops.conv2d(x, w, bias, *place, scale=scale, shift=shift, residual=residual,
                                   activation=activation, backend="cpu")  # fmt: skip
            wide = [None if t is None else t.double() for t in (x, w, bias, scale, shift, residual)]
            want = plain(F.conv2d, *wide[:3], *place, *wide[3:], activation)
            assert_accurate(got, want, terms=60)


def test_conv1d_on_the_cpu_backend():
    for groups, kernel_size, padding in ((1, 1, 0), (6, 4, 3), (1, 3, 1)):
        x, w, b = randn(2, 6, 31), randn(6, 6 // groups, kernel_size), randn(6)
        got = fused_ops.conv1d(x, w, b, 1, padding, 1, groups, scale=b.abs(), activation="relu", backend="cpu")
        want = plain(F.conv1d, x.double(), w.double(), b.double(), 1, padding, 1, groups, b.abs().double(), None, None,
                     "relu")  # fmt: skip
        assert_accurate(got, want, terms=20)
        assert got.stride() == F.conv1d(x, w, b, 1, padding, 1, groups).stride()


def chain(seed=0, channels=6, out_channels=9, kernel_size=1, groups=1, dtype=torch.float32):
    """input, weight, bias, running_mean, running_var, bn_weight, bn_bias; the last five in `dtype`."""
    x, w = randn(2, channels, 11, 13, seed=seed), randn(out_channels, channels // groups, kernel_size, kernel_size)
    bias, mean, weight, shift = (randn(out_channels, seed=seed + i, dtype=dtype) for i in range(4))
    return x, w, bias, mean, randn(out_channels, seed=9, dtype=dtype).abs(), weight, shift


def normalised(x, w, bias, mean, var, weight, shift, eps, residual, place, act):
    """The definition, in float64."""
    wide = [None if t is None else t.double() for t in (x, w, bias, mean, var, weight, shift, residual)]
    y = F.batch_norm(F.conv2d(*wide[:3], *place), *wide[3:7], False, 0.0, eps)
    y = y if residual is None else y + wide[7]
    return reference.ACTIVATIONS[act](y)


def fold_in_kernel(x, w, bias, mean, var, weight, shift, eps, residual, place, act, lanes=16):
    code = reference.CODES[act]
    return torch.ops.fused_ops.conv_bn_act2d_cpu(
        x, w, bias, mean, var, weight, shift, eps, residual, *place, code, lanes
    )


POINTWISE, DEPTHWISE = ((1, 1), (0, 0), (1, 1), 1), ((2, 1), (1, 2), (1, 1), 6)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("absent", ([], [2], [5], [6], [2, 5, 6]), ids=str)
def test_the_kernels_fold_batch_norm_as_its_definition(absent, lanes):
    for place, shape in ((POINTWISE, {}), (DEPTHWISE, dict(out_channels=6, kernel_size=3, groups=6))):
        tensors = [None if i in absent else t for i, t in enumerate(chain(**shape))]
        clean = F.conv2d(*tensors[:3], *place)
        for eps in (1e-5, 0.3):
            for residual in (None, randn(*clean.shape, seed=5)):
                call = (*tensors, eps, residual, place, "relu6")
                assert_accurate(fold_in_kernel(*call, lanes=lanes), normalised(*call), terms=24)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_statistics_of_other_types_and_strides_are_folded_in_float32(dtype):
    tensors = chain(dtype=dtype)
    call = (*tensors, 1e-3, None, POINTWISE, "relu")
    assert_accurate(fold_in_kernel(*call), normalised(*call), terms=24)
    x, w, *rest = chain()
    spaced = [torch.stack([t, torch.full_like(t, float("nan"))], 1)[:, 0] for t in rest]
    same = [t[:1].expand(9) for t in rest]
    for parts in (spaced, same):
        call = (x, w, *parts, 1e-3, None, POINTWISE, "relu")
        assert_accurate(fold_in_kernel(*call), normalised(*call), terms=24)


@pytest.mark.parametrize("broken", range(1, 7))
def test_nan_and_infinity_in_one_channel_stay_in_it_as_in_torch(broken):
    for value in (float("nan"), float("inf")):
        tensors = [t.clone() for t in chain()]
        tensors[broken][4] = value
        call = (*tensors, 1e-5, None, POINTWISE, "relu")
        got, want = fold_in_kernel(*call), normalised(*call)
        if broken == 4 and value == float("inf"):  # 1 / sqrt(inf) is 0: what is left is the shift
            assert_accurate(got, want, terms=24)
        assert torch.equal(got.isfinite().all((0, 2, 3)), want.isfinite().all((0, 2, 3)))
        others = [c for c in range(9) if c != 4]
        assert_accurate(got[:, others], want[:, others], terms=24)


def test_every_path_of_a_chain_agrees_with_the_reference():
    """What the C++ kernels take, what oneDNN takes, every activation, residuals that broadcast."""
    shapes = (
        (POINTWISE, {}),
        (DEPTHWISE, dict(out_channels=6, kernel_size=3, groups=6)),
        (((1, 1), (1, 1), (1, 1), 1), dict(kernel_size=3)),
    )
    for place, shape in shapes:
        x, w, bias, mean, var, weight, shift = chain(**shape)
        for residual in (None, randn(w.size(0), 1, 1), randn(1, dtype=torch.float64)):
            for activation in (None, *ACTIVATIONS):
                call = (mean, var, weight, shift, 1e-3, residual, activation)
                with torch.no_grad():
                    got = op.conv_bn_act2d_cpu(x, w, bias, *place, *call)
                want = normalised(x, w, bias, mean, var, weight, shift, 1e-3, residual, place, activation)
                assert_accurate(got, want, terms=64)


def test_bad_statistics_to_the_raw_op_raise():
    tensors = chain()
    for broken in range(2, 7):
        wrong = [t[:8] if i == broken else t for i, t in enumerate(tensors)]
        with pytest.raises(RuntimeError, match="has the wrong shape"):
            fold_in_kernel(*wrong, 1e-5, None, POINTWISE, None)


def test_auto_takes_the_cpu_kernels_without_gradients_only():
    a = inputs(space=(64, 48), kernel=(1, 1))
    explained = fused_ops.explain(fused_ops.conv2d, a["input"], a["weight"], scale=a["scale"], activation="relu6")
    assert explained.chosen == "cpu"
    for left in (dict(activation="relu"), dict(scale=a["scale"], input=a["input"][:, :, :2])):
        assert (
            fused_ops.explain(fused_ops.conv2d, **{**dict(input=a["input"], weight=a["weight"]), **left}).chosen
            == "reference"
        )
    a["weight"].requires_grad_()
    call = (fused_ops.conv2d, a["input"], a["weight"])
    assert fused_ops.explain(*call, scale=a["scale"]).chosen == "reference"
    with torch.no_grad():
        assert fused_ops.explain(*call, scale=a["scale"]).chosen == "cpu"


def test_the_comparison_rejects_wrong_kernels():
    """Mutants: shift before scale, a flipped filter, the residual after the activation, a lost last channel."""
    x, w = randn(2, 5, 9, 8), randn(5, 1, 3, 3)
    scale, shift, residual = randn(5, seed=2), randn(5, seed=3), randn(2, 5, 7, 6, seed=4)
    call = (x, w, scale, shift, residual, (1, 1), (0, 0), (1, 1), 5)
    right = exact(*call, act="relu")
    per_channel = [t.view(-1, 1, 1) for t in (scale, shift)]
    mutants = {
        "shift before scale": F.relu((F.conv2d(x, w, groups=5) + per_channel[1]) * per_channel[0] + residual),
        "flipped filter": kernel(x, w.flip(3).contiguous(), *call[2:], act="relu"),
        "residual after activation": kernel(*call[:4], None, *call[5:], act="relu") + residual,
        "last column lost": kernel(*call, act="relu").index_fill(3, torch.tensor([5]), 0.0),
    }
    assert_accurate(kernel(*call, act="relu"), right, terms=12)
    for name, wrong in mutants.items():
        assert error(wrong, right) > 1e-2, name
        with pytest.raises(AssertionError):
            assert_accurate(wrong, right, terms=12)


def test_bad_arguments_to_the_raw_op_raise():
    x, w = randn(1, 4, 5, 5), randn(4, 1, 3, 3)
    place = ((1, 1), (0, 0), (1, 1), 4)
    for bad in ((x.double(), w, None), (x, w, randn(3)), (x.transpose(2, 3), w, None), (x, randn(4, 2, 3, 3), None)):
        with pytest.raises(RuntimeError):
            kernel(*bad, None, None, *place)
    with pytest.raises(RuntimeError, match="1x1 or depthwise"):
        kernel(x, randn(4, 4, 3, 3), None, None, None)


def test_output_format_agrees_with_torch():
    for shape in ((2, 4, 5, 3), (1, 4, 1, 1), (2, 1, 5, 3), (1, 1, 1, 1), (2, 4, 1, 3)):
        x, w = randn(*shape), randn(3, shape[1], 1, 1)
        for image in (x, x.to(memory_format=torch.channels_last)):
            for weight in (w, w.to(memory_format=torch.channels_last)):
                out = F.conv2d(image, weight)
                layout = op.output_format(image, weight)
                assert torch.empty(out.shape, memory_format=layout).stride() == out.stride()
