"""common/tensor.h under the emulator: kernels reach what data() names, of the type it names, for as long as it says."""

import re

import pytest
import torch

from tests.emulation import kernels, needs_emulator
from tests.support import randn

pytestmark = needs_emulator
SCHEMAS = (
    "copy(Tensor input, Tensor(a!) output, int first, int count) -> ()",
    "copy_back(Tensor(a!) input, Tensor output, int count) -> ()",
    "copy_kept(Tensor(a!) output, int count) -> ()",
    "without_scope(Tensor tensor) -> int",
    "null_of_none(Tensor tensor, Tensor? none) -> int",
)


@pytest.fixture(scope="module")
def ops():
    with torch.library._scoped_library("fused_ops", "FRAGMENT") as library:
        for schema in SCHEMAS:
            library.define(f"emulation_test_{schema}")
        kernels.library("tensors")
        names = (schema.split("(")[0] for schema in SCHEMAS)
        yield {name: getattr(torch.ops.fused_ops, f"emulation_test_{name}").default for name in names}


def test_all_of_a_tensor_may_be_touched_with_what_its_strides_skip(ops):
    source, target = randn(9), torch.zeros(9)
    ops["copy"](source, target, 0, 9)
    assert torch.equal(source, target)
    ops["copy"](source[::2], target[::4].zero_(), 1, 8)  # from element 0 to 8 of either
    assert torch.equal(source, target.index_fill(0, torch.tensor([0]), source[0]))


@pytest.mark.parametrize(
    ("first", "count", "said"),
    [
        (0, 10, r"lane 9: out of bounds: reads 4 bytes .*the end of an input of 36 bytes \(.*tensors.cu:9\)"),
        (-1, 2, r"lane 0: out of bounds: reads 4 bytes 4 bytes before the start of an input of 36 bytes"),
    ],
)
def test_nothing_past_a_tensor_is_read(ops, first, count, said):
    inside = randn(30)[10:19]
    with pytest.raises(RuntimeError, match=f"fused_ops::test::copy_kernel: .* {said}"):
        ops["copy"](inside, torch.zeros(30), first, count)


def test_nothing_past_a_tensor_is_written(ops):
    target = torch.zeros(30)
    with pytest.raises(RuntimeError, match=r"out of bounds: writes 4 bytes .*the end of an output of 20 bytes"):
        ops["copy"](randn(30), target[10:15], 0, 6)
    with pytest.raises(RuntimeError, match="an access through a null pointer"):
        ops["copy"](randn(30), target[:0], 0, 1)


def test_an_input_is_not_written(ops):
    with pytest.raises(RuntimeError, match="writes an input, byte"):
        ops["copy_back"](randn(5), randn(5), 5)


def test_a_tensor_of_an_earlier_call_is_out_of_reach(ops):
    source = randn(9)
    ops["copy"](source, torch.zeros(9), 0, 9)
    with pytest.raises(RuntimeError, match="out of bounds: reads 4 bytes"):
        ops["copy_kept"](torch.zeros(9), 9)


def test_pointers_are_of_the_tensors_type_and_taken_within_a_scope(ops):
    for wrong, name in ((torch.float64, "Double"), (torch.int32, "Int")):
        with pytest.raises(RuntimeError, match=re.escape(f"a kernel reads Float from a tensor of {name}")):
            ops["copy"](randn(9).to(wrong), torch.zeros(9), 0, 9)
    with pytest.raises(RuntimeError, match="outside a DeviceScope"):
        ops["without_scope"](randn(3))
    assert ops["null_of_none"](randn(3), None) == 1
