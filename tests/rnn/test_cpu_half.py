"""The C++ sequences of half types: stored in them, computed in float32."""

from dataclasses import replace

import pytest
import torch

from fused_ops.core.extension import has_kernel
from fused_ops.rnn import op, reference
from tests.rnn.common import MODES, Case
from tests.rnn.test_cpu_extras import EVERYTHING, call_of, converted, rows_of, run
from tests.support import assert_accurate, poisoned_memory

pytestmark = pytest.mark.skipif(not has_kernel("rnn_bwd_cpu", "CPU"), reason="_C.so was not built")

HALVES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
CASES = (*(Case(mode) for mode in MODES), Case("lstm", proj=7))


@HALVES
@pytest.mark.parametrize("extras", ((), ("masks", "zones"), ("zoneout",), EVERYTHING), ids="+".join)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_result_is_rounded_once(case, extras, dtype):
    """Values are those of float64 on the same tensors to half an ulp; gradients to one: what comes in is rounded."""
    case = replace(case, time=9, batch=6, inputs=9, hidden=19, layers=2, bidirectional=True)
    tensors, params, static = call_of(case, extras)
    tensors, params = converted(tensors, dtype, torch.float64), converted(params, dtype, torch.float64)
    exact = run(reference.maths, tensors, params, static)
    with poisoned_memory():
        found = run(op.sequence_cpu, tensors, params, static, dtype)
    for part, ulps in ((0, 0.51), (1, 1.0)):
        for value, wanted in zip(found[part], exact[part], strict=True):
            assert value.dtype == dtype
            assert_accurate(value, wanted, ulps=ulps)


@HALVES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_more_wrong_than_torchs_own(case, dtype):
    case = replace(case, time=9, batch=6, inputs=9, hidden=19, layers=2, bidirectional=True)
    tensors, params, static = call_of(case, ragged=False)
    tensors, params = converted(tensors, dtype, torch.float64), converted(params, dtype, torch.float64)
    static = static._replace(all_states=False)
    exact = run(reference.sequence, tensors, params, static)
    theirs = run(reference.sequence, tensors, params, static, dtype)
    found = run(op.sequence_cpu, tensors, params, static, dtype)
    for part, factor in ((0, 2), (1, 3)):
        for value, wanted, rounded in zip(found[part], exact[part], theirs[part], strict=True):
            assert_accurate(value, wanted, rounded, factor=factor, ulps=1.0)


@torch.no_grad()
@HALVES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rows_bits_do_not_depend_on_the_batch(case, dtype):
    case = replace(case, time=6, batch=37, inputs=9, hidden=38, layers=2, bidirectional=True)
    tensors, params, static = call_of(case, ("masks", "zones"))
    tensors, params = converted(tensors, dtype), converted(params, dtype)
    whole = op.sequence_cpu(tensors, params, static, 0.0)
    for rows in ([0], [3, 4], list(range(8)), [36, 0, 12, 12]):
        found = op.sequence_cpu(rows_of(tensors, rows), params, static, 0.0)
        assert all(torch.equal(a, b[..., rows, :]) for a, b in zip(found, whole, strict=True))


def test_what_is_not_of_the_inputs_type_is_refused():
    tensors, params, static = call_of(Case(), ragged=False)
    held = converted(tensors, torch.bfloat16)
    with pytest.raises(RuntimeError, match="params must be float32"):
        op.sequence_cpu(held, params, static, 0.0)
    with pytest.raises(RuntimeError, match="input must be float32"):
        op.sequence_cpu(tensors, params, static, 0.0)
