"""Builds fused_ops/_C.so (kernels: C++ always, CUDA where nvcc is found; LibTorch stable ABI, any torch >= 2.10) and
fused_ops._host (planners and build facts, pybind11).

Settings: FUSED_OPS_CUDA=auto|0|1 (FORCE_CUDA=1: 1), CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, NVCC_THREADS, DEBUG, CXX
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

CSRC, BUILD = Path("csrc").resolve(), Path("build").resolve()
ARCHES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit("fused_ops builds against your torch: install torch >= 2.10, then pip install --no-build-isolation .")


def run(*command: object) -> str:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.run([str(part) for part in command], **pipes).stdout


def find_toolkit() -> tuple[Path, str] | None:
    """(root, version) of the CUDA toolkit to build with, or None to build without."""
    wanted = "1" if os.environ.get("FORCE_CUDA") == "1" else os.environ.get("FUSED_OPS_CUDA", "auto")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    places = f"{home}/bin" if home else os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    nvcc = shutil.which("nvcc", path=places)
    if nvcc is None:
        problem = f"no nvcc (the CUDA compiler) in {places if home else 'PATH or /usr/local/cuda/bin'}"
    else:
        version = re.search(r"release (\d+\.\d+)", run(nvcc, "--version"))[1]
        if torch.version.cuda in (None, version) or torch.version.cuda.split(".")[0] == version.split(".")[0]:
            # nvcc on PATH may be a wrapper script: the compiler itself knows its root.
            top = re.search(r"^#\$ TOP=(.+)$", run(nvcc, "--dryrun", "-x", "cu", os.devnull), re.M)
            return Path(top[1].strip() if top else Path(nvcc).parents[1]).resolve(), version
        problem = f"nvcc is CUDA {version} but torch was built with CUDA {torch.version.cuda}: the majors must agree"
    if wanted == "1":
        sys.exit(f"FUSED_OPS_CUDA=1, but {problem}.\nCUDA_HOME is {home or 'not set'}; nvcc found: {nvcc}.\n"
                 "Set CUDA_HOME to a matching toolkit's root, or FUSED_OPS_CUDA=0 for CPU kernels only.")  # fmt: skip
    print(f"fused_ops: {problem}; building the CPU kernels only", file=sys.stderr)
    return None


def architectures(root: Path) -> str:
    known = set(re.findall(r"compute_(\d+)", run(root / "bin/nvcc", "--list-gpu-arch")))
    return ";".join(arch for arch in ARCHES if re.sub(r"\D", "", arch) in known) + "+PTX"


class Build(cpp_extension.BuildExtension):
    def initialize_options(self):
        super().initialize_options()
        self.build_temp = str(BUILD / "objects")  # an editable build would start in a fresh folder each time

    def get_ext_filename(self, name):
        return re.sub(r"\b_C\..*so$", "_C.so", super().get_ext_filename(name))

    def build_extension(self, extension):
        super().build_extension(extension)
        if extension.name == "fused_ops._C":  # a checksum, and the hash of every source: see core/extension.py
            path = Path(self.get_ext_fullpath(extension.name))
            files = (p for p in CSRC.glob("*/*.*") if p.parent.name != "emulation")
            sources = {str(p.relative_to(CSRC)): sha256(p.read_bytes()).hexdigest() for p in files}
            facts = {"crc32": zlib.crc32(path.read_bytes()), "sources": sources}
            path.write_bytes(path.read_bytes() + b"\nfused_ops:" + json.dumps(facts).encode())


def extensions() -> list[Extension]:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        print("fused_ops: no C++ compiler (c++, or CXX): installing pure Python", file=sys.stderr)
        return []
    import pybind11

    toolkit = find_toolkit()
    flags = ["-O0", "-g"] if DEBUG else ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
    cxx = [*flags, "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    nvcc = [*(["-O0", "-g", "-G"] if DEBUG else ["-O3", "-lineinfo"]), "-std=c++20", "-Xcompiler=-fvisibility=hidden",
            "--threads", os.environ.get("NVCC_THREADS", "1")]  # fmt: skip
    sources, include, arches = sorted(CSRC.glob("*/*_cpu*.cpp")), [CSRC, BUILD], ""
    link = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]  # libtorch.so brings in libtorch_cuda, if it exists
    if toolkit:
        root, arches = toolkit[0], os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures(toolkit[0])
        cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = str(root)  # a CPU-only torch leaves it None
        os.environ["TORCH_CUDA_ARCH_LIST"] = arches
        sources += sorted(CSRC.glob("*/*.cu"))
        include.append(root / "include")
        link += [f"-L{root}/lib64", f"-L{root}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    facts = dict(COMPILER=run(compiler, "--version").splitlines()[0], NVCC=toolkit[1] if toolkit else "",
                 ARCH_LIST=arches, FLAGS=" ".join(flags), TORCH=torch.__version__)  # fmt: skip
    text = "".join(f'#define FUSED_OPS_{name} "{value}"\n' for name, value in facts.items())
    BUILD.mkdir(exist_ok=True)
    header = BUILD / "facts.h"
    if not header.exists() or header.read_text() != text:  # a newer file would be compiled again
        header.write_text(text)
    kernels = Extension("fused_ops._C", [os.path.relpath(path) for path in sources], language="c++",
                        include_dirs=[*map(str, include), *cpp_extension.include_paths()], extra_link_args=link,
                        library_dirs=cpp_extension.library_paths(), libraries=["torch_cpu", "c10"],
                        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
                        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")])  # fmt: skip
    host = Extension("fused_ops._host", ["csrc/host/module.cpp"], language="c++", extra_compile_args={"cxx": cxx},
                     include_dirs=[str(CSRC), str(BUILD), pybind11.get_include()])  # fmt: skip
    return [kernels, host]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
