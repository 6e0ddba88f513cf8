"""Resources of the compiled CUDA kernels, read from rlhf_fast/_cuda*.so without a GPU.

    python -m rlhf_fast.bench.checks.cuda_resources [OP ...] [--save bench/results/cuda_resources.md]

The table has, for every kernel and architecture in the binary, the registers of a thread, the static shared memory of
a block, the spills and the number of 16-byte loads. The exit status is 1 if a kernel spills.
"""

import argparse
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from rlhf_fast.bench import report
from rlhf_fast.bench.checks import sass

HEADER = ["kernel", "architecture", "registers", "static shared, bytes", "spills: stores / loads", "16-byte loads"]
SUMMARY = str(__doc__).partition("\n")[0]
COMMAND = "python -m rlhf_fast.bench.checks.cuda_resources --save bench/results/cuda_resources.md"


class Kernel(NamedTuple):
    """A kernel of the binary for one architecture."""

    name: str
    arch: str
    registers: int
    shared: int
    spills: tuple[int, int]
    vector_loads: int
    loads: int

    @property
    def op(self) -> str:
        return self.name.partition(".")[0]

    @property
    def fault(self) -> str:
        return f"{self.name} for {self.arch}: {sum(self.spills)} spills" if any(self.spills) else ""

    @property
    def cells(self) -> list[str]:
        spills, loads = " / ".join(map(str, self.spills)), f"{self.vector_loads} / {self.loads}"
        return [self.name, self.arch, str(self.registers), str(self.shared), spills, loads]


def binary() -> Path | None:
    """Return the extension of the imported package."""
    spec = find_spec("rlhf_fast._cuda")
    return Path(spec.origin) if spec and spec.origin else None


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def by_function(text: str) -> dict[tuple[str, str], str]:
    """Split cuobjdump's output into one text per (function, architecture)."""
    parts: dict[tuple[str, str], str] = {}
    arch = ""
    for section in re.split(r"(?m)^(?=\s*arch = |\s*Function\s*:? )", text):
        if found := re.match(r"\s*arch = (\w+)", section):
            arch = found[1]
        elif found := re.match(r"\s*Function\s*:? (\w+)", section):
            parts[found[1], arch] = section
    return parts


def demangle(names: list[str]) -> list[str]:
    """Return "file.kernel<template arguments>" for each mangled name."""
    demangled = names
    if names and shutil.which("c++filt"):
        text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout
        demangled = text.split("\n")
    readable = []
    for mangled, name in zip(names, demangled, strict=False):
        file = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", mangled)
        name = re.sub(r"\((anonymous namespace)\)::|^void ", "", name)
        name = re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", name)  # removes the parameters, but not (int)4 in a template
        readable.append(f"{file[1]}.{name}" if file else name)
    return readable


def kernels(path: Path, cuobjdump: str) -> list[Kernel]:
    """Return the kernels of a binary, sorted by name and architecture."""
    usages = by_function(output_of(cuobjdump, "-res-usage", str(path)))
    codes = by_function(output_of(cuobjdump, "-sass", str(path)))
    found = []
    for (function, arch), name in zip(usages, demangle([function for function, _ in usages]), strict=True):
        numbers = dict(re.findall(r"\b(REG|SHARED):(\d+)", usages[function, arch]))
        code = codes[function, arch]
        registers, shared = int(numbers["REG"]), int(numbers["SHARED"])
        found.append(Kernel(name, arch, registers, shared, sass.spills(code), *sass.loads(code)))
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("op", nargs="*", help="only these (default: all)")
    parser.add_argument("--file", type=Path, default=binary(), help="default: the package's own")
    parser.add_argument("--save", type=Path, metavar="PATH", help="write the table as Markdown")
    options = parser.parse_args()
    cuobjdump = sass.cuobjdump()
    if options.file is None or not options.file.is_file():
        parser.error("rlhf_fast._cuda is not built: install with nvcc, or name a file by --file")
    if cuobjdump is None:
        parser.error("cuobjdump was not found, neither CUDA's nor Triton's")
    found = kernels(options.file, cuobjdump)
    if not found:
        parser.error(f"{options.file} has no kernel in it")
    ops = sorted({kernel.op for kernel in found})
    if unknown := set(options.op) - set(ops):
        parser.error(f"{options.file} has no kernel of {', '.join(sorted(unknown))}; it has: {', '.join(ops)}")
    found = [kernel for kernel in found if kernel.op in options.op or not options.op]
    cells = [HEADER, *(kernel.cells for kernel in found)]
    print("\n".join(report.aligned(cells)))
    if options.save:
        head = f"{SUMMARY}\n\n{compiler()}. `{COMMAND}`\n\n"
        options.save.write_text(head + report.markdown_table(cells), encoding="utf-8")
    faults = [kernel.fault for kernel in found if kernel.fault]
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if faults else 0


def compiler() -> str:
    """Return "nvcc" with its release, if it is installed."""
    nvcc = shutil.which("nvcc")
    release = re.search(r"release ([\d.]+)", output_of(nvcc, "--version")) if nvcc else None
    return f"nvcc {release[1]}" if release else "nvcc"


if __name__ == "__main__":
    sys.exit(main())
