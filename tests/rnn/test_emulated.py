"""The cells' CUDA kernels on the CPU: against the float64 oracle, their accesses checked."""

import re

import pytest
import torch

import fused_ops
from tests.emulation import every_schedule, needs_emulator, run_on
from tests.emulation.build import build_mutant
from tests.rnn.test_cells import CELLS, DTYPES, SIZES, call, check_kernel, check_views_and_nan, inputs
from tests.support import randn

pytestmark = needs_emulator


@every_schedule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients(cell, sizes, dtype):
    check_kernel(cell, "cuda", sizes, dtype, "cpu")


def test_views_and_nan():
    check_views_and_nan("cuda", "cpu")


def test_units_that_start_anywhere():
    gi, gh, h = (randn(3, n, seed=n) for n in (24, 24, 8))
    odd = torch.empty(gi.numel() + 1)[1:].view_as(gi).copy_(gi)
    assert odd.data_ptr() % 16 == 4
    op = torch.ops.fused_ops.gru_cell_fwd_cuda
    assert torch.equal(op(odd, gh, h), op(gi, gh, h))


def test_opcheck_and_a_compiled_graph():
    gi, gh, c = (randn(3, n, seed=n) for n in (20, 20, 5))
    torch.library.opcheck(torch.ops.fused_ops.lstm_cell_fwd_cuda.default, (gi, gh, c))
    torch.library.opcheck(torch.ops.fused_ops.gru_cell_fwd_cuda.default, (gi[:, :15], gh[:, :15], c))
    torch.library.opcheck(torch.ops.fused_ops.rnn_cell_fwd_cuda.default, (gi, gh, False))
    tensors = inputs("gru_cell", 3, 4, 5, dtype=torch.float32)

    def run(*t):
        return fused_ops.gru_cell(*t, backend="cuda") * 2

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), run(*tensors))


def test_what_it_cannot_serve_is_said():
    with pytest.raises(fused_ops.BackendUnavailable, match="takes float32, float16 and bfloat16"):
        call("gru_cell", *inputs("gru_cell", 3, 4, 5), backend="cuda")
    with pytest.raises(RuntimeError, match="gh must be of the state's dtype"):
        torch.ops.fused_ops.gru_cell_fwd_cuda(randn(3, 15), randn(3, 15).half(), randn(3, 5))


# What is replaced in cells.cuh, and what is said of it.
MUTANTS = {
    "threads past the end go on": (
        "return index < rows * units;", "return true;", r"cell_fwd_kernel<float, 4.*: .* out of bounds: reads 16 bytes"
    ),
    "every row writes the first": (
        "now.store(out + state);", "now.store(out + at.unit * N);", r"race: writes a tensor, byte \d+, which .* wrote"
    ),
}  # fmt: skip
CASE = "import torch; from tests.rnn.test_cells import check_kernel; " + (
    "check_kernel('gru_cell', 'cuda', (3, 4, 64), torch.float32, 'cpu')"
)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_caught(name, tmp_path):
    old, new, said = MUTANTS[name]
    library = build_mutant(tmp_path / "build", "rnn/cells.cu", ("rnn/cells.cuh", old, new))
    done = run_on(library, CASE, tmp_path / "package")
    assert done.returncode == 1 and re.search(said, done.stderr), done.stderr


def test_the_same_case_passes_with_the_right_kernel():
    exec(CASE, {})
