"""`python -m fused_ops.info` and the support matrix."""

import subprocess
import sys

import pytest
import torch

import fused_ops
from fused_ops import info
from fused_ops.core import device, dispatch, extension
from tests.core.test_import import PACKAGE


def test_the_matrix_is_made_from_the_registry(make_op, gpu_kernel, monkeypatch):
    monkeypatch.setattr(device, "TRITON_INSTALLED", False)
    monkeypatch.setattr(device, "architecture_missing", lambda index: None)
    monkeypatch.setattr(extension, "kernels_missing", "_C.so was not built")
    with torch.library._scoped_library("fused_ops", "FRAGMENT") as library:
        library.define("info_schema_alone(Tensor x) -> Tensor")
        make_op("cuda", "triton", "reference", op="a_new_op", cuda={"kernel": gpu_kernel.kernel})
        make_op("cpu", "reference", op="another", cpu={"needs": "info_schema_alone"})
        rows = {row.op: row.cells for row in info.support_matrix()}
        gpu_kernel.verify()
        verified_rows = {row.op: row.cells for row in info.support_matrix()}
    assert set(rows) == set(dispatch.OPS)
    assert rows["a_new_op"] == {
        "cuda": ("experimental", ""),
        "triton": ("missing", "triton is not installed"),
        "cpu": ("none", ""),
        "reference": ("yes", ""),
    }
    assert rows["another"]["cpu"] == ("missing", "_C.so was not built")
    assert verified_rows["a_new_op"]["cuda"].state == "yes"


def test_every_op_runs_on_reference():
    assert all(row.cells["reference"] == ("yes", "") for row in info.support_matrix())


def test_the_markdown_table_has_one_row_per_op_and_tells_each_reason_once():
    cells = {
        "cuda": info.Cell("missing", "no nvcc"),
        "triton": info.Cell("experimental"),
        "cpu": info.Cell("none"),
        "reference": info.Cell("yes"),
    }
    lines = info.markdown([info.Row("first", cells), info.Row("second", cells)]).splitlines()
    assert lines == [
        "| op | cuda | triton | cpu | reference |",
        "| --- | --- | --- | --- | --- |",
        "| `first` | missing (1) | experimental | - | yes |",
        "| `second` | missing (1) | experimental | - | yes |",
        "",
        "(1) no nvcc",
    ]


@pytest.mark.parametrize("arguments", [[], ["--markdown"]])
def test_the_command(arguments):
    command = [sys.executable, "-m", "fused_ops.info", *arguments]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in dispatch.OPS)
    if not arguments:
        assert torch.__version__ in done.stdout and sys.version.split()[0] in done.stdout
        assert "_C.so  " in done.stdout and "CPU" in done.stdout


def test_the_command_refuses_other_arguments():
    done = subprocess.run([sys.executable, "-m", "fused_ops.info", "--json"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "usage" in done.stderr


def test_public_names_are_there_and_the_reason_class_is_a_runtime_error():
    assert issubclass(fused_ops.BackendUnavailable, RuntimeError)
    assert {"use_backend", "explain", "scaled_dot_product_attention"} <= set(vars(fused_ops))
