"""MultiheadAttention is torch.nn's: same parameters, outputs, strides, errors; under every mask, mode and layout."""

import copy
import math
import pickle
from itertools import product

import pytest
import torch
from torch import nn

from fused_ops.attention.modules import MultiheadAttention
from fused_ops.core.dispatch import record
from tests.support import leaves, randn

BATCH, ROWS, COLUMNS, WIDTH, HEADS = 3, 4, 5, 8, 2


def pair(train=True, **options):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, **options).train(train)
    ours = MultiheadAttention(WIDTH, HEADS, **options).train(train)
    for name, parameter in theirs.named_parameters():
        parameter.data = randn(*parameter.shape, seed=len(name)) * 0.3
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def make(kind, batched=True, batch_first=False, kdim=WIDTH, vdim=WIDTH):
    def tensor(length, width, seed):
        if not batched:
            return randn(length, width, seed=seed, requires_grad=True)
        shape = (BATCH, length, width) if batch_first else (length, BATCH, width)
        return randn(*shape, seed=seed, requires_grad=True)

    query = tensor(ROWS, WIDTH, 1)
    if kind == "self":
        return query, query, query
    if kind == "memory":
        memory = tensor(COLUMNS, kdim, 2)
        return query, memory, memory
    return query, tensor(COLUMNS, kdim, 2), tensor(COLUMNS, vdim, 3)


def masks(kind, batched, columns, floating):
    """Arguments; in each, one query sees no key and one sequence ends early."""
    sequences = BATCH if batched else 1
    padding = torch.zeros(sequences, columns, dtype=torch.bool)
    padding[-1, -2:] = True
    hidden = randn(ROWS, columns, seed=5) > 0.3
    hidden[1] = True
    own = (randn(sequences * HEADS, ROWS, columns, seed=6) > 0.5) | hidden
    causal = torch.ones(ROWS, columns, dtype=torch.bool).triu(1)
    chosen = {
        "none": {},
        "padding": dict(key_padding_mask=padding),
        "shared": dict(attn_mask=hidden),
        "per head": dict(attn_mask=own),
        "shared and padding": dict(attn_mask=hidden, key_padding_mask=padding),
        "per head and padding": dict(attn_mask=own, key_padding_mask=padding),
        "causal": dict(attn_mask=causal, is_causal=True),
        "causal and padding": dict(attn_mask=causal, is_causal=True, key_padding_mask=padding),
    }[kind]
    chosen = dict(chosen)
    if "key_padding_mask" in chosen and not batched:
        chosen["key_padding_mask"] = chosen["key_padding_mask"][0]
    for name, mask in chosen.items():
        if floating and name != "is_causal":
            chosen[name] = randn(*mask.shape, seed=7).masked_fill(mask, -math.inf)
    return chosen


MASKS = (
    "none",
    "padding",
    "shared",
    "per head",
    "shared and padding",
    "per head and padding",
    "causal",
    "causal and padding",
)


def run(module, inputs, seed=3, **arguments):
    unique = {id(t): leaves(t)[0] for t in inputs}
    torch.manual_seed(seed)
    out, weights = module(*(unique[id(t)] for t in inputs), **arguments)
    wanted = [*unique.values(), *module.parameters()]
    gradients = torch.autograd.grad((out * randn(*out.shape, seed=11)).sum(), wanted, allow_unused=True)
    return out, weights, gradients


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("floating", (False, True), ids=("bool", "float"))
@pytest.mark.parametrize("source", ("self", "memory", "apart"))
def test_equals_torch_under_every_mask_and_layout(kind, floating, source):
    for batched, batch_first in product((True, False), repeat=2):
        dropout, bias = 0.3 if batched is batch_first else 0.0, batch_first
        theirs, ours = pair(batch_first=batch_first, dropout=dropout, bias=bias)
        inputs = make(source, batched, batch_first)
        arguments = masks(kind, batched, ROWS if source == "self" else COLUMNS, floating)
        wanted = run(theirs, inputs, need_weights=False, **arguments)
        with record() as choices:
            got = run(ours, inputs, need_weights=False, **arguments)
        assert [choice.op for choice in choices] == ["scaled_dot_product_attention"]
        assert got[1] is None and got[0].stride() == wanted[0].stride()
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("train", (True, False))
def test_other_key_and_value_widths(train):
    theirs, ours = pair(train, kdim=6, vdim=7, batch_first=True)
    inputs = make("apart", True, True, 6, 7)
    torch.testing.assert_close(
        run(ours, inputs, need_weights=False), run(theirs, inputs, need_weights=False), atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    "options", (dict(add_bias_kv=True), dict(add_zero_attn=True), dict(need_weights=True)), ids=str
)
def test_what_torch_alone_has_runs_torchs_forward(options):
    options = dict(options)
    weights = options.pop("need_weights", False)
    theirs, ours = pair(**options)
    inputs = make("memory")
    for average in (True, False):
        arguments = dict(need_weights=weights, average_attn_weights=average)
        wanted, got = run(theirs, inputs, **arguments), run(ours, inputs, **arguments)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip((*got[:2], *got[2]), (*wanted[:2], *wanted[2])))


