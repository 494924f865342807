"""Builds fused_ops/_C.so (kernels: C++ always, CUDA where nvcc is found; LibTorch stable ABI, any torch >= 2.10) and
fused_ops._host (planners and build facts, pybind11).

Environment: FUSED_OPS_CUDA=auto|0|1 (FORCE_CUDA=1 is the same as 1), CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS,
NVCC_THREADS, DEBUG=1, CXX.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
BUILD = ROOT / "build"
ARCHES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")

try:
    from torch.utils import cpp_extension
    from torch.version import __version__ as torch_version
    from torch.version import cuda as torch_cuda
except ImportError:
    sys.exit("fused_ops builds against the torch you have, and found none.\nInstall torch >= 2.10 first, then run:\n"
             "  pip install --no-build-isolation .")  # fmt: skip


def run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def find_toolkit() -> tuple[Path, str] | None:
    """(root, version) of the CUDA toolkit to build with, or None to build without."""
    wanted = "1" if os.environ.get("FORCE_CUDA") == "1" else os.environ.get("FUSED_OPS_CUDA", "auto")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc") or shutil.which(
        "nvcc", path="/usr/local/cuda/bin")  # fmt: skip
    if nvcc is None:
        looked = f"{home}/bin (CUDA_HOME)" if home else "PATH and /usr/local/cuda/bin (CUDA_HOME is not set)"
        if wanted == "1":
            sys.exit(f"FUSED_OPS_CUDA=1 needs the CUDA compiler nvcc, which was not found.\nLooked in: {looked}.\n"
                     "Set CUDA_HOME to the toolkit's root, or FUSED_OPS_CUDA=0 to build the CPU kernels only.")  # fmt: skip
        print(f"fused_ops: no nvcc in {looked}: building the CPU kernels only", file=sys.stderr)
        return None
    # nvcc on PATH may be a wrapper script: the compiler itself knows its root.
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.M)
    root = Path(top[1].strip() if top else Path(nvcc).parent.parent).resolve()
    version = re.search(r"release (\d+\.\d+)", run(nvcc, "--version"))[1]
    if torch_cuda and torch_cuda.split(".")[0] != version.split(".")[0]:
        message = f"nvcc is CUDA {version}, torch was built with CUDA {torch_cuda}: the major versions must agree"
        if wanted == "1":
            sys.exit(f"{message}.\nFound nvcc in {root}.\nSet CUDA_HOME to a matching toolkit, or FUSED_OPS_CUDA=0.")
        print(f"fused_ops: {message}; building the CPU kernels only", file=sys.stderr)
        return None
    return root, version


def architectures(root: Path) -> str:
    known = set(re.findall(r"compute_(\d+)", run(root / "bin/nvcc", "--list-gpu-arch")))
    found = [arch for arch in ARCHES if re.sub(r"\D", "", arch) in known]
    found[-1] += "+PTX"
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(found)


def write_facts(**facts: str) -> None:
    """build/facts.h: what `_host` reports; rewritten only when it changes."""
    text = "".join(f'#define FUSED_OPS_{name} "{value}"\n' for name, value in facts.items())
    BUILD.mkdir(exist_ok=True)
    if not (BUILD / "facts.h").exists() or (BUILD / "facts.h").read_text() != text:
        (BUILD / "facts.h").write_text(text)


class Build(cpp_extension.BuildExtension):
    def initialize_options(self):
        super().initialize_options()
        self.build_temp = str(BUILD / "objects")  # an editable build would start in a fresh folder each time

    def get_ext_filename(self, name):
        path = Path(super().get_ext_filename(name))
        return str(path.with_name("_C.so") if name.split(".")[-1] == "_C" else path)

    def build_extension(self, extension):
        super().build_extension(extension)
        if extension.name == "fused_ops._C":  # a checksum, and the hash of every source: see core/extension.py
            path = Path(self.get_ext_fullpath(extension.name))
            files = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cuh", ".cu", ".h", ".cpp"))
            sources = {str(p.relative_to(ROOT / "csrc")): sha256(p.read_bytes()).hexdigest() for p in files}
            data = path.read_bytes()
            tail = json.dumps({"crc32": zlib.crc32(data), "sources": sources})
            path.write_bytes(data + b"\nfused_ops:" + tail.encode())


def extensions() -> list[Extension]:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        print("fused_ops: no C++ compiler (c++, or CXX): installing pure Python", file=sys.stderr)
        return []
    toolkit = find_toolkit()
    debug = os.environ.get("DEBUG", "0") not in ("", "0")
    flags = ["-O0", "-g"] if debug else ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
    cxx = [*flags, "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    sources, include, arches = sorted((ROOT / "csrc").glob("*/*_cpu.cpp")), [], ""
    link, nvcc = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"], []
    if toolkit:
        root, arches = toolkit[0], architectures(toolkit[0])
        cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = str(root)  # a CPU-only torch leaves it None
        os.environ["TORCH_CUDA_ARCH_LIST"] = arches
        sources += sorted((ROOT / "csrc").glob("*/*.cu"))
        include, libraries = [root / "include"], next(p for p in (root / "lib64", root / "lib") if p.is_dir())
        link += [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        nvcc = [*(["-O0", "-g", "-G"] if debug else ["-O3", "-lineinfo"]), "-std=c++20", "--expt-relaxed-constexpr",
                "-Xcompiler=-fvisibility=hidden", "--threads", os.environ.get("NVCC_THREADS", "1")]  # fmt: skip
    write_facts(COMPILER=run(compiler, "--version").splitlines()[0], NVCC=toolkit[1] if toolkit else "",
                ARCH_LIST=arches, FLAGS=" ".join(flags), TORCH=torch_version)  # fmt: skip
    common = dict(include_dirs=[str(ROOT / "csrc"), str(BUILD)], language="c++")
    kernels = Extension("fused_ops._C", [str(path.relative_to(ROOT)) for path in sources],
                        extra_compile_args={"cxx": cxx, "nvcc": nvcc}, extra_link_args=link,
                        library_dirs=cpp_extension.library_paths(), libraries=["torch_cpu", "c10"],
                        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
                        **{**common, "include_dirs": [*common["include_dirs"], *cpp_extension.include_paths(),
                                                      *map(str, include)]})  # fmt: skip
    import pybind11

    host = Extension("fused_ops._host", ["csrc/host/module.cpp"], extra_compile_args={"cxx": cxx}, **common)
    host.include_dirs.append(pybind11.get_include())
    return [kernels, host]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
