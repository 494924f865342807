"""Generated forwards: when they run, and that a module with one is otherwise what it was."""

import copy
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import fused_ops
from fused_ops.conv import blocks
from fused_ops.core.dispatch import record
from tests.support import randn
from tests.test_chains import Block, of, ops_of, trained

FAST = ["conv_bn_act2d"] * 2


def fused(module):
    """It with a generated forward, and a copy without."""
    plain = copy.deepcopy(module)
    fused_ops.fuse(module)
    return module, plain


def agree(found, wanted):
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_it_runs_its_own_forward_whenever_something_differs():
    x, module = randn(2, 4, 6, 6), trained(Block())
    fused_ops.fuse(module)
    fast = ["conv_bn_act2d"] * 2
    assert ops_of(module, x)[1] == fast

    def falls_back(change, undo):
        change()
        plain = fused_ops.unfuse(copy.deepcopy(module))
        value, ops = ops_of(module, x)
        with torch.no_grad():
            torch.testing.assert_close(value, plain(x))
        undo()
        assert ops != fast and ops_of(module, x)[1] == fast

    falls_back(module.train, module.eval)
    falls_back(module.bn2.train, module.bn2.eval)
    falls_back(lambda: setattr(module, "scale", 2.0), lambda: setattr(module, "scale", 1.0))
    for part in (module.conv1, module.bn2, module.relu):
        seen = []
        handle = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        ops = ops_of(module, x)[1]
        assert seen and (ops != fast or part is module.relu)
        handle.remove()
        assert ops_of(module, x)[1] == fast
    every = []
    falls_back(
        lambda: every.append(nn.modules.module.register_module_forward_hook(lambda *_: None)), lambda: every[0].remove()
    )
    module.relu.__class__ = nn.Tanh
    plain = fused_ops.unfuse(copy.deepcopy(module))
    with torch.no_grad():
        torch.testing.assert_close(ops_of(module, x)[0], plain(x))


def test_a_gradient_goes_through_its_own_forward():
    module, x = trained(Block()), randn(2, 4, 6, 6)
    plain = copy.deepcopy(module)
    fused_ops.fuse(module)
    for each in (module, plain):
        each(x).square().sum().backward()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    module.requires_grad_(False)
    with record() as choices:
        module(x)
    assert len(choices) == 2
    x.requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None


def test_other_children_are_other_chains():
    module, x = trained(Block()), randn(2, 4, 6, 6)
    fused_ops.fuse(module)
    module.shortcut = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    plain = fused_ops.unfuse(copy.deepcopy(module))
    value, ops = ops_of(module, x)
    assert len(ops) == 3
    with torch.no_grad():
        torch.testing.assert_close(value, plain(x))
    module.bn1 = nn.Identity()
    assert ops_of(module, x)[1] == ["conv2d", *FAST]
    nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert ops_of(module, x)[1] == ["conv2d"]


def test_optional_arguments_are_its_own():
    def forward(self, x, twice=False, *, plus=None):
        y = F.relu(self.bn(self.conv(x)))
        y = y * 2 if twice else y
        return y if plus is None else y + plus

    module, x = of(forward), randn(1, 3, 5, 5)
    plain = copy.deepcopy(module)
    fused_ops.fuse(module)
    assert ops_of(module, x)[1] == ["conv_bn_act2d"]
    with torch.no_grad():
        torch.testing.assert_close(module(x, True, plus=x), plain(x, True, plus=x))
        torch.testing.assert_close(module(x=x), plain(x=x))


def test_compiled():
    module, x = trained(Block(shortcut=True)), randn(2, 4, 6, 6)
    plain = copy.deepcopy(module)
    fused_ops.fuse(module)
    run = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(run(x), plain(x))
    module.train(), plain.train()
    run(x).sum().backward(), plain(x).sum().backward()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def _chain(self, x):
    return F.relu(self.bn(self.conv(x)))


def _with_function(self, x):
    return self.act(self.bn(self.conv(x)))


def _with_method(self, x):
    return self.impl(x)


def _with_more(self, x):
    return _chain(self, x) * (self.more if hasattr(self, "more") else 1)


def _with_child(self, x):
    return _chain(self, x) * (3 if self.other.training else self.other.p)


def _through_holder(self, x):
    return F.relu(self.holder.bn(self.holder.conv(x)) + x)


def _moved_past(self, x):
    y = self.conv(x)
    return self.bn(y) + self.other(x)


def holder():
    made = nn.Module()
    made.conv, made.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    return made


def seen(module):
    module.register_forward_hook(lambda module, args, value: value * 2)


def no_statistics(bn):
    bn.running_mean = bn.running_var = None


def written(module):
    return next(kind for kind in type(module).__mro__ if kind.__name__ == "Written")


def patch(name, function):
    return lambda module: setattr(module, name, types.MethodType(function, module))


