"""The cells' kernels on a GPU."""

import pytest
import torch

from tests.rnn.test_cells import CELLS, DTYPES, SIZES, check_kernel
from tests.support import noncontiguous, randn

pytestmark = pytest.mark.gpu
BACKENDS = (
    pytest.param("cuda", marks=pytest.mark.kernel("rnn.cells.cuda")),
    pytest.param("triton", marks=pytest.mark.kernel("rnn.cells.triton")),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_kernels(backend, cell, sizes, dtype):
    check_kernel(cell, backend, sizes, dtype, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_kernels_take_views_and_pass_nan_on(backend):
    for kind, gates in (("rnn", 1), ("gru", 3), ("lstm", 4)):
        function = getattr(torch.ops.fused_ops, f"{kind}_cell_fwd_{backend}")
        gi, gh, state = (
            randn(4, gates * 33, device="cuda"),
            randn(4, gates * 33, seed=1, device="cuda"),
            randn(4, 33, device="cuda"),
        )
        last = (True,) if kind == "rnn" else (state,)
        gi[2, 5] = float("nan")
        wanted = function(gi, gh, *last)
        views = (noncontiguous(gi), gh.T.contiguous().T, *((noncontiguous(state),) if kind != "rnn" else last))
        for found, value in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (function(*views), wanted))):
            assert torch.equal(found.nan_to_num(9.0), value.nan_to_num(9.0)) and value[2, 5].isnan()
            assert value.isnan().sum() == 1
