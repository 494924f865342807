"""torch's own cases for its convolutions and pooling, run through this package."""

import itertools

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

import fused_ops
from tests.support import assert_accurate

CASES = {"nn.functional.conv1d": "conv1d", "nn.functional.conv2d": "conv2d", "nn.functional.max_pool2d": "max_pool2d"}
INFOS = {CASES[info.name]: info for info in op_db if info.name in CASES}


def test_torch_still_has_these_cases():
    assert set(INFOS) == set(CASES.values())


@pytest.mark.parametrize("name", sorted(CASES.values()))
def test_samples_agree_with_torch(name):
    samples = INFOS[name].sample_inputs("cpu", torch.float64, requires_grad=True)
    for sample in itertools.islice(samples, 60):
        call = (sample.input, *sample.args)
        want = INFOS[name].op(*call, **sample.kwargs)
        got = getattr(fused_ops, name)(*call, **sample.kwargs)
        pairs = [(got, want)] if isinstance(want, torch.Tensor) else list(zip(got, want, strict=True))
        for mine, theirs in pairs:
            assert mine.stride() == theirs.stride()
            assert_accurate(mine, theirs)
        if pairs[0][1].requires_grad:
            mine, theirs = (torch.autograd.grad(out.sum(), sample.input) for out, _ in (pairs[0], pairs[0][::-1]))
            assert_accurate(mine[0], theirs[0])


@pytest.mark.parametrize("name", sorted(CASES.values()))
def test_torchs_error_cases_raise_the_same_kind(name):
    if INFOS[name].error_inputs_func is None:
        pytest.skip("torch lists no error cases")
    for case in INFOS[name].error_inputs("cpu"):
        sample = case.sample_input
        with pytest.raises(case.error_type, match=case.error_regex):
            getattr(fused_ops, name)(sample.input, *sample.args, **sample.kwargs)
