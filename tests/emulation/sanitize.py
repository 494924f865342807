"""The emulated tests once more under AddressSanitizer: `python -m tests.emulation.sanitize` (make sanitize).

The kernels are compiled with -fsanitize=address,undefined in the place of the checker's instrumentation. It sees what
the checker cannot: an access past one tensor that lands in another, a local array overrun. Tests of what the checker
finds are left out. Where AddressSanitizer cannot start, one line says why.

This module is also the pytest plugin that makes the tests use those libraries.
"""

import inspect
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.emulation import build, kernels, set_checked
from tests.gate import ROOT

BUILD = ROOT / "build/sanitize"
KERNELS = (
    "-x c++ -include emulation/builtins.h -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr"
)
# In the source of a test that wants something of the checker, or builds a library of its own.
LEFT_OUT = re.compile(r"raises\(RuntimeError|RACE|build_mutant|run_on\(|compile_for_device")


def use_sanitized_libraries() -> None:
    build.KERNELS, build.BUILD, kernels.BUILD = KERNELS, BUILD / "kernels", BUILD / "tests"
    build.NINJA = build.NINJA.replace("{link}", "{link} -lasan")


def pytest_configure(config) -> None:
    use_sanitized_libraries()
    kernels.run = partial(_run_unchecked, kernels.run)
    set_checked(False)  # these kernels tell the checker nothing


def pytest_collection_modifyitems(config, items) -> None:
    left_out = [item for item in items if LEFT_OUT.search(inspect.getsource(item.function))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not LEFT_OUT.search(inspect.getsource(item.function))]


def _run_unchecked(run, *arguments, checked: bool = True, **options) -> None:
    run(*arguments, checked=False, **options)


def _package() -> Path:
    """A folder with fused_ops in it, whose _emu.so is the sanitized one."""
    import fused_ops
    from fused_ops.core.extension import EMULATOR

    package = BUILD / "package/fused_ops"
    package.mkdir(parents=True, exist_ok=True)
    for path in Path(fused_ops.__file__).parent.iterdir():
        link = package / path.name
        if path.name != EMULATOR.name and not link.is_symlink():
            link.symlink_to(path)
    build.build(package / EMULATOR.name)
    return package.parent


def _environment() -> dict[str, str]:
    """LD_PRELOAD of the sanitizer, and of the C++ library whose functions it replaces."""
    ask = [build.COMPILER, "-print-file-name=libasan.so", "-print-file-name=libstdc++.so.6"]
    libraries = subprocess.run([ask[0], ask[1]], capture_output=True, text=True).stdout.split()
    libraries += subprocess.run([ask[0], ask[2]], capture_output=True, text=True).stdout.split()
    options = "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=1"
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options, "FUSED_OPS_EMULATE": "1"}


def cannot_start(environment: dict[str, str]) -> str | None:
    """Why Python and torch do not run under AddressSanitizer here, or None."""
    done = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["it died"])[0] if done.returncode else None


def main() -> int:
    environment = _environment()
    reason = build.missing() or cannot_start(environment)
    if reason is not None:
        print(f"fused_ops: {reason}; nothing is run under AddressSanitizer", file=sys.stderr)
        return 0
    use_sanitized_libraries()
    package = _package()
    tests = [*sorted(ROOT.glob("tests/*/test_*emulated*.py")), *sorted(ROOT.glob("tests/emulation/test_*.py"))]
    for path in sorted(kernels.HERE.glob("kernels/*.cu")):
        kernels.compiled(path.stem)
    for path in sorted(kernels.HERE.glob("mutants/*.cu")):
        kernels.compiled(f"mutants/{path.stem}")
    environment["PYTHONPATH"] = f"{package}{os.pathsep}{ROOT}"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "-p",
        "tests.emulation.sanitize",
        "-p",
        "no:cacheprovider",
    ]
    command += ["--rootdir", str(ROOT), *sys.argv[1:], *map(str, tests)]
    return subprocess.run(command, cwd=package, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
