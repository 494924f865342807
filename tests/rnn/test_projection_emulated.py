"""The projection's CUDA kernel on the CPU: against float64, its accesses checked."""

import re

import pytest
import torch

import fused_ops.rnn.layers  # noqa: F401  (defines the op)
from tests.emulation import every_schedule, needs_emulator, run_on
from tests.emulation.build import build_mutant
from tests.support import assert_accurate, randn

pytestmark = needs_emulator

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (rows, depth, columns): whole tiles, parts of them, several slices of the depth, rows that start anywhere.
SIZES = ((128, 64, 128), (131, 72, 136), (3, 33, 7), (9, 258, 65), (1, 2, 1))


def project(x, weight, bias=None):
    return torch.ops.fused_ops.rnn_project_cuda(x, weight, bias)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To what the tensor cores multiply, in float64: float32 to tf32, to the nearest, ties away from zero."""
    if x.dtype != torch.float32:
        return x.double()
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def inputs(rows, depth, columns, dtype):
    return randn(rows, depth, dtype=dtype, seed=1), randn(columns, depth, dtype=dtype, seed=2), randn(columns, seed=3)


def check(sizes, dtype):
    x, weight, bias = inputs(*sizes, dtype)
    exact = rounded(x) @ rounded(weight).t()
    out = project(x, weight)
    assert out.dtype == torch.float32
    assert_accurate(out, exact, terms=sizes[1])
    assert_accurate(project(x, weight, bias), exact + bias.double(), terms=sizes[1])


@every_schedule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values(sizes, dtype):
    check(sizes, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_integers_are_exact(dtype):
    x, weight = ((randn(n, 100, seed=n) * 3).round().to(dtype) for n in (40, 70))
    assert torch.equal(project(x, weight).double(), x.double() @ weight.double().t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_alone_and_in_any_batch(dtype):
    x, weight, bias = inputs(150, 130, 70, dtype)
    whole = project(x, weight, bias)
    assert torch.equal(whole, project(x, weight, bias))
    for rows in (slice(149, 150), slice(37, 137), slice(5, 6)):
        assert torch.equal(project(x[rows], weight, bias), whole[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_that_start_anywhere(dtype):
    x, weight, bias = inputs(5, 64, 9, dtype)
    odd = torch.empty(x.numel() + 1, dtype=dtype)[1:].view_as(x).copy_(x)
    assert odd.data_ptr() % 16 == x.element_size()
    assert torch.equal(project(odd, weight, bias), project(x, weight, bias))
    wide = torch.stack((weight, weight + 1), 2)[..., 0]
    assert torch.equal(project(x, wide, bias), project(x, weight, bias))


def test_nan_stays_in_its_row():
    x, weight, bias = inputs(6, 40, 10, torch.float16)
    dirty = x.index_fill(0, torch.tensor([1, 4]), float("nan"))
    out = project(dirty, weight, bias)
    assert out[[1, 4]].isnan().all()
    assert torch.equal(out[[0, 2, 3, 5]], project(x, weight, bias)[[0, 2, 3, 5]])


def test_nothing_to_sum_and_nothing_to_do():
    x, weight, bias = inputs(3, 0, 4, torch.float32)
    assert torch.equal(project(x, weight, bias), bias.expand(3, 4))
    assert torch.equal(project(x, weight), torch.zeros(3, 4))
    assert project(randn(0, 5), randn(4, 5)).shape == (0, 4)
    assert project(randn(3, 5), randn(0, 5)).shape == (3, 0)


def test_opcheck():
    torch.library.opcheck(torch.ops.fused_ops.rnn_project_cuda.default, inputs(3, 10, 5, torch.bfloat16))


def test_what_it_cannot_serve_is_said():
    x, weight, bias = inputs(3, 8, 4, torch.float32)
    for arguments, said in (
        ((x.double(), weight.double()), "takes float32, float16 or bfloat16"),
        ((x, weight.half()), "weight must have x's dtype"),
        ((x, weight[:, 1:]), "weight has the wrong shape"),
        ((x, weight, bias[1:]), "bias has the wrong shape"),
        ((x, weight, bias.double()), "reads Float from a tensor of Double"),
    ):
        with pytest.raises(RuntimeError, match=said):
            project(*arguments)


# What is replaced in projection.cuh, and what is said of it.
MUTANTS = {
    "a slice is read before its copies have landed": (
        "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();", r"copy by .* has not been waited for"
    ),
    "a slice is read before the others' parts are there": (
        "__syncthreads();  //", ";  //", r"rnn_project_kernel<.*: reads shared memory, .* nobody has written"
    ),
    "rows past the end are read": (
        "row < rows && k < depth", "k < depth", r"rnn_project_kernel<.*out of bounds: reads 16 bytes"
    ),
    "two at a time into odd rows": (
        "both && p.columns % 2 == 0", "both", r"an access at an address that is no multiple of 8"
    ),
}  # fmt: skip
CASE = (
    "import torch, fused_ops.rnn.layers; from tests.rnn.test_projection_emulated import check; "
    "check((133, 272, 67), torch.float16)"
)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_caught(name, tmp_path):
    old, new, said = MUTANTS[name]
    library = build_mutant(tmp_path / "build", "rnn/projection.cu", ("rnn/projection.cuh", old, new))
    done = run_on(library, CASE, tmp_path / "package")
    assert done.returncode == 1 and re.search(said, done.stderr), done.stderr


def test_the_same_case_passes_with_the_right_kernel():
    exec(CASE, {})
