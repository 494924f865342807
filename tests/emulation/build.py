"""Builds fused_ops/_emu.so, this package's CUDA kernels for the CPU: `python -m tests.emulation.build`.

Every csrc/*/*.cu, compiled as C++ against csrc/emulation and instrumented for its checker, and the emulator itself,
which is not. Incremental, by ninja, in build/emulation. Where a tool is missing, one line says so and nothing is built.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from torch.utils import cpp_extension

from fused_ops.core.extension import EMULATOR, TRAILER
from tests.gate import ROOT, find_nvcc

CSRC, BUILD = ROOT / "csrc", ROOT / "build/emulation"
COMPILER = os.environ.get("CXX", "g++")
LANGUAGE = (
    "-std=c++20 -fPIC -fvisibility=hidden -g1 -Wall -Wno-unknown-pragmas -DTORCH_TARGET_VERSION=0x020a000000000000"
)
KERNELS = (
    "-x c++ -include emulation/builtins.h -O1 -fsanitize=thread,undefined --param tsan-instrument-func-entry-exit=0"
    " -fno-sanitize=vptr"
)
# More flags of the kernels: "-O0 -g" to step through them.
EXTRA = os.environ.get("FUSED_OPS_EMULATE_FLAGS", "")
# The instrumentation calls csrc/emulation/sanitizer.cpp: libtsan and libubsan are not linked.
NINJA = """\
language = {language} {includes}
rule kernel
  command = {compiler} $language {kernels} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule emulator
  command = {compiler} $language -O2 -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} -shared -Wl,--no-undefined $in -o $out {link}
"""


def cuda_headers() -> Path | None:
    """The folder of cuda_runtime.h: CUDA_HOME's, or that of the nvcc at hand, which knows its own root."""
    nvcc = find_nvcc()
    roots = [os.environ.get("CUDA_HOME")]
    if nvcc:
        command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True).stderr
        roots.insert(0, (re.findall(r"^#\$ TOP=(.+)$", said, re.M) or [""])[0].strip())
    folders = [Path(root).resolve() / "include" for root in roots if root]
    return next((folder for folder in folders if (folder / "cuda_runtime.h").is_file()), None)


def _ninja() -> str | None:
    return shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def missing() -> str | None:
    """What the emulator cannot be built without, or None."""
    if shutil.which(COMPILER) is None:
        return f"no {COMPILER}"
    macros = subprocess.run([COMPILER, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True).stdout
    if "__GNUC__" not in macros or "__clang__" in macros:
        return f"{COMPILER} is not GCC, whose instrumentation the checker knows"
    if _ninja() is None:
        return "no ninja"
    return None if cuda_headers() else "no CUDA headers (cuda_runtime.h in CUDA_HOME/include or beside nvcc)"


def _rules(folders: Iterable[Path]) -> str:
    """The head of a build.ninja that looks for headers in `folders` first."""
    includes = [f"-I{folder}" for folder in (*folders, CSRC / "emulation", CSRC)]
    includes += [f"-isystem {folder}" for folder in (cuda_headers(), *cpp_extension.include_paths())]
    link = " ".join([*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu -lc10 -ldl -lpthread"])
    return NINJA.format(
        compiler=COMPILER,
        language=LANGUAGE,
        kernels=f"{KERNELS} {EXTRA}".strip(),
        includes=" ".join(includes),
        link=link,
    )


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _run(folder: Path, *arguments: str) -> str:
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    done = subprocess.run([_ninja(), "-C", str(folder), *jobs, *arguments], capture_output=True, text=True)
    if done.returncode:
        said = done.stdout + done.stderr
        raise RuntimeError(f"the emulator did not build:\n{said[max(said.find('FAILED'), 0) :]}")
    return done.stdout


def sources() -> dict[str, Path]:
    """What is compiled, by the name of its object, in the order of linking: of a function in two objects (one of std's,
    say) the first is taken, and the emulator must not call an instrumented one."""
    paths = [*sorted(CSRC.glob("emulation/*.cpp")), *sorted(CSRC.glob("*/*.cu"))]
    return {f"{path.parent.name}.{path.stem}.o": path for path in paths}


def build(library: Path = EMULATOR) -> Path:
    """All kernels. Does nothing where `library` is current."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = sources()
        lines = [f"build {name}: {'kernel' if p.suffix == '.cu' else 'emulator'} {p}" for name, p in objects.items()]
        text = "\n".join([_rules([]), *lines, f"build _emu.so: link {' '.join(objects)}", ""])
        _write(BUILD / "build.ninja", text)
        if "no work to do" in _run(BUILD) and library.is_file() and stale(library):
            _run(BUILD, "-t", "clean")  # a source has other content and an old date
            _run(BUILD)
        used = re.findall(rf"^    {re.escape(str(CSRC))}/(\S+)$", _run(BUILD, "-t", "deps"), re.M)
        _seal(BUILD / "_emu.so", library, {name: _hash(CSRC / name) for name in sorted(set(used))})
    return library


def build_mutant(folder: Path, kernel: str, *changes: tuple[str, str, str]) -> Path:
    """A library of csrc/`kernel` alone, with text replaced: `changes` are (file of csrc, old, new)."""
    build()
    for name, old, new in changes:
        mine = folder / name
        text = (mine if mine.exists() else CSRC / name).read_text()
        assert old in text, f"{name} has no {old!r}"
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text(text.replace(old, new))
    source = folder / kernel if (folder / kernel).exists() else CSRC / kernel
    emulator = " ".join(str(BUILD / name) for name, path in sources().items() if path.suffix == ".cpp")
    text = f"{_rules([folder])}\nbuild kernel.o: kernel {source}\nbuild _emu.so: link {emulator} kernel.o\n"
    (folder / "build.ninja").write_text(text)
    _run(folder)
    return folder / "_emu.so"


def _hash(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _seal(linked: Path, library: Path, hashes: dict[str, str]) -> None:
    """Copy `linked` to `library`, followed by a checksum and its sources' hashes, as setup.py does for _C.so."""
    body = linked.read_bytes()
    sealed = body + TRAILER + json.dumps({"crc32": zlib.crc32(body), "sources": hashes}).encode()
    if not library.exists() or library.read_bytes() != sealed:
        new = linked.with_name("sealed.so")
        new.write_bytes(sealed)
        new.replace(library)  # a process that has the old one mapped keeps it


def stale(library: Path = EMULATOR) -> list[str]:
    """Sources that are not what `library` was built from."""
    try:
        recorded = json.loads(library.read_bytes().rpartition(TRAILER)[2])["sources"]
    except (ValueError, KeyError, TypeError):  # damaged, or sealed by nobody
        recorded = {}
    names = {str(path.relative_to(CSRC)) for path in sources().values()} | recorded.keys()
    here = {name: _hash(CSRC / name) for name in names if (CSRC / name).is_file()}
    return sorted(name for name in names if here.get(name) != recorded.get(name))


def main() -> int:
    reason = missing()
    if reason is not None:
        print(f"fused_ops: {reason}; the CUDA kernels are not emulated", file=sys.stderr)
        return 0
    try:
        build()
    except RuntimeError as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
