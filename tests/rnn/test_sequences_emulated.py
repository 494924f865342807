"""Public sequences on the CUDA layers, emulated."""

import pytest
import torch

import fused_ops
from tests.emulation import capability, needs_emulator
from tests.rnn.common import MODES, Case
from tests.rnn.gpu_sequences import check, check_a_row_alone, check_extras, check_packed

pytestmark = needs_emulator


@pytest.mark.parametrize("what", ("plain", "lengths and resets"))
@pytest.mark.parametrize("mode, dtype", list(zip(MODES, (torch.bfloat16, torch.float16) * 2)), ids=str)
def test_values_and_gradients(mode, dtype, what):
    check("cuda", mode, dtype, what, "cpu")


@pytest.mark.parametrize("extras", (("norm",), ("masks", "zoneout"), ("masks", "norm", "zones")), ids="+".join)
@pytest.mark.parametrize("mode, dtype", list(zip(MODES, (torch.float16, torch.bfloat16) * 2)), ids=str)
def test_extras(mode, dtype, extras):
    check_extras("cuda", mode, extras, dtype, "cpu", packs="zones" in extras)


@pytest.mark.parametrize("chip", (80, 90))
def test_rows(chip):
    with capability(chip):
        check_a_row_alone("cuda", "lstm", torch.float16, "cpu")
        check_packed("cuda", torch.bfloat16, "cpu")


def test_a_compiled_graph():
    case = Case("gru", dtype=torch.float16, layers=2)
    tensors = case.tensors(requires_grad=True)

    def run(*inputs):
        return case.flat(*inputs, backend="cuda")

    torch._dynamo.reset()
    found, wanted = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), run(*tensors)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    ours, theirs = (torch.autograd.grad(sum(t.sum() for t in ts), tensors) for ts in (found, wanted))
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def hollow(hidden: int, proj: int = 0) -> list[torch.Tensor]:
    """An LSTM's call of the right shapes, without memory behind them."""
    rows, features = 4 * hidden, proj or hidden
    shapes = [(1, 1, 1), (1, 1, features), (1, 1, hidden), (rows, 1), (rows, features), (rows,), (rows,)]
    return [torch.zeros((), dtype=torch.float16).expand(s) for s in (*shapes, *([(proj, hidden)] if proj else []))]


def test_it_is_taken_by_name_only_and_says_what_it_cannot_serve():
    def explained(case, *, backend=None, tensors=None, **keywords):
        rows = fused_ops.explain(case.flat, *(tensors or case.tensors()), backend=backend, **keywords).rows
        return {name.split()[0]: (name, verdict, reason) for name, verdict, reason in rows}["cuda"]

    half = Case("lstm", dtype=torch.float16)
    label = "cuda (emulated, uncalibrated)"
    assert explained(half) == (label, "refused", "is taken by name only")
    assert explained(half, backend="cuda") == (label, "chosen", "asked for by backend=")
    for case, keywords, said in (
        (Case("lstm", dtype=torch.float32), {}, "TF32"),
        (Case("lstm", dtype=torch.float64), {}, "takes float32, float16 and bfloat16"),
        (Case("lstm"), {"tensors": hollow(4000, 2000)}, "hidden size 4000"),
        (Case("lstm"), {"tensors": hollow(3000)}, "hidden size 3000"),
        (Case("lstm"), {"tensors": hollow(5, 6)}, "at most as many features"),
    ):
        _, verdict, reason = explained(case, backend="cuda", **keywords)
        assert verdict == "refused" and said in reason
    for served in ({"proj": 3}, {}):
        assert explained(Case("lstm", dtype=torch.float16, **served), backend="cuda", zoneout=0.2)[1] == "chosen"
    outer = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert explained(Case("lstm", dtype=torch.float32), backend="cuda")[1] == "chosen"
    finally:
        torch.backends.cuda.matmul.fp32_precision = outer
