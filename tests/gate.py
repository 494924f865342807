"""The compile gate: `python -m tests.gate [--capability 9.0 ...]`. Needs no GPU.

For each chip it compiles every Triton configuration that dispatch would pick there (each room's `gate_cases`) and every
csrc/*/*.cu, prints registers, spills and shared memory, and fails on

- a kernel that spills, does not compile, or needs more shared memory than the chip gives a block;
- a Triton kernel that no room's `gate_cases` names;
- in Triton code, a `tl.dot` that does not say its `input_precision`, a lambda, or autotuning;
- in CUDA code, what the emulator cannot follow (`CUDA_RULES`).

A Triton kernel is compiled twice: for pointers and integers that are multiples of 16 (such loads are pipelined, and
need the most shared memory), and for any others (these need the most registers).
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Shared memory that one block may have, in KB (CUDA C++ Programming Guide, table "Technical Specifications").
LIMITS = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}


@dataclass(frozen=True)
class Row:
    """One compiled kernel: `spills` and `shared` in bytes; `error` where it did not compile."""

    kernel: str
    config: str
    chip: tuple[int, int]
    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str = ""

    @property
    def failure(self) -> str:
        limit = LIMITS[self.chip] * 1024
        if self.error:
            return self.error
        if self.spills:
            return f"spills {self.spills} bytes"
        return f"{self.shared} bytes of shared memory, {limit} allowed" if self.shared > limit else ""


def triton_sources() -> list[Path]:
    return sorted((ROOT / "fused_ops").glob("*/triton*.py"))


def lint(source: str, name: str) -> list[str]:
    """What Triton code must not do, as "file:line: what"."""
    found, dots = [], {"dot", "dot_scaled"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            is_dot = called in dots or called.removeprefix("triton.language.").removeprefix("tl.") in dots
            if is_dot and not any(keyword.arg == "input_precision" for keyword in node.keywords):
                found.append((node.lineno, f"{called} without input_precision"))
        if isinstance(node, ast.Lambda):
            found.append((node.lineno, "a lambda"))
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node).split(".")[-1] == "autotune":
            found.append((node.lineno, "autotuning"))
    return [f"{name}:{line}: {what}" for line, what in sorted(set(found))]


# Pattern, the files of csrc/common that alone may have it (or all of them), what is wrong with it.
CUDA_RULES = (
    (r"\b__shared__\b", ("shared.cuh",), "a bare __shared__ instead of SHARED or dynamic_shared"),
    (r"\b(?:asm|__asm|__asm__)\b", None, "inline PTX outside csrc/common"),
    (r"^[ \t]*#[ \t]*(?:el)?if", None, "conditional compilation"),
    (r"\bvolatile\b", None, "a volatile access: threads wait for each other by wait_until and load_acquire"),
    (r"\bmemcpy\b", (), "memcpy"),
    (r"<<<", ("launch.h",), "a launch without launch()"),
    (r"\b(?:const_|mutable_)?data_ptr\b", ("tensor.h", "check.h"), "a pointer without data<T>()"),
    (r"\bSTABLE_TORCH_LIBRARY_IMPL\b", ("tensor.h",), "a registration without FUSED_OPS_CUDA_LIBRARY"),
)


def cuda_sources() -> list[Path]:
    """The CUDA kernels, and all that they share."""
    csrc = ROOT / "csrc"
    kernels = {*csrc.glob("*/*.cu"), *csrc.glob("*/*.cuh"), *csrc.glob("common/*")}
    return sorted(path for path in kernels if path.is_file())


def lint_cuda(source: str, name: str) -> list[str]:
    """What CUDA code must not do, as "file:line: what"; `name` is relative to csrc/."""

    def blank(comment: re.Match) -> str:
        return re.sub(r"[^\n]", " ", comment[0])

    code = re.sub(r"//[^\n]*|/\*.*?\*/", blank, source, flags=re.S)
    folder, _, file = name.rpartition("/")
    found = []
    for pattern, homes, what in CUDA_RULES:
        if folder == "common" and (homes is None or file in homes):
            continue
        found += [(code.count("\n", 0, hit.start()) + 1, what) for hit in re.finditer(pattern, code, re.M)]
    return [f"{name}:{line}: {what}" for line, what in sorted(found)]


def defined_kernels(source: str) -> set[str]:
    """Names of the entry kernels in a Triton file."""
    return {
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def cases(module: str, chip: tuple[int, int], aligned: bool = True) -> list[tuple]:
    """(label, kernel, signature, constexprs, num_warps, num_stages[, maxnreg]) of a Triton file on `chip`."""
    return getattr(import_module(module), "gate_cases", lambda chip, aligned: [])(chip, aligned)


def compile_triton(case: tuple, chip: tuple[int, int], aligned: bool) -> Row:
    """One case of `gate_cases`, to a cubin. `aligned`: every pointer and integer is a multiple of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    label, kernel, given, constexprs, warps, stages, *registers = case
    row = partial(Row, kernel.__name__, f"{label}{'' if aligned else ' unaligned'}", chip)
    unnamed = [name for name in kernel.arg_names if name not in given and name not in constexprs]
    if unnamed:
        return row(error=f"gate_cases gives neither type nor value of {', '.join(unnamed)}")
    signature = {name: "constexpr" if name in constexprs else given[name] for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if aligned and (kind.startswith("*") or kind in ("i32", "i64"))
    }
    source = ASTSource(kernel, signature, constexprs, attrs)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers[0] if registers else None}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", chip[0] * 10 + chip[1], 32), options=options)
    except Exception as error:  # whatever the compiler dies of is a row of the table
        return row(error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}")
    used = resources(compiled.asm["cubin"])
    return row(used["REG"], used["STACK"], compiled.metadata.shared)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK (what spilled), SHARED (static) and LOCAL of a cubin's one entry."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _compile_numbered(module: str, number: int, chip: tuple[int, int], aligned: bool) -> Row:
    return compile_triton(cases(module, chip, aligned)[number], chip, aligned)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def compile_cuda(path: Path, chip: tuple[int, int]) -> list[Row]:
    """Every kernel of a .cu file, as the build compiles it."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    arch = f"sm_{chip[0]}{chip[1]}{'a' if chip == (9, 0) else ''}"
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    flags = [*COMMON_NVCC_FLAGS, "-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    tests = ROOT / "tests/emulation"
    folders = (ROOT / "csrc", ROOT / "build", tests, tests / "kernels/device", *include_paths())
    includes = [f"-I{folder}" for folder in folders]
    with tempfile.TemporaryDirectory() as folder:
        output = ["-cubin", f"-arch={arch}", "-Xptxas", "-v", "-o", f"{folder}/out.cubin", str(path)]
        done = subprocess.run([find_nvcc(), *flags, *includes, *output], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["nvcc failed"]
        return [Row(name, "", chip, error=lines[0])]
    return [Row(name, *entry[:1], chip, *entry[1:]) for entry in ptxas_entries(done.stderr)]


def wrapper_kernels(chip: tuple[int, int]) -> list[Path]:
    """Tests' kernels, which use every PTX wrapper of csrc/common, so that ptxas has assembled each of them."""
    found = sorted((ROOT / "tests/emulation/kernels").glob("*.cu")) if chip in ((8, 0), (9, 0)) else []
    hopper = ("hopper", "cluster", "mbarrier", "bulk_copy", "wgmma")
    wanted = (path for path in found if not path.stem.startswith("mutants"))
    return [path for path in wanted if chip == (9, 0) or not path.stem.startswith(hopper)]


