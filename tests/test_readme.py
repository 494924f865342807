"""The README: its examples run, its generated tables are current."""

import re

import pytest

import fused_ops
from bench import readme
from bench.pretrained import WeightsMissing
from fused_ops.core.dispatch import OPS

TEXT = readme.README.read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("code", EXAMPLES, ids=["replace an op", "extras of an RNN", "fuse a model", "a photograph"])
def test_an_example_runs(code, capsys):
    try:
        exec(code, {})
    except WeightsMissing as missing:
        pytest.skip(str(missing))
    said = capsys.readouterr().out
    assert said
    if code == EXAMPLES[-1]:
        assert f"# {said.strip()}" in code


def test_the_measured_table_is_what_the_results_say():
    assert readme.blocks()["measured"] in TEXT


def test_the_support_matrix_has_every_op():
    block = re.search(r"<!-- support -->\n(.*?)<!-- /support -->", TEXT, re.S)[1]
    assert re.findall(r"^\| `(\w+)` \|", block, re.M) == sorted(OPS)


def test_a_block_that_is_gone_is_named():
    with pytest.raises(LookupError, match="0 blocks named support"):
        readme.renewed("no blocks here")


def test_every_public_name_has_a_docstring():
    public = [getattr(fused_ops, name) for name in dir(fused_ops) if not name.startswith("_") and name != "core"]
    assert all(value.__doc__ for value in public if callable(value))
