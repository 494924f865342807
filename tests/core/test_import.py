"""`import fused_ops` in a fresh process: whatever is missing or broken, quiet, quick and without side effects."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import fused_ops

PACKAGE = Path(fused_ops.__file__).parent
BUILT = (PACKAGE / "_C.so").exists()
needs_kernels = pytest.mark.skipif(not BUILT, reason="_C.so was not built")

# Refuses one package as if it were not installed, in each of the ways an import can be refused.
BLOCKED = {
    "not found": "import sys; sys.modules['triton'] = None",
    "refused": """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Refuse())
""",
}

FACTS = """
import json, sys, time
import torch
began = time.process_time()
import fused_ops
seconds = time.process_time() - began
from fused_ops.core import device, dispatch, extension
schemas = {s.name.split('::')[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith('fused_ops::')}
x = torch.linspace(-1, 1, 48).reshape(1, 2, 3, 8)
print(json.dumps(dict(
    seconds=seconds,
    cuda=torch.cuda.is_initialized(),
    imported=[name for name in ('triton', 'torch._dynamo', 'torch._inductor', 'rich', 'numpy') if name in sys.modules
              and name not in before],
    triton=device.TRITON_INSTALLED,
    missing=extension.kernels_missing,
    schemas=sorted(schemas),
    ops=sorted(dispatch.OPS),
    out=fused_ops.scaled_dot_product_attention(x, x, x).flatten().tolist(),
    explained=str(fused_ops.explain(fused_ops.scaled_dot_product_attention, x, x, x)),
)))
"""


def python(package: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter that finds `package` alone, whatever is installed."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("FUSED_OPS", "TRITON"))}
    env.update(PYTHONPATH=str(package.parent), PYTHONDONTWRITEBYTECODE="1", **environment)
    alone = "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]"
    command = [sys.executable, "-W", "error::ImportWarning", "-c", f"{alone}\n{code}"]
    return subprocess.run(command, env=env, cwd=package.parent, capture_output=True, text=True, timeout=120)


def facts(package: Path, prelude: str = "") -> dict:
    done = python(package, f"{prelude}\nimport sys, torch; before = set(sys.modules)\n{FACTS}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 and done.stderr == "", f"import printed: {done.stdout}{done.stderr}"
    found = json.loads(lines[0])
    assert not found["cuda"]
    assert found["imported"] == []
    return found


@pytest.fixture
def package(tmp_path):
    """A copy of the installed package, to be damaged."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "fused_ops", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a whole installation says of itself."""
    root = tmp_path_factory.mktemp("whole") / "fused_ops"
    return facts(Path(shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__"))))


def test_a_whole_installation_imports_quietly(whole):
    assert whole["triton"] == (find_spec("triton") is not None)
    assert (whole["missing"] is None) == BUILT
    assert len(whole["ops"]) >= 1 and len(whole["schemas"]) >= 1


def damaged(kind: str, data: bytes) -> bytes | None:
    """The bytes of a `_C.so` that is broken in the way `kind` names; None for no file."""
    middle = len(data) // 2
    return {
        "deleted": lambda: None,
        "empty": lambda: b"",
        "cut at 100 bytes": lambda: data[:100],
        "cut at half": lambda: data[:middle],
        "cut at the last page": lambda: data[: data.rindex(b"\nfused_ops:") - 4096],
        "cut in the trailer": lambda: data[:-5],
        "a flipped byte": lambda: data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :],
        "another processor": lambda: data[:18] + b"\x08\x00" + data[20:],
    }[kind]()


DAMAGE = {
    "deleted": "was not built",
    "empty": "not a 64-bit ELF file",
    "cut at 100 bytes": "truncated",
    "cut at half": "truncated",
    "cut at the last page": "truncated",
    "cut in the trailer": "corrupt",
    "a flipped byte": "checksum",
    "another processor": "another processor",
}


@needs_kernels
@pytest.mark.parametrize("kind", DAMAGE)
def test_import_survives_a_broken_library_and_tells_the_reason(package, whole, kind):
    library = package / "_C.so"
    data = damaged(kind, library.read_bytes())
    library.unlink()
    if data is not None:
        library.write_bytes(data)
    found = facts(package)
    assert DAMAGE[kind] in found["missing"]
    assert found["schemas"] == whole["schemas"] and found["ops"] == whole["ops"]
    assert found["out"] == whole["out"]


@needs_kernels
def test_a_library_that_cannot_be_linked_is_only_a_reason(package, whole):
    """Whole, but with an undefined symbol: the loader refuses it."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = package.parent / "undefined.cpp"
    source.write_text('extern "C" int fused_ops_no_such_symbol(); int use = fused_ops_no_such_symbol();')
    (package / "_C.so").unlink()
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(package / "_C.so"), str(source)], check=True)
    found = facts(package)
    assert "did not load" in found["missing"] and "fused_ops_no_such_symbol" in found["missing"]
    assert found["schemas"] == whole["schemas"]


EMULATED = """
import torch, fused_ops
from fused_ops.core import extension
x, w = torch.ones(2, 3), torch.ones(3, 3)
print(extension.emulator_missing)
print(fused_ops.explain(fused_ops.rnn_tanh_cell, x, x, w, w, backend="cuda").rows[0])
print(fused_ops.rnn_tanh_cell(x, x, w, w).tolist())
"""


@needs_kernels
@pytest.mark.parametrize("kind", ["deleted", "cut at half", "a flipped byte"])
def test_import_survives_a_broken_emulator_and_tells_the_reason(package, kind):
    data = damaged(kind, (package / "_C.so").read_bytes())
    library = package / "_emu.so"
    library.unlink(missing_ok=True)
    if data is not None:
        library.write_bytes(data)
    done = python(package, EMULATED, FUSED_OPS_EMULATE="1")
    assert (done.returncode, done.stderr) == (0, "")
    reason, row, _ = done.stdout.splitlines()
    assert reason.startswith("_emu.so ") and DAMAGE[kind] in reason
    assert row == str(("cuda (emulated)", "refused", reason))


def test_without_the_variable_the_emulator_is_not_even_opened(package):
    (package / "_emu.so").unlink(missing_ok=True)
    (package / "_emu.so").mkdir()
    reason, row, _ = python(package, EMULATED).stdout.splitlines()
    assert reason == "FUSED_OPS_EMULATE=1 was not set"
    assert row == str(("cuda", "refused", "needs a tensor on a GPU"))


def test_import_survives_without_the_host_module(package, whole):
    for path in package.glob("_host*.so"):
        path.unlink()
    found = facts(package)
    assert found["out"] == whole["out"]
    done = python(package, "from fused_ops.core import extension as e; print(e.host, e.host_missing)")
    assert done.stdout.startswith("None _host did not load: ")


@pytest.mark.parametrize("how", BLOCKED)
def test_import_survives_without_triton(package, whole, how):
    found = facts(package, BLOCKED[how])
    assert found["triton"] is False
    assert found["schemas"] == whole["schemas"] and found["ops"] == whole["ops"]
    assert "triton is not installed" in found["explained"] or "needs a tensor on a GPU" in found["explained"]
    done = python(package, f"{BLOCKED[how]}\nimport runpy; runpy.run_module('fused_ops.info', run_name='__main__')")
    assert done.returncode == 0, done.stderr
    assert "triton         not installed" in done.stdout
    assert "triton is not installed" in done.stdout


def test_info_tells_the_stored_reason(package):
    (package / "_C.so").unlink(missing_ok=True)
    done = python(
        package, "import runpy, sys; sys.argv = ['info']; runpy.run_module('fused_ops.info', run_name='__main__')"
    )
    assert done.returncode == 0, done.stderr
    assert "_C.so was not built" in done.stdout
    matrix = done.stdout[done.stdout.index("backends") :]
    assert "missing (" in matrix and "(1) " in matrix
    rows = {line.split()[0] for line in matrix.splitlines()[2:] if line.startswith("  ")}
    assert "scaled_dot_product_attention" in rows


def test_import_patches_nothing_in_torch(package):
    code = """
import torch, torch.nn.functional as F
def members():
    spaces = (torch, torch.nn, F, torch.nn.Module, torch.Tensor, torch.nn.modules.rnn, torch.ops.aten)
    return [{name: id(value) for name, value in vars(space).items() if callable(value)} for space in spaces]
before = members()
import fused_ops
after = members()
print([{n for n in b if a.get(n) != b[n]} for a, b in zip(after, before)])
"""
    done = python(package, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([set()] * 7)


def test_import_takes_less_than_150_ms_over_torchs_own(package):
    """Processor time, the fastest of three: a neighbour must not fail this."""
    assert min(facts(package)["seconds"] for _ in range(3)) < 0.150
