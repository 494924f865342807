"""Public sequences on a GPU."""

import pytest
import torch

from tests.rnn.common import MODES
from tests.rnn.gpu_sequences import WHAT, check, check_a_row_alone, check_extras, check_packed
from tests.rnn.test_layers_gpu import BACKENDS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, mode, dtype, what):
    check(backend, mode, dtype, what, "cuda")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows(backend, mode):
    check_a_row_alone(backend, mode, torch.bfloat16, "cuda")
    check_packed(backend, torch.bfloat16, "cuda")


@pytest.mark.parametrize("packs", (False, True), ids=("padded", "packed"))
@pytest.mark.parametrize("extras", (("norm",), ("masks", "zones"), ("norm", "masks", "zoneout")), ids="+".join)
@pytest.mark.parametrize("hidden", (5, 200))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extras(backend, mode, hidden, extras, packs):
    check_extras(backend, mode, extras, torch.bfloat16, "cuda", packs, hidden)
