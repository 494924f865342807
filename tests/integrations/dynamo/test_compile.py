"""torch.compile(model, backend="fused_ops"): whole models, dynamic sizes, training, options and the listing."""

import logging
from importlib.metadata import PackageNotFoundError, distribution, entry_points

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import cpp_builder, exc

import fused_ops
from fused_ops.integrations import dynamo
from tests.integrations.dynamo.models import BERT, GPT, NEEDS_KERNELS, Attention, Block, compiled, rows
from tests.support import randn


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_one_graph_serves_every_batch_and_length(then, whatever_the_length):
    model, counter = GPT(), CompileCounterWithBackend(then)
    run = compiled(model, counter)
    with dynamo.record() as listings:
        for batch, length in ((2, 7), (3, 9), (5, 33), (4, 16)):
            x = randn(batch, length, 16, requires_grad=True)
            found, wanted = run(x), model(x)
            torch.testing.assert_close(found, wanted)
            leaves = [x, *model.parameters()]
            ours, theirs = (torch.autograd.grad(out.sum(), leaves) for out in (found, wanted))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2  # the sizes of the first call, then any
    assert [row.became for row in rows(listings)] == ["scaled_dot_product_attention"] * 2
    assert rows(listings)[0].place.startswith("attention (models.py:")


@NEEDS_KERNELS
def test_one_graph_serves_images_on_both_sides_of_a_rule():
    block = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), Block(32)).eval()
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(block, counter)
    with torch.no_grad():
        for batch, size in ((2, 3), (3, 4), (2, 2), (5, 24), (8, 40)):
            x = randn(batch, 32, size, size)
            torch.testing.assert_close(run(x), block(x))
    assert counter.frame_count == 2


def test_attention_as_bert_writes_it(whatever_the_length):
    model, x = BERT().eval(), randn(2, 10, 16)
    mask = torch.ones(2, 10)
    mask[0, 6:] = 0
    with torch.no_grad(), dynamo.record() as listings:
        found = compiled(model, "aot_eager")(x, mask)
    (row,) = rows(listings)
    assert row.pattern == "attention (matmul, div, add, softmax, dropout, matmul)" and row.became
    torch.testing.assert_close(found, model(x, mask))


def test_training_goes_as_without(whatever_the_length):
    torch.manual_seed(1)
    models = [nn.Sequential(GPT(), nn.Linear(16, 5)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, losses = randn(3, 12, 16), []
    for model, run in ((models[0], models[0]), (models[1], compiled(models[1], "aot_eager"))):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(4):
            loss = F.cross_entropy(run(x).flatten(0, 1), torch.arange(36) % 5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[3] < losses[0]
    torch.testing.assert_close(losses[4:], losses[:4], rtol=1e-4, atol=1e-5)


@NEEDS_KERNELS
def test_inductor_takes_the_rest(whatever_the_length):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.attention = Block(16), Attention(16)

        def forward(self, x):
            return self.attention(self.block(x).flatten(2).transpose(1, 2))

    model, x = Both().eval(), randn(2, 16, 4, 5)
    run = torch.compile(model, backend=dynamo.backend, options={"then": "inductor", "epilogue_fusion": False})
    with torch.no_grad(), dynamo.record() as listings:
        torch.testing.assert_close(run(x), model(x))
    assert [row.became for row in rows(listings)].count("conv_bn_act2d") == 2
    assert [row.became for row in rows(listings)].count("scaled_dot_product_attention") == 1


def test_the_listing_is_logged_and_printed(whatever_the_length, caplog):
    with caplog.at_level(logging.INFO, "fused_ops.integrations.dynamo"), dynamo.record() as listings:
        compiled(GPT())(randn(2, 6, 16))
    (listing,) = listings
    assert [row.became for row in listing.rewritten] == ["scaled_dot_product_attention"]
    (message,) = [record.getMessage() for record in caplog.records if record.name == "fused_ops.integrations.dynamo"]
    assert str(listing) in message and "handed on to eager" in message
    assert str(listing).splitlines()[0].split() == ["where", "found", "is", "why"]


def test_by_name_through_the_entry_point():
    try:
        distribution("fused_ops")
    except PackageNotFoundError:
        pytest.skip("not installed, so it has no entry points")
    (point,) = entry_points(group="torch_dynamo_backends", name="fused_ops")
    assert point.load() is dynamo.backend
    x = randn(3)
    with dynamo.record() as listings:
        assert torch.equal(torch.compile(torch.sin, backend="fused_ops", options={"then": "eager"})(x), x.sin())
    assert listings == [()]


def test_then_is_another_backend():
    with pytest.raises(Exception, match=r'options\["then"\] must be another backend than fused_ops'):
        compiled(torch.sin, "fused_ops")(randn(3))


def test_without_a_compiler_it_is_eager(monkeypatch, caplog):
    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with caplog.at_level(logging.INFO, "fused_ops.integrations.dynamo"):
        assert torch.compile(torch.sin, backend=dynamo.backend)(randn(3)).shape == (3,)
    assert any("no C++ compiler" in record.getMessage() for record in caplog.records)


def test_what_runs_under_a_transform_is_left_alone(whatever_the_length):
    attention = Attention()
    with dynamo.record() as listings:
        x = randn(2, 3, 6, 16)
        found = compiled(lambda x: torch.vmap(attention)(x))(x)
    assert "torch.func" in rows(listings)[0].reason
    torch.testing.assert_close(found, torch.vmap(attention)(x))


def test_a_backend_asked_for_by_name_decides(whatever_the_length):
    with fused_ops.use_backend("triton"), dynamo.record() as listings:
        compiled(GPT())(randn(2, 6, 16))
    assert [row.became for row in rows(listings)] == [None] and "triton" in rows(listings)[0].reason
