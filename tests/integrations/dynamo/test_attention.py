"""Attention written by hand under torch.compile(backend="fused_ops"): what is rewritten, what is not, equal numbers.

Many ways to write it are compiled as one graph, which gives one row for each.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fused_ops.integrations import dynamo
from fused_ops.integrations.dynamo import attention as rewriting
from tests.integrations.dynamo.models import any_length
from tests.integrations.dynamo.ways import (
    CAUSAL,
    HEADS,
    LOWEST,
    WRITTEN,
    float32_softmax,
    heads_joined,
    lower_equals_zero,
    matmul_div,
    scores,
    tensors,
)
from tests.support import randn


def run(written: dict | tuple, inputs: list[Tensor], then: str = "eager") -> SimpleNamespace:
    """Functions compiled as one graph: their rows, their results, and what they give by themselves."""

    def together(*inputs):
        return [function(*inputs) for function in written]

    with dynamo.record() as listings:
        found = torch.compile(together, backend=dynamo.backend, options={"then": then}, fullgraph=True)(*inputs)
    wanted = [function(*inputs) for function in written]
    (listing,) = listings
    assert len(listing) == len(written), listing
    rows, found, wanted = (dict(zip(written, part)) for part in (listing, found, wanted))
    return SimpleNamespace(rows=rows, found=found, wanted=wanted)


def name(function) -> str:
    return function.__name__


@pytest.fixture(scope="module")
def rewritten():
    inputs = tensors(rows=12, columns=15, requires_grad=True)
    with any_length():
        return SimpleNamespace(inputs=inputs[:3], **vars(run(WRITTEN, inputs)))


@pytest.mark.parametrize("written", WRITTEN, ids=name)
def test_rewritten_with_equal_values_gradients_and_strides(written, rewritten):
    row, found, wanted = (part[written] for part in (rewritten.rows, rewritten.found, rewritten.wanted))
    assert (row.became, row.reason) == ("scaled_dot_product_attention", "runs on reference")
    torch.testing.assert_close(found, wanted)
    assert found.stride() == wanted.stride()
    weights = randn(*wanted.shape, seed=5)
    ours, theirs = (
        torch.autograd.grad(out, rewritten.inputs, weights, retain_graph=True, materialize_grads=True)
        for out in (found, wanted)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_traced_by_aotautograd(whatever_the_length):
    inputs = tensors(requires_grad=True)
    result = run(WRITTEN, inputs, then="aot_eager")
    assert all(row.became for row in result.rows.values())
    torch.testing.assert_close(result.found, result.wanted)
    ours, theirs = (
        torch.autograd.grad(sum(out.square().sum() for out in part.values()), inputs[:3])
        for part in (result.found, result.wanted)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_triangle_made_by_the_graph_is_told_as_causal(whatever_the_length, monkeypatch):
    told = []

    def attend(query, key, value, factors, steps, **how):
        told.append((steps, how["is_causal"]))
        return torch.zeros(())

    monkeypatch.setattr(rewriting, "attend", attend)
    monkeypatch.setattr(rewriting.read, "explained", lambda *call: SimpleNamespace(chosen="reference"))
    run(CAUSAL, tensors())
    assert told == [((), True)] * len(CAUSAL)


def triangle_shuffled(q, k, v, seen):
    lower = torch.ones(12, 12).tril()[torch.arange(11, -1, -1)]
    return scores(q, k).masked_fill(lower == 0, -1e9).softmax(-1) @ v


def second_diagonal(q, k, v, seen):
    return scores(q, k).masked_fill(torch.ones(12, 12).triu(2).bool(), -1e9).softmax(-1) @ v


def inverted_numbers(q, k, v, seen):
    return scores(q, k).masked_fill((~torch.ones(12, 12, dtype=torch.int).tril()).bool(), -1e9).softmax(-1) @ v


def test_what_looks_like_a_triangle_stays_a_mask(whatever_the_length):
    result = run((triangle_shuffled, second_diagonal, inverted_numbers), tensors())
    assert all(row.became for row in result.rows.values())
    torch.testing.assert_close(result.found, result.wanted)


def added(q, k, v, seen):
    return (scores(q, k) + torch.where(seen, 0.0, LOWEST)).softmax(-1) @ v


def added_to(q, k, v, seen):
    return ((1.0 - seen.float()) * -10000.0 + scores(q, k)).softmax(-1) @ v


def subtracted(q, k, v, seen):
    return (scores(q, k) - 1e4 * (~seen).float()).softmax(-1) @ v


def hidden_then_added(q, k, v, seen):
    weights = torch.where(seen, scores(q, k), LOWEST)
    return (weights + torch.where(seen[:, :, 5:6], 0.0, LOWEST)).softmax(-1) @ v


def one_bias_for_all(q, k, v, seen):
    return (scores(q, k) + seen[1, 0].float()).softmax(-1) @ v


ADDED = (added, added_to, subtracted, hidden_then_added, one_bias_for_all)


def test_added_masks_in_inference(whatever_the_length):
    result = run(ADDED, tensors(12, 700))  # more keys than PyTorch's kernel takes at once
    assert all(row.became for row in result.rows.values())
    torch.testing.assert_close(result.found, result.wanted)


def test_added_masks_are_left_alone_where_a_hidden_row_has_a_gradient(whatever_the_length):
    result = run(ADDED, tensors(requires_grad=True))
    assert {row.became for row in result.rows.values()} == {None}
    assert all("would get another gradient" in row.reason for row in result.rows.values())


def filled_with_infinity(q, k, v, seen):
    return scores(q, k).masked_fill(~seen, -math.inf).softmax(-1) @ v


def added_infinity(q, k, v, seen):
    return (scores(q, k) + torch.where(seen, 0.0, -math.inf)).softmax(-1) @ v


def test_a_row_that_sees_nothing_is_no_number_where_it_was_none(whatever_the_length):
    inputs = tensors(requires_grad=True)
    result = run((filled_with_infinity,), inputs)
    found, wanted = (part[filled_with_infinity] for part in (result.found, result.wanted))
    assert result.rows[filled_with_infinity].became and found[0, :, 3].isnan().all() and found[1].isfinite().all()
    torch.testing.assert_close(found, wanted, equal_nan=True)
    ours, theirs = (torch.autograd.grad(out, inputs[:3], torch.ones_like(out)) for out in (found, wanted))
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_row_that_an_added_mask_hides_is_no_number_either(whatever_the_length):
    result = run((added_infinity,), tensors())
    assert result.rows[added_infinity].became and result.found[added_infinity][0, :, 3].isnan().all()
    torch.testing.assert_close(result.found, result.wanted, equal_nan=True)


def test_under_autocast_inside_the_graph(whatever_the_length, monkeypatch):
    monkeypatch.setitem(rewriting._WORTH, (torch.bfloat16, "plain", True), 0)

    def attention(q, k, v, seen):
        with torch.autocast("cpu", torch.bfloat16):
            return scores(q, k).softmax(-1) @ v

    result = run((attention,), tensors(requires_grad=True))
    assert result.rows[attention].became and result.found[attention].dtype == torch.bfloat16
    torch.testing.assert_close(result.found, result.wanted, rtol=2e-2, atol=2e-2)


def test_checkpointed_parts_are_rewritten_too(whatever_the_length):
    def attention(*inputs):
        return torch.utils.checkpoint.checkpoint(heads_joined, *inputs, use_reentrant=False)

    inputs = tensors(requires_grad=True)
    result = run((attention,), inputs, then="aot_eager")
    assert result.rows[attention].became
    ours, theirs = (
        torch.autograd.grad(part[attention].square().sum(), inputs[:3]) for part in (result.found, result.wanted)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def softmax_over_queries(q, k, v, seen):
    return scores(q, k).softmax(-2) @ v


def weights_returned(q, k, v, seen):
    weights = scores(q, k).softmax(-1)
    return weights @ v, weights


def scores_returned(q, k, v, seen):
    logits = scores(q, k)
    return logits.softmax(-1) @ v, logits


def weights_multiplied(q, k, v, seen):
    return (scores(q, k).softmax(-1) * seen.float()) @ v


def integer_mask(q, k, v, seen):
    return (scores(q, k) + seen.long()).softmax(-1) @ v


def filled_nearby(q, k, v, seen):
    return scores(q, k).masked_fill(~seen, -1e4).softmax(-1) @ v


def causal_nearby(q, k, v, seen):
    return scores(q, k).masked_fill(torch.ones(12, 12).triu(1).bool(), -10.0).softmax(-1) @ v


def filled_from_data(q, k, v, seen):
    return torch.where(seen, scores(q, k), q.sum()).softmax(-1) @ v


def filled_with_two(q, k, v, seen):
    return scores(q, k).masked_fill(~seen, -1e9).masked_fill(seen.roll(1, -1), LOWEST).softmax(-1) @ v


def filled_far_then_added(q, k, v, seen):
    return (scores(q, k).masked_fill(~seen, -1e9) + seen.float()).softmax(-1) @ v


def scaled_after_masking(q, k, v, seen):
    return ((q @ k.mT + seen.float()) / 3).softmax(-1) @ v


def capped(q, k, v, seen):
    return (30 * torch.tanh(scores(q, k) / 30)).softmax(-1) @ v


def reshaped(q, k, v, seen):
    logits = q.flatten(0, 1) @ k.flatten(0, 1).mT
    return (logits.view(2, HEADS, 12, 12) + seen.float()).view(2 * HEADS, 12, 12).softmax(-1) @ v.flatten(0, 1)


def written_to_meanwhile(q, k, v, seen):
    v = v * 1
    weights = scores(q, k).softmax(-1)
    v.mul_(2)
    return weights @ v


def mask_broadcasts_the_scores(q, k, v, seen):
    return (scores(q[:1], k[:1]) + seen.float()).softmax(-1) @ v


def heads_broadcast(q, k, v, seen):
    return scores(q, k[:, :1]).softmax(-1) @ v[:, :1]


def narrower_values(q, k, v, seen):
    return scores(q, k).softmax(-1) @ v[..., :4]


def scaled_by_key(q, k, v, seen):
    return (q @ k.mT * seen.float()).softmax(-1) @ v


def divided_into(q, k, v, seen):
    return (1.0 / scores(q, k)).softmax(-1) @ v


def dropped(q, k, v, seen):
    return F.dropout(scores(q, k).softmax(-1), 1.0) @ v


def written_to_the_mask(q, k, v, seen):
    bias = seen.expand(2, HEADS, 12, 12).float()
    bias += scores(q, k)
    return bias.softmax(-1) @ v


def scaled_by_a_negative_number(q, k, v, seen):
    return (q @ k.mT * -0.5).softmax(-1) @ v


def wider_in_between(q, k, v, seen):
    return scores(q, k).double().softmax(-1).to(v.dtype) @ v


NEAR_MISSES = {
    softmax_over_queries: "softmax runs over dimension -2",
    weights_returned: "weights are read elsewhere",
    scores_returned: "scores are read elsewhere",
    weights_multiplied: "weights go through mul",
    integer_mask: "mask is torch.int64 and added",
    filled_nearby: "fills hidden scores with -10000",
    causal_nearby: "fills hidden scores with -10",
    filled_from_data: "fills hidden scores with what is no constant",
    filled_with_two: "several numbers",
    filled_far_then_added: "fills hidden scores with -1e+09 and adds",
    scaled_after_masking: "scales the scores after masking",
    capped: "tanh comes between",
    reshaped: "view comes between",
    written_to_meanwhile: "mul_ within it may change",
    mask_broadcasts_the_scores: "add broadcasts its scores",
    written_to_the_mask: "add_ writes to what is no score",
    scaled_by_a_negative_number: "by -0.5, which is not positive",
    heads_broadcast: "heads are broadcast",
    narrower_values: "another width",
    scaled_by_key: "scale is not one number per query",
    divided_into: "div does not scale",
    dropped: "attention would draw others",
    wider_in_between: "gives torch.float64",
}


@pytest.fixture(scope="module")
def left_alone():
    with any_length():
        return run(NEAR_MISSES, tensors())


@pytest.mark.parametrize("written", NEAR_MISSES, ids=name)
def test_what_is_not_proven_is_left_alone_with_the_reason(written, left_alone):
    row = left_alone.rows[written]
    assert row.became is None and NEAR_MISSES[written] in row.reason, row
    torch.testing.assert_close(left_alone.found[written], left_alone.wanted[written], rtol=0, atol=0, equal_nan=True)


def test_an_added_mask_with_a_gradient_is_left_alone(whatever_the_length):
    bias = randn(HEADS, 12, 12, requires_grad=True)

    def biased(q, k, v, seen):
        return (scores(q, k) + bias).softmax(-1) @ v

    result = run((biased,), tensors())
    assert "would get another gradient" in result.rows[biased].reason


@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "reason"),
    [
        (torch.float32, 64, 64, "no faster for 64 queries and 64 keys"),
        (torch.float32, 1, 2**17, "no faster for 1 queries"),
        (torch.float16, 256, 256, "not known to be faster in torch.float16"),
    ],
)
def test_on_the_cpu_only_what_is_measured_to_gain(dtype, rows, columns, reason):
    q, k, v, seen = tensors(rows, columns)
    row = run((matmul_div,), [*(t.to(dtype) for t in (q, k, v)), seen]).rows[matmul_div]
    assert row.became is None and reason in row.reason and rewriting.MEASURED in row.reason


def test_long_ones_are_worth_it():
    assert run((matmul_div,), tensors(256, 256)).rows[matmul_div].became


def test_a_classifier_is_no_candidate():
    classify = torch.compile(lambda x: F.linear(x, x).softmax(-1), backend=dynamo.backend, options={"then": "eager"})
    with dynamo.record() as listings:
        classify(randn(4, 8))
    assert listings == [()]


def test_on_a_gpu():
    with FakeTensorMode():
        q, k, v = (torch.empty(2, HEADS, 24, 64, device="cuda", dtype=torch.float16) for _ in range(3))
        result = run((matmul_div, lower_equals_zero, float32_softmax), [q, k, v, None])
    assert all(row.became for row in result.rows.values())
    for found in result.found.values():
        assert found.shape == q.shape and found.dtype == q.dtype and found.is_cuda