def test_torchs_inference_fast_path_is_kept():
    theirs, ours = pair(train=False, batch_first=True)
    x = make("self", True, True)[0].detach()
    with torch.no_grad(), record() as choices:
        out, _ = ours(x, x, x, need_weights=False)
        wanted, _ = theirs(x, x, x, need_weights=False)
    assert choices == [] and torch.equal(out, wanted) and out.stride() == wanted.stride()


@pytest.mark.parametrize(
    "arguments",
    (
        dict(query=randn(ROWS, BATCH, 7)),
        dict(key=randn(COLUMNS, BATCH + 1, WIDTH), value=randn(COLUMNS, BATCH + 1, WIDTH)),
        dict(key=randn(COLUMNS, WIDTH), value=randn(COLUMNS, WIDTH)),
        dict(value=randn(COLUMNS + 1, BATCH, WIDTH)),
        dict(query=randn(WIDTH)),
        dict(attn_mask=torch.ones(ROWS, COLUMNS + 1, dtype=torch.bool)),
        dict(attn_mask=torch.ones(BATCH, ROWS, COLUMNS, dtype=torch.bool)),
        dict(attn_mask=torch.ones(ROWS, COLUMNS, dtype=torch.int32)),
        dict(key_padding_mask=torch.ones(BATCH, COLUMNS - 1, dtype=torch.bool)),
        dict(is_causal=True),
    ),
    ids=lambda arguments: ", ".join(f"{name} {getattr(value, 'shape', value)}" for name, value in arguments.items()),
)
def test_errors_are_torchs(arguments):
    theirs, ours = pair()
    query, key, value = (t.detach() for t in make("apart"))
    given = {"query": query, "key": key, "value": value, "need_weights": False, **arguments}
    with pytest.raises(Exception) as wanted:
        theirs(**given)
    with pytest.raises(wanted.type) as got:
        ours(**given)
    assert str(got.value) == str(wanted.value)
    for bad in (dict(embed_dim=0, num_heads=2), dict(embed_dim=8, num_heads=3)):
        with pytest.raises((ValueError, AssertionError)):
            MultiheadAttention(**bad)


def test_torchs_own_module_cases():
    from torch.testing._internal.common_modules import module_db

    info = next(info for info in module_db if info.module_cls is nn.MultiheadAttention)
    count = 0
    for training in (True, False):
        for case in info.module_inputs_func(info, "cpu", torch.float32, requires_grad=True, training=training):
            built = case.constructor_input
            theirs = nn.MultiheadAttention(*built.args, **built.kwargs).train(training)
            ours = MultiheadAttention(*built.args, **built.kwargs).train(training)
            ours.load_state_dict(theirs.state_dict())
            for need_weights in (False, True):
                given = {**case.forward_input.kwargs, "need_weights": need_weights}
                results = []
                for module in (theirs, ours):
                    torch.manual_seed(1)
                    results.append(module(*case.forward_input.args, **given))
                torch.testing.assert_close(results[1], results[0], atol=2e-6, rtol=1e-5)
                count += 1
    assert count >= 256


def test_a_class_swap_a_copy_and_a_pickle():
    theirs, _ = pair(train=True)
    inputs = make("memory")
    wanted = run(theirs, inputs, need_weights=False)
    swapped = copy.deepcopy(theirs)
    swapped.__class__ = MultiheadAttention
    for module in (swapped, copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped))):
        assert type(module) is MultiheadAttention and module.state_dict().keys() == theirs.state_dict().keys()
        torch.testing.assert_close(run(module, inputs, need_weights=False), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ("none", "shared and padding", "causal"))
def test_compiles_to_one_graph(kind):
    theirs, ours = pair(batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    inputs = make("self", True, True)
    arguments = masks(kind, True, ROWS, False)
    torch.testing.assert_close(
        run(compiled, inputs, need_weights=False, **arguments),
        run(theirs, inputs, need_weights=False, **arguments),
        atol=2e-6, rtol=1e-5,
    )  # fmt: skip


def test_mixed_precision_is_torchs():
    theirs, ours = pair(train=True)
    inputs = make("memory")
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = run(theirs, inputs, need_weights=False), run(ours, inputs, need_weights=False)
    assert got[0].dtype == wanted[0].dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, atol=3e-2, rtol=3e-2)
    for module in (theirs, ours):
        module.bfloat16()
    inputs = [t.detach().bfloat16() for t in inputs]
    torch.testing.assert_close(
        ours(*inputs, need_weights=False)[0], theirs(*inputs, need_weights=False)[0], atol=2e-2, rtol=2e-2
    )