# what the forward is, the children beside conv and bn, what is done to the fused module, whether its values change
CHANGES = {
    "a function": (_with_function, {}, lambda m: setattr(m, "act", torch.sigmoid), True),
    "a method": (_with_method, {}, patch("impl", lambda self, x: x + 1), True),
    "its class's method": (_with_method, {}, lambda m: setattr(written(m), "impl", lambda self, x: x), True),
    "its class's forward": (_chain, {}, lambda m: setattr(written(m), "forward", lambda self, x: x + 1), True),
    "its forward": (_chain, {}, patch("forward", lambda self, x: x + 1), True),
    "an attribute that was not there": (_with_more, {}, lambda m: setattr(m, "more", 3.0), True),
    "a child's attribute": (_with_child, {"other": nn.Dropout().eval()}, lambda m: setattr(m.other, "p", 0.25), True),
    "a child's mode": (_with_child, {"other": nn.Dropout().eval()}, lambda m: m.other.train(), True),
    "a child's hooks": (_through_holder, {"holder": holder()}, lambda m: seen(m.holder.bn), True),
    "a child's child": (_through_holder, {"holder": holder()}, lambda m: setattr(m.holder, "bn", nn.Identity()), True),
    "inplace": (_moved_past, {"other": nn.ReLU()}, lambda m: setattr(m.other, "inplace", True), False),
    "slope": (_with_function, {"act": nn.LeakyReLU()}, lambda m: setattr(m.act, "negative_slope", 0.5), True),
    "approximation": (_with_function, {"act": nn.GELU()}, lambda m: setattr(m.act, "approximate", "tanh"), False),
    "padding_mode": (_chain, {}, lambda m: setattr(m.conv, "padding_mode", "circular"), True),
    "padding": (_through_holder, {"holder": holder()}, lambda m: setattr(m.holder.conv, "padding", "same"), False),
    "no statistics": (_chain, {}, lambda m: no_statistics(m.bn), True),
    "eps": (_chain, {}, lambda m: setattr(m.bn, "eps", 1.0), True),
    "weight norm": (_chain, {}, lambda m: weight_norm(m.conv), False),
    "spectral norm": (_chain, {}, lambda m: spectral_norm(m.conv), True),
    "a parametrization": (_chain, {}, lambda m: parametrizations.weight_norm(m.conv), False),
    "pruning": (_chain, {}, lambda m: prune.l1_unstructured(m.conv, "weight", 0.5), True),
    "a compiled child": (_chain, {}, lambda m: m.conv.compile(backend="eager"), False),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_every_change_is_followed(change):
    forward, children, act, differs = CHANGES[change]
    module = of(forward, **copy.deepcopy(children))
    type(module).impl = _chain
    module.act = module.act if "act" in children else F.relu
    module, plain = fused(module)
    x = randn(2, 3, 5, 5)
    before, ops = ops_of(module, x)
    assert "conv_bn_act2d" in ops
    for each in (module, plain):
        torch.manual_seed(0)
        act(each)
    with torch.no_grad():
        value = module(x.clone())
        agree(value, plain(x.clone()))
    assert torch.allclose(value, before, rtol=1e-3, atol=1e-3) != differs


def test_padding_that_the_chain_cannot_take_any_more():
    module = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4))
    (module, plain), x = fused(trained(module)), randn(1, 4, 6, 6)
    for part, padding in ((0, (-1, -1, -1, -1)), (0, (0, 1, 0, 1)), (1, (1, 1))):
        for each in (module, plain):
            each[part].padding = padding
        with torch.no_grad():
            agree(module(x), plain(x))


def test_a_child_added_to_an_empty_list():
    def forward(self, x):
        x = self.bn(self.conv(x))
        for each in self.extra:
            x = each(x)
        return x

    module, plain = fused(of(forward, extra=nn.ModuleList()))
    for each in (module, plain):
        each.extra.append(nn.Tanh())
    with torch.no_grad():
        agree(module(randn(2, 3, 5, 5)), plain(randn(2, 3, 5, 5)))


