"""The cells' kernels on a GPU."""

import pytest

from tests.rnn.test_cells import CELLS, DTYPES, SIZES, check_kernel, check_views_and_nan

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
    check_views_and_nan(backend, "cuda")