def ptxas_entries(log: str) -> Iterator[tuple[str, int, int, int]]:
    """(kernel, registers, bytes spilled, bytes of static shared memory) of each entry in `ptxas -v`'s output."""
    for part in log.split("Compiling entry function '")[1:]:
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part))
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        yield demangled(part.split("'")[0]), registers, spills, int(shared[1]) if shared else 0


def demangled(name: str) -> str:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    text = subprocess.run([tool, name], capture_output=True, text=True).stdout.strip() if tool else name
    return text.removeprefix("void ").split("(")[0].replace("fused_ops::", "")


def uncovered(chip: tuple[int, int]) -> list[str]:
    """Triton kernels that no `gate_cases` names."""
    named, defined = set(), {}
    for path in triton_sources():
        named |= {case[1].__name__ for case in cases(module_name(path), chip)}
        defined.update(dict.fromkeys(defined_kernels(path.read_text()), path.relative_to(ROOT)))
    return [f"{path}: no gate_cases names {name}" for name, path in sorted(defined.items()) if name not in named]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def run(chips: list[tuple[int, int]], progress=lambda rows: rows) -> tuple[list, list]:
    """(rows, complaints) of the whole package."""
    complaints = [line for path in triton_sources() for line in lint(path.read_text(), str(path.relative_to(ROOT)))]
    complaints += [line for p in cuda_sources() for line in lint_cuda(p.read_text(), str(p.relative_to(ROOT / "csrc")))]
    jobs = []
    if find_spec("triton") is not None:
        complaints += uncovered(chips[0])
        for chip in chips:
            for path in triton_sources():
                for aligned in (True, False):
                    for number in range(len(cases(module_name(path), chip, aligned))):
                        jobs.append((_compile_numbered, module_name(path), number, chip, aligned))
    if find_nvcc():
        csrc = sorted((ROOT / "csrc").glob("*/*.cu"))
        jobs += [(compile_cuda, path, chip) for chip in chips for path in (*csrc, *wrapper_kernels(chip))]
    rows: list[Row] = []
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), 8), get_context("spawn")) as pool:
        for result in progress([pool.submit(*job) for job in jobs]):
            found = result.result()
            rows += found if isinstance(found, list) else [found]
    return rows, complaints


def table(rows: list[Row]):
    from rich.table import Table

    result = Table("chip", "kernel", "configuration", "registers", "spills", "shared KB", "limit KB", "failure")
    for row in rows:
        numbers = (row.registers, row.spills, f"{row.shared / 1024:.1f}", LIMITS[row.chip])
        style = "red" if row.failure else None
        chip = f"sm_{row.chip[0]}{row.chip[1]}"
        result.add_row(chip, row.kernel, row.config, *map(str, numbers), row.failure, style=style)
    return result


def main() -> int:
    from rich.console import Console
    from rich.progress import track

    parser = argparse.ArgumentParser(prog="python -m tests.gate", description=__doc__.splitlines()[0])
    names = [f"{major}.{minor}" for major, minor in LIMITS]
    parser.add_argument("--capability", nargs="+", choices=names, default=names, metavar="X.Y", help="default: all")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 replaces the compiler: unset it for the gate")
    console = Console(width=None if sys.stdout.isatty() else 160)
    for tool, there in (("triton", find_spec("triton")), ("nvcc", find_nvcc())):
        if not there:
            console.print(f"{tool} is not here: its kernels are not checked")
    chips = [tuple(int(part) for part in name.split(".")) for name in options.capability]
    progress = partial(track, description="compiling", console=console, transient=True)
    rows, complaints = run(chips, progress)
    console.print(table(rows))
    failures = [f"{row.kernel} {row.config}: {row.failure}" for row in rows if row.failure] + complaints
    for failure in failures:
        console.print(failure, style="red", highlight=False, soft_wrap=True)
    console.print(f"{len(rows)} kernels compiled, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
