"""Traces: what they repeat, what they refuse because they could not, and that nothing of them stays behind."""

import copy
import gc
import random
import threading

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_ops.tracing import Untraceable, compiled, trace, unchanged
from tests.support import randn
from tests.test_chains import of

KEPT = []


class Helper(nn.Module):
    """A child whose methods other modules call."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls, self.seen, self.gain = nn.Conv2d(3, 3, 3, padding=1), 0, [], 2.0

    def counts(self, x):
        self.calls += 1
        return self.conv(x)

    def keeps(self, x):
        self.last = x
        return self.conv(x)

    def collects(self, x):
        self.seen.append(x)
        return self.conv(x)

    def scales(self, x):
        return self.conv(x) * self.gain


def module(forward):
    """With a buffer, a parameter, a tensor that is neither, and a Helper."""
    made = of(forward, helper=Helper())
    made.register_buffer("steps", torch.zeros(()))
    made.gamma, made.plain, made.items, made.scale = nn.Parameter(torch.ones(())), torch.ones(()), [1], 1.5
    return made


def evaluated(made):
    return trace(made, training=False, grad=False)


def _returns_early(self, x):
    try:
        if x.sum() > 0:
            return x
    except Exception:
        pass
    return self.conv(x)


def _without_gradients(self, x):
    with torch.no_grad():
        return self.conv(x)


def _with_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.conv(x)


def _in_inference_mode(self, x):
    with torch.inference_mode():
        return self.conv(x)


def _sets_data(self, x):
    x.data = x * 2
    return self.conv(x)


def _keeps_it(self, x):
    KEPT.append(x)
    return self.conv(x)


FOREIGN = nn.ReLU()
REFUSED = {
    "a branch on a value": (lambda self, x: x if x.sum() > 0 else self.conv(x), "branches on a value"),
    "a branch on a shape": (lambda self, x: x if x.shape[0] > 2 else self.conv(x), "branches on a value"),
    "a branch on a parameter": (lambda self, x: x if self.gamma > 0 else self.conv(x), "branches on a value"),
    "a branch on a buffer": (lambda self, x: x if self.steps > 0 else self.conv(x), "branches on a value"),
    "a branch on a tensor": (lambda self, x: x if self.plain > 0 else self.conv(x), "branches on a value"),
    "a branch that is caught": (_returns_early, "branches on a value"),
    "isinstance": (lambda self, x: x if isinstance(x, torch.Tensor) else self.conv(x), "asks for the type"),
    "isinstance of a shape": (lambda self, x: self.conv(x) if isinstance(x.shape, tuple) else x, "asks for the type"),
    "torch.is_tensor": (lambda self, x: self.conv(x) if torch.is_tensor(x) else x, "asks for the type"),
    "print": (lambda self, x: self.conv(x) * len(f"{x}"), "prints a value"),
    "print a shape": (lambda self, x: self.conv(x) * len(f"{x.shape}"), "prints a value"),
    "print its representation": (lambda self, x: self.conv(x) * len(repr(x)), "prints a value"),
    "count": (lambda self, x: self.conv(x) * len(x), "makes a number of a value"),
    "make a number": (lambda self, x: self.conv(x) * int(x.sum()), "makes a number of a value"),
    "loop": (lambda self, x: self.conv(sum(x)), "loops over a value"),
    "look for": (lambda self, x: self.conv(x) if 1 in x else x, "loops over a value"),
    "set a part": (lambda self, x: x.__setitem__(0, 1) or self.conv(x), "changes a part of a value"),
    "set an attribute": (lambda self, x: setattr(self, "scale", 2) or self.conv(x), "sets self.scale"),
    "set another's attribute": (lambda self, x: self.helper.counts(x), "sets self.helper.calls"),
    "set another's attribute to a value": (lambda self, x: self.helper.keeps(x), "sets self.helper.last"),
    "set a value's attribute": (_sets_data, "sets .data of a value"),
    "delete an attribute": (lambda self, x: delattr(self, "scale") or self.conv(x), "sets self.scale"),
    "read a list": (lambda self, x: self.conv(x) * self.items[0], "reads self.items, a list"),
    "read another's list": (lambda self, x: self.helper.collects(x), "reads self.helper.seen, a list"),
    "read its dictionary": (lambda self, x: self.conv(x) * vars(self)["scale"], "reads self.__dict__, a dict"),
    "list its children": (lambda self, x: next(iter(self.children()))(x), "calls self.children"),
    "call another's method": (lambda self, x: self.conv._conv_forward(x, self.conv.weight, None), "_conv_forward"),
    "call forward without hooks": (lambda self, x: self.conv.forward(x), "calls self.conv.forward"),
    "call a module of nobody": (lambda self, x: FOREIGN(self.conv(x)), "calls a ReLU that is not below it"),
    "call itself": (lambda self, x: self(x), "calls a Written that is not below it"),
    "draw from Python": (lambda self, x: self.conv(x) if random.random() < 2 else x, "draws random numbers"),
    "draw from numpy": (lambda self, x: self.conv(x) if numpy.random.rand() < 2 else x, "draws random numbers"),
    "draw from torch": (lambda self, x: self.conv(x) if torch.rand(()) < 2 else x, "calls rand, which"),
    "make a tensor": (lambda self, x: self.conv(x) + torch.ones(1), "calls ones, which"),
    "use a tensor of nobody": (lambda self, x: self.conv(x) + KNOWN, "uses a tensor that is no attribute"),
    "switch gradients": (_without_gradients, "calls _set_grad_enabled"),
    "switch autocast": (_with_autocast, "switches autocast or inference mode"),
    "switch inference mode": (_in_inference_mode, "switches autocast or inference mode"),
    "keep a value": (_keeps_it, "keeps a value"),
    "keep a value and branch": (lambda self, x: self.conv(x) if _keeps_it(self, x).sum() else x, "branches on a value"),
    "pack it": (lambda self, x: nn.utils.rnn.pack_padded_sequence(self.conv(x), x), "asks for the type"),
}
KNOWN = torch.ones(())
METHODS = {name: vars(nn.Module).get(name) for name in ("__getattribute__", "__getattr__", "__setattr__", "__call__")}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_would_not_repeat_is_refused_and_undone(case):
    forward, why = REFUSED[case]
    made = module(forward)
    before = {part: dict(vars(part)) for part in made.modules()}
    state = copy.deepcopy(made.state_dict())
    generators = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state()
    with pytest.raises(Untraceable, match=why.replace(".", r"\.")):
        evaluated(made)
    assert all(vars(part) == was for part, was in before.items()) and not made.helper.seen and not KEPT
    assert all(torch.equal(made.state_dict()[name], value) for name, value in state.items())
    assert generators[:2] == (random.getstate(), str(numpy.random.get_state()))
    assert torch.equal(generators[2], torch.get_rng_state())
    assert {name: vars(nn.Module).get(name) for name in METHODS} == METHODS


def test_no_proxy_stays_anywhere():
    for forward, _ in REFUSED.values():
        with pytest.raises(Untraceable):
            evaluated(module(forward))
    evaluated(module(_uses_everything))
    gc.collect()
    assert not [value for value in gc.get_objects() if issubclass(type(value), fx.Proxy)]


def _uses_everything(self, x):
    self.steps.add_(1)
    y = self.helper.scales(x) * self.gamma + self.plain * self.scale
    y += x.mean((2, 3), keepdim=True)
    batch, _, _, _ = x.shape
    return F.dropout(y, 0.5, self.training).view(batch, -1) * (2 if hasattr(self, "more") else 1)


def test_a_graph_does_what_the_forward_does():
    made, x = module(_uses_everything), randn(2, 3, 5, 5)
    seen = evaluated(made)
    run, twin = compiled(seen.graph), copy.deepcopy(made)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(run(made, x), twin(x))
    assert made.steps == twin.steps == 2


CHANGES = {
    "a constant": lambda made: setattr(made, "scale", 3.0),
    "a constant's type": lambda made: setattr(made, "scale", torch.tensor(1.5)),
    "another's constant": lambda made: setattr(made.helper, "gain", 3.0),
    "another's method": lambda made: setattr(made.helper, "scales", lambda x: x),
    "what was not there": lambda made: setattr(made, "more", True),
    "a parameter": lambda made: setattr(made, "gamma", None),
    "a tensor": lambda made: setattr(made, "plain", 3.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_read_is_noticed_when_it_changes(change):
    made = module(_uses_everything)
    reads = evaluated(made).reads
    assert all(unchanged(*place, value) for place, value in reads.items())
    CHANGES[change](made)
    assert not all(unchanged(*place, value) for place, value in reads.items())


def test_the_mode_is_what_was_asked_for_in_every_module():
    made = module(lambda self, x: self.conv(x) if self.training else self.bn(self.conv(x)))
    child = module(lambda self, x: self.conv(x) if self.bn.training else self.bn(self.conv(x)))
    for each in (made, child):
        for training, calls in ((True, ["conv"]), (False, ["conv", "bn"])):
            graph = trace(each, training=training, grad=True).graph
            assert [node.target for node in graph.nodes if node.op == "call_module"] == calls
    assert not child.bn.training and evaluated(child).reads[child.bn, "training"] is False


def test_looking_into_children_is_noted():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.named, self.none = nn.ModuleDict({"a": nn.ReLU()}), nn.ModuleList()
            self.some = nn.ModuleList([nn.Sequential(nn.ReLU()), Helper()])

        def forward(self, x):
            for each in (*self.some, *self.none):
                x = each.conv(x) if hasattr(each, "conv") else each(x)
            return self.named["a"](x)

    made = Written()
    assert {*evaluated(made).parts} == {made, made.named, made.none, made.some, made.some[0], made.some[1]}


def test_threads_do_not_see_each_others_traces():
    made, x = module(_uses_everything), randn(2, 3, 5, 5)
    plain, wrong = nn.Sequential(*[nn.Linear(5, 5) for _ in range(4)]), []
    start = threading.Barrier(4)

    def traces():
        start.wait()
        for _ in range(3):
            if str(evaluated(made).graph) != wanted:
                wrong.append("another graph")

    def calls():
        start.wait()
        for _ in range(40):
            plain.note = plain(x).shape

    def guarded(run):
        try:
            run()
        except BaseException as error:
            wrong.append(repr(error))

    wanted = str(evaluated(made).graph)
    threads = [threading.Thread(target=guarded, args=(run,)) for run in (traces, calls, traces, calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and vars(nn.Module).get("__getattribute__") is None