def test_an_image_without_batch_is_refused_as_ever():
    module, _ = fused(of(_chain))
    with torch.no_grad(), pytest.raises(ValueError, match="4D"):
        module(randn(3, 3, 5))


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
def test_other_dtypes_and_no_images(dtype):
    module, plain = fused(trained(Block(shortcut=True)))
    module.to(dtype), plain.to(dtype)
    for x in (randn(2, 4, 6, 6, dtype=dtype), randn(0, 4, 6, 6, dtype=dtype)):
        with torch.no_grad():
            found, wanted = module(x), plain(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_autocast_is_torchs():
    module, plain = fused(trained(Block()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = module(randn(2, 4, 6, 6)), plain(randn(2, 4, 6, 6))
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("first", (True, False))
@pytest.mark.parametrize("last", ("conv", "input", "neither"))
def test_a_sum_lies_in_memory_as_torchs(first, last):
    module = of(lambda self, x: x + self.bn(self.conv(x)) if first else self.bn(self.conv(x)) + x)
    module, plain = fused(module)
    x = randn(2, 3, 5, 5)
    if last == "conv":
        module.to(memory_format=torch.channels_last), plain.to(memory_format=torch.channels_last)
    elif last == "input":
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found, wanted = module(x), plain(x)
    agree(found, wanted)
    assert found.stride() == wanted.stride()


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpointing(reentrant):
    module, plain = fused(trained(Block()))
    gradients = []
    for each in (module, plain):
        x = randn(2, 4, 6, 6).requires_grad_()
        checkpoint(each, x, use_reentrant=reentrant).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_functorch_and_forward_mode():
    module, plain = fused(trained(Block()))
    x = randn(2, 4, 6, 6)
    parameters, buffers = stack_module_state([module, copy.deepcopy(module)])
    with torch.no_grad():
        both = vmap(lambda *state: functional_call(module, state, (x,)))(parameters, buffers)
        agree(both[1], plain(x))
        agree(vmap(module)(x[:, None])[:, 0], plain(x))
        for found, wanted in zip(jvp(module, (x,), (x,)), jvp(plain, (x,), (x,))):
            agree(found, wanted)
        other = {name: value * 1.5 for name, value in module.state_dict().items()}
        agree(functional_call(module, other, (x,)), functional_call(plain, other, (x,)))


def test_a_replica_uses_its_own_weights():
    module, plain = fused(of(_chain))
    with torch.no_grad():
        module(randn(2, 3, 5, 5))
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        copied = replica._modules[name] = child._replicate_for_data_parallel()
        for key, value in child._parameters.items():
            setattr(copied, key, value.detach() * 2)
    for value in plain.parameters():
        value.data.mul_(2)
    with torch.no_grad():
        agree(replica(randn(2, 3, 5, 5)), plain(randn(2, 3, 5, 5)))


def test_threads_that_call_a_copy_for_the_first_time():
    module, plain = fused(trained(Block(shortcut=True)))
    twin, x, wrong, start = copy.deepcopy(module), randn(2, 4, 6, 6), [], threading.Barrier(4)
    with torch.no_grad():
        wanted = plain(x)

    def calls():
        try:
            start.wait()
            for _ in range(5):
                with torch.no_grad():
                    agree(twin(x), wanted)
                    agree(copy.deepcopy(twin)(x), wanted)
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=calls) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and ops_of(twin, x)[1] == ["conv_bn_act2d"] * 3


class NormAct(nn.BatchNorm2d):
    """As timm's: a batch norm that acts."""

    def __init__(self, features, act):
        super().__init__(features)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4 dimensions, got {x.ndim}")
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


def test_a_batch_norm_that_acts():
    def forward(self, x):
        return x + self.second(self.conv(self.bn(self.conv(x))))

    module, plain = fused(of(forward, bn=NormAct(3, nn.SiLU()), second=NormAct(3, nn.Identity())))
    x = randn(2, 3, 5, 5)
    value, ops = ops_of(module, x)
    agree(value, plain(x).detach())
    assert ops == FAST
    for change in (
        lambda m: setattr(m.bn, "act", nn.Tanh()),
        lambda m: seen(m.bn.act),
        lambda m: setattr(m.conv, "padding_mode", "circular"),
        lambda m: m.bn.train(),
    ):
        for each in (module, plain):
            change(each)
        with torch.no_grad():
            agree(module(x), plain(x))


def test_a_batch_norm_that_does_more_is_left_alone_and_named():
    class Doubles(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    class OwnEps(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, 1.0)

    class Swaps(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.bias, self.weight, False, 0.1, self.eps)

    for kind in (Doubles, OwnEps, Swaps):
        module = of(_chain, bn=kind(3))
        plain = copy.deepcopy(module)
        row = next(row for row in fused_ops.fuse(module) if row.fqn == "")
        assert row.new is None and kind.__name__ in row.reason
        with torch.no_grad():
            agree(module(randn(2, 3, 5, 5)), plain(randn(2, 3, 5, 5)))


def test_a_compiled_graph_has_the_chain_beside_leaves():
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    module, graphs = fused(trained(module))[0], []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    with torch.no_grad():
        torch.compile(module, fullgraph=True, backend=backend)(randn(2, 4, 6, 6))
    assert "run_chain" in graphs[0]


@pytest.mark.as_measured
def test_where_no_kernel_serves_a_chain_the_module_runs_as_it_is(monkeypatch):
    chains, run_chain = [], blocks.run_chain
    monkeypatch.setattr(blocks, "run_chain", lambda *args: chains.append(args) or run_chain(*args))
    module, plain = fused(trained(Block()))
    small, large = randn(2, 4, 6, 6), randn(8, 4, 96, 96).contiguous(memory_format=torch.channels_last)

    def chains_in(x, **how):
        chains.clear()
        agree(module(x, **how), plain(x, **how))
        return len(chains)

    with torch.no_grad():
        assert [chains_in(small) for _ in range(3)] == [2, 0, 0]  # looked at once
        assert [chains_in(large) for _ in range(3)] == [2, 2, 2]
        assert chains_in(small) == 0
        with fused_ops.use_backend("cpu"):
            assert chains_in(small) == 2
        assert ops_of(module, small)[1] == FAST
        assert chains_in(small.expand(2, 4, 6, 6).to(memory_format=torch.channels_last)) == 2  # other strides
        chains.clear()
        copy.deepcopy(module)(small)
        assert len(chains) == 2  # a copy looks for itself
