"""Convolutions whose folded weights are kept between calls: what they give, and that no write is missed."""

import copy
import gc

import pytest
import torch
from torch import nn

import fused_ops
from fused_ops.conv import kept, op
from fused_ops.core.dispatch import record
from tests.support import assert_accurate, randn, threads

fingerprint = torch.ops.fused_ops.fingerprint_cpu


def test_every_bit_counts():
    for floats in (1, 15, 16, 17, 300):
        t = randn(floats)
        bits = t.view(torch.int32)
        seen = {fingerprint([t])}
        for i in range(floats):
            for bit in (0, 13, 30):
                bits[i] ^= 1 << bit
                seen.add(fingerprint([t]))
                bits[i] ^= 1 << bit
        assert len(seen) == 1 + 3 * floats and fingerprint([t]) in seen


def test_places_lengths_and_borders_count():
    t = randn(64, 700)  # more than one piece
    seen = {fingerprint([t])}
    for change in (t.flip(0).contiguous(), t.flip(1).contiguous(), t.roll(16, 1), t.roll(16 * 1024), t[:-1], -t):
        seen.add(fingerprint([change]))
    seen |= {fingerprint([t[:32], t[32:]]) for _ in range(2)}
    zeros = torch.zeros(100)
    seen |= {fingerprint([zeros[:n]]) for n in (0, 1, 16, 17, 99, 100)}
    assert len(seen) >= 13


def test_threads_and_instruction_sets_agree():
    t = randn(300_001)
    found = set()
    for count in (1, 2):
        with threads(count):
            found |= {fingerprint([t], lanes) for lanes in (4, 8, 16)}
    assert len(found) == 1


class Chain(nn.Module):
    def __init__(self, inputs=8, outputs=16, kernel=3, activation=nn.ReLU, **geometry):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(inputs, outputs, kernel, **geometry)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = activation()
        self.bn.running_mean.copy_(randn(outputs, seed=1))
        self.bn.running_var.copy_(randn(outputs, seed=2).square() + 0.5)
        nn.init.normal_(self.bn.weight), nn.init.normal_(self.bn.bias)
        self.eval().to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def fused(plain):
    model = copy.deepcopy(plain)
    fused_ops.fuse(model)
    return model


def on_the_cpu_backend(model, x):
    with torch.no_grad(), record() as choices:
        value = model(x)
    assert [(choice.op, choice.backend) for choice in choices] == [("conv_bn_act2d", "cpu")]
    return value


def image(*shape, **kwargs):
    return randn(*shape, **kwargs).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "geometry",
    (
        {},
        {"padding": 1, "stride": 2},
        {"kernel": 1, "stride": 2},
        {"kernel": (1, 5), "padding": (0, 2), "dilation": (1, 2)},
        {"groups": 4, "padding": 1, "bias": False},
        {"inputs": 3, "outputs": 5, "kernel": 7, "stride": 2, "padding": 3},
    ),
    ids=str,
)
@pytest.mark.parametrize("activation", (nn.ReLU, nn.SiLU, nn.Identity))
def test_values(geometry, activation):
    plain = Chain(activation=activation, **geometry)
    model, inputs = fused(plain), plain.conv.in_channels
    for shape in ((2, inputs, 13, 10), (1, inputs, 13, 10), (3, inputs, 9, 11)):
        x = image(*shape, seed=sum(shape))
        value = on_the_cpu_backend(model, x)
        wanted = plain(x).detach()
        assert value.stride() == wanted.stride()
        assert_accurate(value, copy.deepcopy(plain).double()(x.double()).detach(), wanted, terms=72)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_nan_and_inf_stay(bad):
    plain, x = Chain(padding=1), image(1, 8, 6, 6)
    x[0, 3, 2, 2] = bad
    value, wanted = on_the_cpu_backend(fused(plain), x), plain(x)
    assert torch.equal(value.isnan(), wanted.isnan()) and torch.equal(value.isinf(), wanted.isinf())


WRITES = {
    "weight.data": lambda m: m.conv.weight.data.mul_(1.5),
    "one element by numpy": lambda m: m.conv.weight.detach().numpy().__setitem__((3, 2, 1, 0), 9.0),
    "two weights exchanged": lambda m: m.conv.weight.data.copy_(m.conv.weight.data.flip(0)),
    "bias": lambda m: m.conv.bias.data.add_(1),
    "running_mean": lambda m: m.bn.running_mean.data.add_(1),
    "running_var": lambda m: m.bn.running_var.data.mul_(2),
    "gamma": lambda m: m.bn.weight.data.neg_(),
    "beta": lambda m: m.bn.bias.data.add_(1),
    "eps": lambda m: setattr(m.bn, "eps", 0.5),
    "no bias": lambda m: setattr(m.conv, "bias", None),
    "stride": lambda m: setattr(m.conv, "stride", (2, 2)),
    "training": lambda m: m.train()(image(4, 8, 9, 9, seed=5)) is m.eval(),
    "another layout": lambda m: m.to(memory_format=torch.contiguous_format),
    "a state dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "a fused optimizer": lambda m: stepped(m, torch.optim.SGD(m.parameters(), lr=0.5, fused=True)),
    "a swap": lambda m: swapped(m),
}


