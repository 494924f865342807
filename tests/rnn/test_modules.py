"""fused_ops.nn's recurrent modules against torch.nn's, torch's own ModuleInfo cases included."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.testing._internal.common_modules import module_db

import fused_ops
from tests.rnn.common import MODES, Case, flat
from tests.support import randn

KINDS = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in KINDS}


def fused(kind: str) -> type:
    return getattr(fused_ops.nn, kind)


def swapped(module: nn.Module) -> nn.Module:
    """A copy of a torch.nn module as the fused one, the way fuse() does it."""
    module = copy.deepcopy(module)
    module.__class__ = fused(type(module).__name__)
    return module


def values(result) -> list[torch.Tensor]:
    """All tensors in a module's result, in order; of a PackedSequence everything it holds."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result if part is not None for t in values(part)]


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_torchs_own_cases(kind, training):
    info = INFOS[kind]
    cases = info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training)
    for case in cases:
        arguments, keywords = case.constructor_input.args, {**case.constructor_input.kwargs, "dtype": torch.float64}
        theirs, ours = getattr(nn, kind)(*arguments, **keywords), fused(kind)(*arguments, **keywords)
        ours.load_state_dict(theirs.state_dict())
        theirs.train(training), ours.train(training)
        call = case.forward_input.args, case.forward_input.kwargs
        wanted, found = (values(m(*call[0], **call[1])) for m in (theirs, ours))
        torch.testing.assert_close(found, wanted)
        assert [t.stride() for t in found] == [t.stride() for t in wanted]
        grads = [
            torch.autograd.grad(sum(t.sum() for t in result if t.is_floating_point()), list(module.parameters()))
            for module, result in ((theirs, wanted), (ours, found))
        ]
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_copies_and_names(kind):
    theirs, ours = getattr(nn, kind)(3, 5), fused(kind)(3, 5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs)
    cell = kind.endswith("Cell")
    assert isinstance(ours, getattr(nn, kind) if cell else nn.RNNBase)
    x = randn(2, 3) if cell else randn(4, 2, 3)
    wanted = values(theirs(x))
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), swapped(theirs)):
        assert type(module) is fused(kind)
        torch.testing.assert_close(values(module(x)), wanted)
    double = copy.deepcopy(ours).double()
    torch.testing.assert_close([t.float() for t in values(double(x.double()))], wanted)
    back = swapped(theirs)
    back.__class__ = getattr(nn, kind)
    torch.testing.assert_close(values(back(x)), wanted)


@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_a_copy_has_its_own_weights_and_a_changed_weight_is_used(kind):
    module, x = fused(kind)(3, 5, 2), randn(4, 2, 3)
    before, twin = values(module(x)), copy.deepcopy(module)
    with torch.no_grad():
        for param in twin.parameters():
            param.mul_(2)
    torch.testing.assert_close(values(module(x)), before, rtol=0, atol=0)
    assert not torch.equal(values(twin(x))[0], before[0])
    params = {name: param * 2 for name, param in module.named_parameters()}
    called = torch.func.functional_call(module, params, (x,))
    torch.testing.assert_close(values(called), values(twin(x)))
    module.weight_hh_l0 = nn.Parameter(twin.weight_hh_l0.detach().clone())
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(values(module(x)), values(twin(x)))
    normed = torch.nn.utils.parametrizations.weight_norm(swapped(getattr(nn, kind)(3, 5)), "weight_hh_l0")
    output = normed(x)[0]
    output.sum().backward()
    assert normed.parametrizations.weight_hh_l0.original0.grad.abs().max() > 0


@pytest.mark.parametrize("enforce_sorted", (True, False))
@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("mode", MODES)
def test_packed_sequence_in_packed_sequence_out(mode, batch_first, enforce_sorted):
    case = Case(mode, layers=2, bidirectional=True, batch_first=batch_first, proj=2 if mode == "lstm" else 0)
    module = case.module()
    lengths = torch.tensor([5, 4, 1] if enforce_sorted else [2, 5, 4])
    for hx in (None, case.states()):
        x = case.input().requires_grad_()
        packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted)
        wanted, found = module(packed, hx), swapped(module)(packed, hx)
        assert isinstance(found[0], PackedSequence)
        torch.testing.assert_close(values(found), values(wanted))
        sums = [sum(t.sum() for t in values(r) if t.is_floating_point()) for r in (found, wanted)]
        torch.testing.assert_close(*(torch.autograd.grad(total, x, retain_graph=True)[0] for total in sums))


@pytest.mark.parametrize("mode", MODES)
def test_packed_dropout_draws_what_torch_draws(mode):
    module = Case(mode, layers=3, dtype=torch.float32).module()
    module.dropout = 0.5
    packed = pack_padded_sequence(randn(5, 3, 4), torch.tensor([2, 5, 4]), enforce_sorted=False)
    torch.manual_seed(1)
    wanted = values(module(packed))
    torch.manual_seed(1)
    torch.testing.assert_close(values(swapped(module)(packed)), wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("enforce_sorted", (True, False))
def test_packed_with_resets_and_all_states(mode, batch_first, enforce_sorted):
    case = Case(mode, layers=2, bidirectional=True, batch_first=batch_first)
    module, x = swapped(case.module()), case.input()
    lengths = torch.tensor([5, 4, 1] if enforce_sorted else [2, 5, 4])
    resets = torch.arange(15).reshape(x.shape[:2]) % 4 == 0
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted)
    wanted = flat(module(x, lengths=lengths, resets=resets, return_all_states=True))
    output, *rest = module(packed, resets=resets, return_all_states=True)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    found = [pad_packed_sequence(output, batch_first)[0], *values(rest)]
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="lengths must be None with a PackedSequence"):
        module(packed, lengths=lengths)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", (True, False))
