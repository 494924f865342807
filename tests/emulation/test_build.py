"""Building the emulator: what it says where something is missing, and when it builds again."""

import json

import pytest

from fused_ops.core import extension
from tests.emulation import build


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("COMPILER", "no-such-g++", "no no-such-g++"),
        ("COMPILER", "true", "true is not GCC"),
        ("_ninja", lambda: None, "no ninja"),
        ("cuda_headers", lambda: None, "no CUDA headers (cuda_runtime.h in CUDA_HOME/include or beside nvcc)"),
    ],
)
def test_what_is_missing_is_one_line_and_no_error(name, value, said, monkeypatch, capsys):
    if name != "COMPILER" and build.missing() is not None:
        pytest.skip(build.missing())
    monkeypatch.setattr(build, name, value)
    monkeypatch.setattr(build, "build", lambda: pytest.fail("it builds"))
    assert build.main() == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fused_ops: ") and said in line and line.endswith("; the CUDA kernels are not emulated")


def test_headers_are_found_where_cuda_home_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.cuda_headers() is None
    (tmp_path / "include").mkdir()
    (tmp_path / "include/cuda_runtime.h").touch()
    assert build.cuda_headers() == tmp_path / "include"


@pytest.mark.skipif(not extension.EMULATOR.is_file(), reason="_emu.so was not built")
def test_it_names_the_sources_that_changed(monkeypatch, tmp_path):
    body, mark, tail = extension.EMULATOR.read_bytes().rpartition(extension.TRAILER)
    facts = json.loads(tail)
    assert {"rnn/cells.cuh", "common/check.h", "emulation/common/tensor.h", "emulation/check.cpp"} <= set(
        facts["sources"]
    )
    before = build.stale()
    facts["sources"] = {**facts["sources"], "rnn/cells.cuh": "0" * 64, "gone.cuh": "0" * 64}
    (tmp_path / "_emu.so").write_bytes(body + mark + json.dumps(facts).encode())
    assert build.stale(tmp_path / "_emu.so") == sorted({*before, "gone.cuh", "rnn/cells.cuh"})


def test_a_source_of_another_content_but_an_old_date_is_built_again(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(build, "BUILD", tmp_path)
    monkeypatch.setattr(build, "_rules", lambda folders: "")
    monkeypatch.setattr(build, "_run", lambda folder, *arguments: runs.append(arguments) or "ninja: no work to do.")
    monkeypatch.setattr(build, "sources", lambda: {"rnn.cells.o": build.CSRC / "rnn/cells.cu"})
    (tmp_path / "_emu.so").write_bytes(b"linked")
    library = tmp_path / "sealed/_emu.so"
    library.parent.mkdir()
    build.build(library)
    assert runs == [(), ("-t", "deps")] and library.read_bytes().startswith(b"linked\nfused_ops:")
    runs.clear()
    build.build(library)
    assert runs == [(), ("-t", "clean"), (), ("-t", "deps")]
