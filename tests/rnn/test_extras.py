"""Layer norm, zoneout, weight dropout and variational dropout against plain loops, and as functions and modules."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_sequence

import fused_ops
from fused_ops.rnn import op, reference
from fused_ops.rnn.noise import Noise, drawn
from fused_ops.rnn.reference import Static, Tensors
from tests.rnn.common import FUNCTIONS, MODES, Case, flat
from tests.rnn.extras import LENGTHS, RESETS, SIZES, flat_call, loop, packed, with_norms
from tests.support import assert_accurate, randn

EXTRAS = ({"norm"}, {"masks"}, {"zones"}, {"zoneout"}, {"norm", "masks", "zones"}, {"norm", "zoneout"})
KINDS = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}


def named(extras: set[str]) -> str:
    return "+".join(sorted(extras))


@pytest.mark.parametrize("extras", EXTRAS, ids=named)
@pytest.mark.parametrize("mode", MODES)
def test_maths_agree_with_a_plain_loop(mode, extras):
    proj = 4 if mode == "lstm" else 0
    for size in ({}, {"layers": 2, "bidirectional": True}, {"layers": 2, "bias": False, "proj": proj}):
        for lengths, resets in ((None, None), (LENGTHS, RESETS)):
            tensors, params, static = flat_call(Case(mode, **size), extras, lengths, resets)
            found = reference.sequence(*tensors, *params, *static)
            for value, wanted in zip(found, loop(tensors, params, static), strict=True):
                assert_accurate(value, wanted, terms=100)


@pytest.mark.parametrize("extras", EXTRAS, ids=named)
@pytest.mark.parametrize("mode", MODES)
def test_packed_maths_agree_with_a_plain_loop(mode, extras):
    tensors, params, static = flat_call(Case(mode, layers=2, bidirectional=True), extras, LENGTHS)
    output, h_n, *rest = reference.sequence(*packed(tensors), *params, *static)
    wanted = loop(tensors, params, static)
    live = torch.arange(5)[:, None] < LENGTHS[[0, 2]]
    assert_accurate(output, wanted[0][:, [0, 2]][live], terms=100)
    for value, padded in zip((h_n, *rest), wanted[1:], strict=True):
        assert_accurate(value, padded[..., [0, 2], :], terms=100)


@pytest.mark.parametrize("extras", ({"norm"}, {"norm", "masks", "zones"}, {"masks", "zoneout"}), ids=named)
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_and_gradgradcheck(mode, extras):
    case = Case(mode, 3, 2, 2, 3, bidirectional=True, proj=2 if mode == "lstm" else 0)
    tensors, params, static = flat_call(case, extras, torch.tensor([3, 1]), RESETS[1:4, :2])
    lstm = mode == "lstm"

    def call(x, h0, *rest):
        held = tensors._replace(input=x, h0=h0, c0=rest[0] if lstm else None)
        return reference.sequence(*held, *(rest[1:] if lstm else rest), *static)

    leaves = [t.requires_grad_() for t in (*tensors[: 3 if lstm else 2], *params)]
    assert gradcheck(call, leaves, fast_mode=True)
    assert gradgradcheck(call, leaves, fast_mode=True)


def test_a_half_types_maths_are_float32s():
    for extras in ({"norm", "zones"}, {"masks", "zoneout"}):
        tensors, params, static = flat_call(Case("lstm", layers=2, dtype=torch.bfloat16), extras)
        exact = Tensors(*[t.double() if t is not None and t.is_floating_point() else t for t in tensors])
        wanted = loop(exact, [p.double() for p in params], static)
        for value, exactly in zip(reference.sequence(*tensors, *params, *static), wanted, strict=True):
            assert value.dtype == torch.bfloat16
            assert_accurate(value, exactly, ulps=2)


def call(case: Case, tensors: list, train: bool = True, dropout: float = 0.0, **keywords):
    """The public function in training, on what `Case.tensors` makes."""
    states = 2 if case.mode == "lstm" else 1
    hx = tensors[1:3] if states == 2 else tensors[1]
    params = tensors[1 + states :]
    return FUNCTIONS[case.mode](
        tensors[0], hx, params, case.bias, case.layers, dropout, train, case.bidirectional, case.batch_first, **keywords
    )


NOISE = {
    "zoneout": {"zoneout": 0.3},
    "weight_dropout": {"weight_dropout": 0.4},
    "variational_dropout": {"variational_dropout": 0.5},
    "all": {"zoneout": 0.2, "weight_dropout": 0.3, "variational_dropout": 0.4, "dropout": 0.5},
}


@pytest.mark.parametrize("what", NOISE)
@pytest.mark.parametrize("mode", MODES)
def test_training_runs_the_loop_on_what_a_seed_draws(mode, what):
    case = Case(mode, layers=2, bidirectional=True, batch_first=True)
    tensors = case.tensors()
    lstm = mode == "lstm"
    params, resets = tuple(tensors[3 if lstm else 2 :]), RESETS.T
    torch.manual_seed(3)
    found = call(case, tensors, lengths=LENGTHS, resets=resets, return_all_states=True, **NOISE[what])
    torch.manual_seed(3)
    again = call(case, tensors, lengths=LENGTHS, resets=resets, return_all_states=True, **NOISE[what])
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    other = call(case, tensors, lengths=LENGTHS, resets=resets, return_all_states=True, **NOISE[what])
    assert not torch.equal(found[0], other[0])
    torch.manual_seed(3)
    held = Tensors(tensors[0].transpose(0, 1), tensors[1], tensors[2] if lstm else None, LENGTHS, RESETS)
    held, params, static, dropout = drawn(held, params, Static(mode, True, 2, True, True), Noise(True, **NOISE[what]))
    assert dropout == 0 or what != "all"
    wanted = loop(held, list(params), static)
    for value, exact in zip(found, (wanted[0].transpose(0, 1), *wanted[1:]), strict=True):
        assert_accurate(value, exact, terms=100)


@pytest.mark.parametrize("mode", MODES)
def test_eval_takes_the_expectation_of_zoneout_and_no_dropout(mode):
    case = Case(mode, layers=2, bidirectional=True)
    tensors = case.tensors()
    lstm = mode == "lstm"
    found = call(
        case, tensors, False, 0.5, zoneout=(0.3, 0.1) if lstm else 0.3, weight_dropout=0.4, variational_dropout=0.5,
        lengths=LENGTHS, return_all_states=True,
    )  # fmt: skip
    held, params, static = flat_call(case, {"zoneout"}, LENGTHS)
    for value, exact in zip(found, loop(held, params, static), strict=True):
        assert_accurate(value, exact, terms=100)
    if not lstm:
        return
    both = call(case, tensors, False, zoneout=0.3)
    assert all(torch.equal(a, b) for a, b in zip(both, call(case, tensors, False, zoneout=(0.3, 0.3))))
    assert not torch.equal(both[0], call(case, tensors, False, zoneout=(0.3, 0.0))[0])


def draw(noise: Noise, mode: str = "lstm", packing: bool = False):
    case = Case(mode, 5 if packing else 40, 2 if packing else 30, 20, 25, layers=3, bidirectional=True)
    x, h0, *rest = case.tensors()
    held = Tensors(x, h0, rest.pop(0) if mode == "lstm" else None)
    if packing:
        held = held._replace(input=torch.cat([x[t, :n] for t, n in enumerate(SIZES)]), batch_sizes=SIZES)
    return held, tuple(rest), drawn(held, tuple(rest), Static(mode, True, 3, True), noise)


def test_what_the_masks_hold():
    torch.manual_seed(0)
    _, _, (held, _, static, _) = draw(Noise(True, zoneout=(0.3, 0.1)))
    assert held.zone_h.dtype == held.zone_c.dtype == torch.bool and held.zone_h.shape == (6, 40, 30, 25)
    assert static.zoneout_h == static.zoneout_c == 0
    for zone, p in ((held.zone_h, 0.3), (held.zone_c, 0.1)):
        assert abs(zone.double().mean() - p) < 5 * (p * (1 - p) / zone.numel()) ** 0.5
        rates = zone.double().mean((0, 1, 3))  # no row is favoured
        assert (rates - p).abs().max() < 6 * (p * (1 - p) / (zone.numel() / 30)) ** 0.5
    _, params, (_, dropped, _, _) = draw(Noise(True, weight_dropout=0.4))
    for i, (param, found) in enumerate(zip(params, dropped, strict=True)):
        kept = found != 0
        if i % 4 != 1:
            assert found is param
            continue
        torch.testing.assert_close(found[kept], param[kept] / 0.6)
        assert abs(kept.double().mean() - 0.6) < 5 * (0.24 / kept.numel()) ** 0.5
    assert not torch.equal(dropped[1] == 0, dropped[5] == 0)


def test_variational_masks_are_the_same_in_every_step():
    torch.manual_seed(0)
    before, _, (held, _, _, _) = draw(Noise(True, variational_dropout=0.25))
    ratio = held.input / before.input
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert held.recurrent_masks.shape == before.h0.shape and held.masks.shape == (2, 40, 30, 50)
    assert torch.equal(held.masks, held.masks[:, :1].expand_as(held.masks))
    for mask in (ratio[0], held.recurrent_masks, held.masks[:, 0]):
        assert ((mask == 0) | ((mask * 0.75 - 1).abs() < 1e-12)).all()
        assert abs((mask == 0).double().mean() - 0.25) < 5 * (0.1875 / mask.numel()) ** 0.5
        assert mask.std(-2).min() > 0  # rows differ
    before, _, (held, _, _, _) = draw(Noise(True, variational_dropout=0.25), "gru", packing=True)
    rows = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0])
    for mask in (held.input / before.input, *held.masks):
        for row in (0, 1):
            of_row = mask[rows == row]
            torch.testing.assert_close(of_row, of_row[:1].expand_as(of_row))
        assert not torch.equal(mask[0], mask[1])


def test_nothing_is_drawn_where_nothing_is_random():
    case = Case("lstm")
    tensors, state = case.tensors(), torch.get_rng_state()
    call(case, tensors, True)
    call(case, tensors, False, 0.5, zoneout=0.5, weight_dropout=0.5, variational_dropout=0.5)
    fused_ops.explain(call, case, tensors, True, zoneout=0.5, weight_dropout=0.5, variational_dropout=0.5)
    assert torch.equal(state, torch.get_rng_state())


def test_extreme_probabilities():
    case = Case("lstm", dtype=torch.float32)
    tensors = case.tensors()
    frozen = call(case, tensors, True, zoneout=1.0)
    assert torch.equal(frozen[1], tensors[1]) and torch.equal(frozen[2], tensors[2])
    frozen = call(case, tensors, False, zoneout=(1, 1))
    assert torch.equal(frozen[1], tensors[1]) and torch.equal(frozen[2], tensors[2])
    zeroed = [t * 0 if i == 4 else t for i, t in enumerate(tensors)]  # W_hh
    torch.testing.assert_close(call(case, tensors, True, weight_dropout=1.0), call(case, zeroed, True))
    zeroed = [t * 0 if i in (0, 4) else t for i, t in enumerate(tensors)]
    torch.testing.assert_close(call(case, tensors, True, variational_dropout=1.0), call(case, zeroed, True))


def test_noise_reaches_every_gradient():
    case = Case("lstm", layers=2)
    tensors = case.tensors(requires_grad=True)
    torch.manual_seed(1)
    found = call(case, tensors, **NOISE["all"])
    grads = torch.autograd.grad(sum(t.sum() for t in found), tensors)
    assert all(grad.abs().max() > 0 for grad in grads)
    torch.manual_seed(1)
    assert gradcheck(lambda *t: (torch.manual_seed(1), call(case, t, **NOISE["all"]))[1], tensors, fast_mode=True)


@pytest.mark.parametrize("proj", (0, 4))
@pytest.mark.parametrize("what", NOISE)
def test_the_cpu_serves_every_noise_with_and_without_a_layer_norm(what, proj):
    """In float32, training and not, with a projected state and without."""
    case = Case("lstm", time=9, layers=2, proj=proj, dtype=torch.float32)
    plain = case.tensors()
    for tensors, norm in ((plain, False), ([*plain[:3], *with_norms(case, plain[3:])], True)):
        for train in (True, False):
            results = []
            for backend in ("cpu", "reference"):
                torch.manual_seed(1)
                results.append(call(case, tensors, train, layer_norm=norm, backend=backend, **NOISE[what]))
            for value, wanted in zip(*results, strict=True):
                assert_accurate(value, wanted.double(), terms=100)


BAD = {
    "zoneout over 1": ("gru", {"zoneout": 1.5}, ValueError, "zoneout must be between 0 and 1, got 1.5"),
    "zoneout NaN": ("gru", {"zoneout": float("nan")}, ValueError, "zoneout must be between 0 and 1, got nan"),
    "a pair for a GRU": ("gru", {"zoneout": (0.1, 0.1)}, ValueError, r"zoneout must be a number, got \(0.1, 0.1\)"),
    "three for an LSTM": ("lstm", {"zoneout": (0.1,) * 3}, ValueError, "zoneout must be a number, or a pair"),
    "the pair's second": ("lstm", {"zoneout": (0.1, -1)}, ValueError, r"zoneout\[1\] must be between 0 and 1, got -1"),
    "no number": ("lstm", {"zoneout": "0.1"}, TypeError, "zoneout must be a number, got str"),
    "weight_dropout": ("gru", {"weight_dropout": -0.1}, ValueError, "weight_dropout must be between 0 and 1, got -0.1"),
    "variational": (
        "gru",
        {"variational_dropout": 2},
        ValueError,
        "variational_dropout must be between 0 and 1, got 2",
    ),
    "None": ("gru", {"variational_dropout": None}, TypeError, "variational_dropout must be a number, got NoneType"),
    "no norms": ("lstm", {"layer_norm": True}, ValueError, "params must be 8 tensors or 9 tensors"),
}


@pytest.mark.parametrize("what", BAD)
def test_errors_name_the_argument(what):
    mode, keywords, kind, message = BAD[what]
    case = Case(mode)
    with pytest.raises(kind, match=message):
        call(case, case.tensors(), **keywords)
    if "layer_norm" not in keywords:
        with pytest.raises(kind, match=message):
            getattr(fused_ops.nn, KINDS[mode])(3, 4, **keywords)


@pytest.mark.parametrize("mode", MODES)
def test_the_shape_of_every_norm_is_checked(mode):
    case = Case(mode, proj=2 if mode == "lstm" else 0)
    states = 2 if mode == "lstm" else 1
    _, params, static = flat_call(case, {"norm"})
    for i in range(len(params) - static.norms, len(params)):
        bad = [torch.cat([p, p[:1]]) if j == i else p for j, p in enumerate(params)]
        with pytest.raises(ValueError, match=rf"params\[{i}\] must be of shape"):
            call(case, [*case.tensors()[: 1 + states], *bad], layer_norm=True)


def module(mode: str, **extras) -> nn.Module:
    keywords = {"nonlinearity": mode.removeprefix("rnn_")} if mode.startswith("rnn") else {}
    torch.manual_seed(5)
    return getattr(fused_ops.nn, KINDS[mode])(4, 6, 2, bidirectional=True, **keywords, **extras)


@pytest.mark.parametrize("mode", MODES)
def test_a_module_with_layer_norm_is_the_function(mode):
    ours = module(mode, layer_norm=True, zoneout=0.2).double()
    norms = ["norm_ih", "norm_hh", "norm_c", "bias_c"][: 4 if mode == "lstm" else 2]
    of_cell = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", *norms]
    suffixes = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    assert list(ours.state_dict()) == [name + suffix for suffix in suffixes for name in of_cell]
    for name, value in ours.state_dict().items():
        if name.startswith(("norm_", "bias_c")):
            assert (value == (0 if name.startswith("bias_c") else 1)).all() and value.dtype == torch.float64
    with torch.no_grad():
        for i, param in enumerate(ours.parameters()):
            param.add_(0.3 * randn(*param.shape, seed=60 + i))
    case = Case(mode, layers=2, bidirectional=True)
    hx = case.states()
    for training in (True, False):
        ours.train(training)
        torch.manual_seed(2)
        found = flat(ours(case.input(), hx, lengths=LENGTHS))
        torch.manual_seed(2)
        states = list(hx) if mode == "lstm" else [hx]
        wanted = call(
            case, [case.input(), *states, *ours.parameters()], training, layer_norm=True, zoneout=0.2, lengths=LENGTHS
        )
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("mode", MODES)
def test_modules_are_copied_pickled_and_loaded_with_their_extras(mode):
    extras = dict(layer_norm=True, zoneout=0.2, weight_dropout=0.3, variational_dropout=0.4)
    ours, x = module(mode, **extras), randn(3, 2, 4)
    assert "layer_norm=True, zoneout=0.2, weight_dropout=0.3, variational_dropout=0.4" in repr(ours)
    other = module(mode, **extras)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(2)
    other.load_state_dict(ours.state_dict(), strict=True)
    copies = (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), other)
    wanted = []
    for each in (ours, *copies):
        torch.manual_seed(8)
        found = flat(each(x))
        wanted = wanted or found
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    twice = copy.deepcopy(ours).double()
    assert {p.dtype for p in twice.parameters()} == {torch.float64} == {twice(x.double())[0].dtype}
    ours.reset_parameters()
    assert (ours.norm_hh_l1 == 1).all() and ours.weight_hh_l1.std() > 0


@pytest.mark.parametrize("mode", MODES)
def test_the_state_dict_is_torchs_without_layer_norm(mode):
    ours = module(mode, zoneout=0.2, weight_dropout=0.3, variational_dropout=0.4)
    kind = getattr(nn, KINDS[mode])
    theirs = kind(4, 6, 2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with pytest.raises(RuntimeError, match="norm_ih_l0"):
        module(mode, layer_norm=True).load_state_dict(theirs.state_dict(), strict=True)
    signature = inspect.signature(type(ours).__mro__[1].__init__)
    assert all(signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ("layer_norm", "zoneout"))


@pytest.mark.parametrize("mode", ("gru", "lstm"))
def test_a_packed_sequence_goes_through_a_module_with_extras(mode):
    ours = module(mode, layer_norm=True, zoneout=0.2)
    ours.eval()
    rows = [randn(n, 4, seed=n) for n in (2, 5, 3)]
    output, state = ours(pack_sequence(rows, enforce_sorted=False))
    h_n = state[0] if mode == "lstm" else state
    for i, row in enumerate(rows):
        alone, last = ours(row)
        last = last[0] if mode == "lstm" else last
        torch.testing.assert_close(nn.utils.rnn.unpack_sequence(output)[i], alone)
        torch.testing.assert_close(h_n[:, i], last)
    ours.train()
    ours.variational_dropout = ours.weight_dropout = ours.dropout = 0.5
    torch.manual_seed(0)
    first = ours(pack_sequence(rows, enforce_sorted=False))[0].data
    torch.manual_seed(0)
    assert torch.equal(first, ours(pack_sequence(rows, enforce_sorted=False))[0].data)


@pytest.mark.parametrize(
    "extras", ({"layer_norm": True}, {"zoneout": 0.3, "weight_dropout": 0.3}, NOISE["all"]), ids=str
)
@pytest.mark.parametrize("mode", ("rnn_tanh", "gru", "lstm"))
def test_modules_with_extras_compile_to_one_graph(mode, extras):
    torch._dynamo.reset()
    ours = module(mode, **extras)
    traced = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    leaves = list(ours.parameters())
    for training in (False, True):
        ours.train(training)
        for time, batch in ((5, 3), (3, 4)):
            x = randn(time, batch, 4)
            lengths = torch.arange(batch) % time + 1
            torch.manual_seed(0)
            found = traced(x, lengths=lengths)[0]
            grads = torch.autograd.grad(found.sum(), leaves)
            assert all(grad.isfinite().all() for grad in grads) and max(grad.abs().max() for grad in grads) > 0
            if training and len(extras) > 1:  # a compiled graph draws other numbers
                torch.manual_seed(0)
                assert torch.equal(found, traced(x, lengths=lengths)[0])
                continue
            wanted = ours(x, lengths=lengths)[0]
            torch.testing.assert_close(found, wanted)
            torch.testing.assert_close(grads, torch.autograd.grad(wanted.sum(), leaves))


def test_opcheck_of_the_reference_ops_with_extras():
    tensors, params, static = flat_call(
        Case("lstm", layers=2, dtype=torch.float32), {"norm", "masks", "zones"}, LENGTHS
    )
    inputs, checks = [*tensors, *params], ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fused_ops.rnn_fwd_reference.default, (inputs, *static), test_utils=checks)
    needs = [t is not None and t.is_floating_point() for t in inputs]
    grads = [torch.randn_like(t) for t in torch.ops.fused_ops.rnn_fwd_reference(inputs, *static)]
    torch.library.opcheck(op.rnn_bwd_reference, (grads, inputs, needs, *static), test_utils=checks)


def test_with_norms_follows_the_order_of_a_flat_call():
    case = Case("lstm", layers=2, proj=4)
    params = with_norms(case, list(case.module().parameters()))
    weights = reference.weights_of(tuple(params), 1, Static("lstm", True, 2, layer_norm=True))
    assert weights.w_hr.shape == (4, 6) and weights.norm_hh.shape == (24,) and weights.bias_c is params[-1]