def test_without_a_batch(mode, batch_first):
    case = Case(mode, batch=1, batch_first=batch_first, layers=2)
    module, x = swapped(case.module()), case.input()
    axis = 0 if batch_first else 1
    hx = case.states()
    alone = tuple(t[:, 0] for t in hx) if mode == "lstm" else hx[:, 0]
    resets = torch.tensor([[True, False, False, True, False]])
    resets = resets if batch_first else resets.T
    keywords = dict(return_all_states=True)
    wanted = flat(module(x, hx, lengths=torch.tensor([4]), resets=resets, **keywords))
    found = flat(module(x.squeeze(axis), alone, lengths=torch.tensor(4), resets=resets.squeeze(axis), **keywords))
    count = 3 if mode == "lstm" else 2
    batched = [axis, *([1] * (count - 1)), *([2] * (count - 1))]
    torch.testing.assert_close(found, [t.squeeze(dim) for t, dim in zip(wanted, batched, strict=True)])
    torch.testing.assert_close(flat(module(x.squeeze(axis))), flat(case.module()(x.squeeze(axis))))


CONSTRUCTOR_ERRORS = (
    ((3, 5), {"dropout": 1.5}, ValueError),
    ((3, 5), {"num_layers": 0}, ValueError),
    ((0, 5), {}, ValueError),
    ((3, 5.0), {}, TypeError),
    ((3, 5), {"bias": 1}, TypeError),
    ((3, 5), {"proj_size": 5}, ValueError),
)
FORWARD_ERRORS = (
    lambda m: m(torch.randn(2)),
    lambda m: m(torch.randn(2, 2, 2, 3)),
    lambda m: m(torch.randn(4, 2, 2)),
    lambda m: m(torch.randn(4, 2, 3).double()),
    lambda m: m(torch.randn(4, 2, 3), states(m, 1, 3, 5)),
    lambda m: m(torch.randn(4, 2, 3), states(m, 1, 5)),
    lambda m: m(torch.randn(4, 3), states(m, 1, 1, 5)),
    lambda m: m(torch.randn(4, 2, 3), states(m, 2, 2, 5)),
)


def states(module, *shape):
    return (torch.zeros(shape), torch.zeros(shape)) if module.mode == "LSTM" else torch.zeros(shape)


@pytest.mark.parametrize("kind", ("RNN", "GRU", "LSTM"))
def test_errors_are_torchs(kind):
    for arguments, keywords, error in CONSTRUCTOR_ERRORS:
        messages = []
        for constructor in (getattr(nn, kind), fused(kind)):
            with pytest.raises(error) as raised:
                constructor(*arguments, **keywords)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    theirs, ours = getattr(nn, kind)(3, 5), fused(kind)(3, 5)
    for call in FORWARD_ERRORS:
        with pytest.raises((RuntimeError, ValueError)) as wanted:
            call(theirs)
        with pytest.raises(type(wanted.value)) as found:
            call(ours)
        assert str(found.value) == str(wanted.value)
    if kind == "RNN":
        with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
            fused("RNN")(3, 5, nonlinearity="gelu")
        assert fused("RNN")(3, 5, 1, "relu").mode == "RNN_RELU"


@pytest.mark.parametrize("kind", ("RNNCell", "GRUCell", "LSTMCell"))
def test_errors_of_cells_are_torchs(kind):
    theirs, ours = getattr(nn, kind)(3, 5), fused(kind)(3, 5)
    pair = (lambda h: (h, h)) if kind == "LSTMCell" else (lambda h: h)
    for call in (
        lambda m: m(torch.randn(2, 2, 3)),
        lambda m: m(torch.randn(2, 3), pair(torch.randn(1, 2, 5))),
    ):
        with pytest.raises(ValueError) as wanted:
            call(theirs)
        with pytest.raises(ValueError) as found:
            call(ours)
        assert str(found.value) == str(wanted.value)


def test_a_list_of_rows_needs_no_packing():
    """What `lengths` is for: pad, run, and h_n is each row's own last state."""
    rows = [randn(n, 4, seed=n) for n in (3, 1, 5)]
    module = fused("GRU")(4, 6, batch_first=True, bidirectional=True)
    _, h_n = module(pad_sequence(rows, batch_first=True), lengths=torch.tensor([3, 1, 5]))
    for i, row in enumerate(rows):
        torch.testing.assert_close(h_n[:, i], module(row)[1])


def test_fuse_takes_them_and_gives_them_back():
    model = nn.ModuleDict({kind.lower(): getattr(nn, kind)(3, 5) for kind in KINDS})
    x, step = randn(4, 2, 3), randn(2, 3)
    wanted = {name: values(m(step if name.endswith("cell") else x)) for name, m in model.items()}
    fused_ops.fuse(model)
    for name, module in model.items():
        assert type(module) in {fused(kind) for kind in KINDS}
        torch.testing.assert_close(values(module(step if name.endswith("cell") else x)), wanted[name])
    fused_ops.unfuse(model)
    assert all(type(m).__module__.startswith("torch.nn") for m in model.values())