def stepped(model, optimizer):
    model(image(2, 8, 9, 9)).square().sum().backward()
    optimizer.step()


def swapped(model):
    """As torch moves parameters under set_swap_module_params_on_conversion: no reference may be in its way."""
    with torch.no_grad():
        torch.utils.swap_tensors(model.conv.weight, nn.Parameter(model.conv.weight.flip(0) * 2))


@pytest.mark.parametrize("write", WRITES)
def test_no_write_is_missed(write):
    plain, x = Chain(padding=1), image(2, 8, 9, 9)
    model = fused(plain)
    before = on_the_cpu_backend(model, x)
    for each in (plain, model):
        WRITES[write](each)
    value = on_the_cpu_backend(model, x)
    if write != "another layout":
        assert value.shape != before.shape or not torch.allclose(value, before, rtol=1e-3, atol=1e-3)
    assert_accurate(value, copy.deepcopy(plain).double()(x.double()).detach(), plain(x).detach(), terms=72)


def test_kept_weights_are_used_and_die_with_the_weight():
    kept._kept.clear()
    plain, x = Chain(padding=1), image(2, 8, 9, 9)
    model = fused(plain)
    with torch.inference_mode():
        first = model(x)
    (entry,) = kept._kept.values()
    assert entry.weight.dtype == entry.shift.dtype == torch.float32
    assert torch.equal(on_the_cpu_backend(model, x), first)  # made in inference mode, used outside of it
    assert next(iter(kept._kept.values())) is entry
    model(x).sum().backward()
    assert model.conv.weight.grad is not None
    model.bn.running_mean = model.bn.running_mean.clone()
    assert not kept._kept
    on_the_cpu_backend(model, x)
    del model
    gc.collect()
    assert not kept._kept


def test_folds_are_float32_at_least():
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        bn = nn.BatchNorm2d(4).to(dtype)
        nn.init.normal_(bn.weight), bn.running_var.fill_(0.3)
        scale, shift = op.folded(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
        assert scale.dtype == shift.dtype == wanted
        exact = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        torch.testing.assert_close(scale.double(), exact, rtol=1e-6, atol=0)


def test_a_convolution_before_several_batch_norms_is_laid_out_once_for_each(monkeypatch):
    class Shared(Chain):
        def __init__(self):
            super().__init__(padding=1)
            self.other = nn.BatchNorm2d(16).eval()

        def forward(self, x):
            return self.act(self.bn(self.conv(x))) + self.act(self.other(self.conv(x)))

    plain, x, folds, fold = Shared(), image(2, 8, 9, 9), [], kept._fold

    def counted(*args):
        folds.append(args)
        return fold(*args)

    monkeypatch.setattr(kept, "_fold", counted)
    model = fused(plain)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert len(folds) == 2


def test_a_weight_with_gaps():
    plain, x = Chain(padding=1), image(2, 8, 9, 9)
    wide = randn(16, 8, 3, 6)
    plain.conv.weight = nn.Parameter(wide[..., ::2])
    model = fused(plain)
    with torch.no_grad():
        model.conv.weight = nn.Parameter(wide[..., ::2])
        for _ in range(2):
            assert_accurate(model(x), copy.deepcopy(plain).double()(x.double()), plain(x), terms=72)
            wide.mul_(1.5)


def test_images_that_are_not_channels_last_go_there_where_weights_outweigh_them():
    small, large = Chain(64, 64, padding=1), Chain(64, 64, padding=1)
    for model, side, backend in ((small, 4, "cpu"), (large, 40, "reference")):
        model.to(memory_format=torch.contiguous_format)
        mine, x = fused(model), randn(1, 64, side, side)
        with torch.no_grad(), record() as choices:
            value = mine(x)
        assert choices[0].backend == backend and value.is_contiguous()
        assert_accurate(value, copy.deepcopy(model).double()(x.double()).detach(), model(x).detach(), terms=576)


def test_compiled():
    plain, x = Chain(padding=1), image(2, 8, 9, 9)
    run = torch.compile(fused(plain), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            x = image(batch, 8, 9, 9)
            torch.testing.assert_close(run(x), plain(x))


def test_schema():
    plain, x = Chain(padding=1), image(2, 8, 9, 9)
    conv, bn = plain.conv, plain.bn
    tensors = (conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    call = (x, *(t.detach() for t in tensors), bn.eps, None, (1, 1), (1, 1), (1, 1), 1, op.reference.CODES["relu"])
    torch.library.opcheck(torch.ops.fused_ops.conv_bn_act2d_onednn.default, call)
