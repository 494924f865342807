"""conv1d and conv2d: what they compute, their derivatives, layouts, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

import fused_ops
from tests.conv.oracle import ACTIVATIONS, check, inputs, plain
from tests.support import assert_accurate, noncontiguous, randn

GEOMETRIES = {
    "default": {},
    "strided": dict(stride=2),
    "stride-above-kernel": dict(stride=(4, 5), padding=1),
    "padded-dilated": dict(padding=(2, 3), dilation=2),
    "dilated-strided": dict(stride=2, dilation=(2, 3), padding=3),
    "same-even-kernel": dict(padding="same", kernel=(2, 4)),
    "same": dict(padding="same", dilation=2),
    "valid-1xk": dict(padding="valid", kernel=(1, 5)),
    "grouped": dict(groups=2),
    "depthwise-multiplier-2": dict(groups=6, out_channels=12, padding=1),
    "kernel-fills-padded-input": dict(kernel=(11, 9), padding=1),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv2d_is_its_definition_with_every_gradient(name):
    geometry = dict(GEOMETRIES[name])
    make = {key: geometry.pop(key) for key in ("kernel", "out_channels") if key in geometry}
    arguments = inputs(**make, groups=geometry.get("groups", 1), requires_grad=True)
    place = [geometry.get(key, default) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    place.append(geometry.get("groups", 1))
    out = F.conv2d(arguments["input"], arguments["weight"], None, *place)
    residual = randn(*out.shape, seed=9, requires_grad=True)

    def fused(x, w, b, scale, shift, residual):
        return fused_ops.conv2d(x, w, b, *place, scale=scale, shift=shift, residual=residual, activation="silu")

    def eager(x, w, b, scale, shift, residual):
        return plain(F.conv2d, x, w, b, *place, scale, shift, residual, "silu")

    tensors = [arguments[key] for key in ("input", "weight", "bias", "scale", "shift")]
    check(fused, eager, [*tensors, residual], terms=arguments["weight"][0].numel())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    tensors = list(inputs(requires_grad=True).values())

    def run(f):
        return lambda x, w, b, s, t, r: f(x, w, b, 1, 0, 1, 1, s, t, r, activation)

    def fused(x, w, b, stride, padding, dilation, groups, s, t, r, a):
        return fused_ops.conv2d(x, w, b, scale=s, shift=t, residual=r, activation=a)

    check(run(fused), run(lambda *call: plain(F.conv2d, *call)), tensors, terms=54)


@pytest.mark.parametrize("shape", [(2, 4, 17), (4, 17), (0, 4, 17), (3, 4, 5)], ids=str)
def test_conv1d_batched_and_not(shape):
    x, w, b = randn(*shape, requires_grad=True), randn(6, 4, 5, requires_grad=True), randn(6, requires_grad=True)

    def fused(x, w, b):
        return fused_ops.conv1d(x, w, b, 2, 1, scale=b, activation="relu")

    check(fused, lambda x, w, b: plain(F.conv1d, x, w, b, 2, 1, 1, 1, b, None, None, "relu"), [x, w, b], terms=20)


def test_unbatched_conv2d_and_broadcast_residual():
    a = inputs()
    for residual in (randn(8, 1, 1), randn(1, 5), randn()):
        got = fused_ops.conv2d(a["input"][0], a["weight"], residual=residual)
        want = F.conv2d(a["input"][0].double(), a["weight"].double()) + residual.double()
        assert_accurate(got, want, terms=54)


def strides_that_matter(tensor):
    return [step for step, size in zip(tensor.stride(), tensor.shape) if size > 1]


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_output_has_the_strides_of_torchs_op(backend):
    for shape, kernel in (
        ((2, 6, 9, 7), 3),
        ((2, 6, 1, 1), 1),
        ((1, 1, 5, 4), 1),
        ((2, 6, 1, 8), 1),
        ((2, 6, 9, 7), 1),
    ):
        x, w, scale = randn(*shape), randn(shape[1], shape[1], kernel, kernel), randn(shape[1]).abs()
        for image in (x, x.to(memory_format=torch.channels_last), noncontiguous(x), x.transpose(2, 3)):
            for weight in (w, w.to(memory_format=torch.channels_last)):
                for groups in (1, shape[1]):
                    weight = weight if groups == 1 else weight[:, :1]
                    got = fused_ops.conv2d(
                        image,
                        weight,
                        groups=groups,
                        padding=kernel // 2,
                        scale=scale,
                        activation="relu",
                        backend=backend,
                    )
                    want = F.conv2d(image, weight, groups=groups, padding=kernel // 2)
                    assert strides_that_matter(got) == strides_that_matter(want), (image.stride(), weight.stride())
                    assert_accurate(got, (want.double() * scale.view(-1, 1, 1).double()).relu(), terms=64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_round_once_after_the_epilogue(dtype):
    a = inputs(dtype=dtype)
    scale, shift = a["scale"].float() * 1.37, a["shift"].float()
    got = fused_ops.conv2d(a["input"], a["weight"], scale=scale, shift=shift, activation="relu")
    assert got.dtype is dtype
    wide = [t.double() for t in (a["input"], a["weight"])]
    exact = plain(F.conv2d, *wide, None, 1, 0, 1, 1, scale.double(), shift.double(), None, "relu")
    eager = plain(F.conv2d, a["input"], a["weight"], None, 1, 0, 1, 1, scale.to(dtype), shift.to(dtype), None, "relu")
    assert_accurate(got, exact, eager)


def test_twice_differentiable_in_every_argument():
    for groups in (1, 4):
        a = inputs(1, 4, 4, (4, 3), (2, 2), groups, dtype=torch.float64, requires_grad=True, residual=(1, 4, 5, 4))

        def fn(x, w, b, scale, shift, residual, groups=groups):
            return fused_ops.conv2d(
                x, w, b, 1, 1, 1, groups, scale=scale, shift=shift, residual=residual, activation="gelu"
            )

        assert torch.autograd.gradcheck(fn, list(a.values()), fast_mode=True)
        assert torch.autograd.gradgradcheck(fn, list(a.values()), fast_mode=True)


@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "scale", "shift", "residual"])
def test_a_gradient_asked_for_alone(wanted):
    a = inputs(residual=(2, 8, 7, 5))
    a[wanted].requires_grad_()
    out = fused_ops.conv2d(**a, activation="relu6")
    out.sum().backward()
    assert a[wanted].grad.abs().sum() > 0
    assert all(t.grad is None for name, t in a.items() if name != wanted)


def test_autocast_gives_what_torch_gives_inside_it():
    a = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got = fused_ops.conv2d(a["input"], a["weight"], a["bias"], scale=a["scale"], activation="relu")
        want = F.conv2d(a["input"], a["weight"], a["bias"])
    assert got.dtype is want.dtype is torch.bfloat16
    assert_accurate(got, (want.double() * a["scale"].double().view(-1, 1, 1)).relu())


ERRORS = {
    "input-rank": (dict(input=randn(4, 4)), "input", r"Expected 3D \(unbatched\) or 4D \(batched\) input to conv2d"),
    "weight-rank": (dict(weight=randn(8, 6, 3)), "weight", "4-dimensional"),
    "channels": (dict(input=randn(2, 5, 9, 9)), "input", "to have 6 channels, but got 5 channels instead"),
    "groups": (dict(groups=0), "groups", "non-positive groups is not supported"),
    "indivisible": (dict(weight=randn(7, 3, 3, 3), bias=None, groups=2), "weight", "divisible by 2 at dimension 0"),
    "bias": (dict(bias=randn(3)), "bias", "expected bias to be 1-dimensional with 8 elements"),
    "stride": (dict(stride=0), "stride", "non-positive stride is not supported"),
    "strides": (dict(stride=(1, 2, 3)), "stride", "expected stride to be a single integer value or a list of 2 values"),
    "dilation": (dict(dilation=0), "dilation", "non-positive dilation is not supported"),
    "padding": (dict(padding=-1), "padding", "negative padding is not supported"),
    "padding-word": (dict(padding="sam"), "padding", "Invalid padding string: 'sam'"),
    "padding-same": (dict(padding="same", stride=2), "padding", "not supported for strided convolutions"),
    "too-big": (dict(input=randn(2, 6, 9, 2)), "weight", r"Calculated padded input size per channel: \(9 x 2\)"),
    "dtype": (dict(weight=randn(8, 6, 3, 3).half()), "weight", "should be the same"),
    "scale": (dict(scale=randn(7)), "scale", r"of shape \(8,\)"),
    "residual": (dict(residual=randn(2, 8, 9, 7)), "residual", r"broadcastable to the output \(2, 8, 7, 5\)"),
    "enlarging-residual": (dict(residual=randn(3, 2, 8, 7, 5)), "residual", "broadcastable"),
    "activation": (dict(activation="swish"), "activation", "None or one of relu"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_arguments_are_named(name):
    bad, argument, said = ERRORS[name]
    with pytest.raises(ValueError, match=said) as caught:
        fused_ops.conv2d(**{**inputs(), **bad})
    assert str(caught.value).startswith(f"{argument} must be")
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    "bad", [dict(input=[1.0]), dict(weight=None), dict(stride="a"), dict(groups=1.5), dict(padding=1.5), dict(bias=3)]
)
def test_bad_types_are_named(bad):
    with pytest.raises(TypeError, match=rf"^{next(iter(bad))} must be"):
        fused_ops.conv2d(**{**inputs(), **bad})


def test_a_backend_by_name_serves_or_says_why():
    a = inputs()
    with pytest.raises(fused_ops.BackendUnavailable, match="takes float32"):
        fused_ops.conv2d(a["input"].double(), a["weight"].double(), backend="cpu")
    with pytest.raises(fused_ops.BackendUnavailable, match="has no gradient"):
        fused_ops.conv2d(a["input"].requires_grad_(), a["weight"], backend="cpu")
    with pytest.raises(fused_ops.BackendUnavailable, match="GPU"):
        fused_ops.conv2d(a["input"], a["weight"], backend="cuda")


def test_functorch_transforms_run_on_reference():
    a = inputs()
    batch = torch.stack([a["input"], a["input"] * 2])
    got = torch.func.vmap(lambda x: fused_ops.conv2d(x, a["weight"], scale=a["scale"], activation="relu"))(batch)
    want = torch.stack([fused_ops.conv2d(x, a["weight"], scale=a["scale"], activation="relu") for x in batch])
    assert_accurate(got, want.double(), terms=54)
    derivative = torch.func.grad(lambda w: fused_ops.conv2d(a["input"], w, activation="tanh").sum())(a["weight"])
    assert derivative.abs().sum() > 0
