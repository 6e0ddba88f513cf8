"""What the compiled CUDA kernels take of a GPU, read off rlhf_fast/_cuda*.so without one.

    python -m rlhf_fast.bench.checks.cuda_resources [OP ...] [--save bench/results/cuda_resources.md]

Registers a thread, static shared memory of a block (the dynamic part is the launch's), spills and 16-byte loads of
every kernel and architecture in the binary. The exit status is 1 where a kernel spills.
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

HEADER = ["kernel", "for", "registers", "static shared, bytes", "spills: stores / loads", "16-byte loads"]
COMMAND = "python -m rlhf_fast.bench.checks.cuda_resources --save bench/results/cuda_resources.md"


class Kernel(NamedTuple):
    """A kernel of the binary, for one architecture."""

    name: str
    arch: str
    registers: int
    shared: int
    spills: tuple[int, int]
    wide_loads: int
    loads: int

    @property
    def op(self) -> str:
        return self.name.partition(".")[0]

    @property
    def fault(self) -> str:
        return f"{self.name} for {self.arch}: {sum(self.spills)} spills" if any(self.spills) else ""

    @property
    def cells(self) -> list[str]:
        spills, loads = " / ".join(map(str, self.spills)), f"{self.wide_loads} / {self.loads}"
        return [self.name, self.arch, str(self.registers), str(self.shared), spills, loads]


def binary() -> Path | None:
    """The extension of the package that is imported."""
    spec = find_spec("rlhf_fast._cuda")
    return Path(spec.origin) if spec and spec.origin else None


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def by_function(text: str) -> dict[tuple[str, str], str]:
    """cuobjdump's words on each (function, architecture)."""
    parts, arch = {}, ""
    for section in re.split(r"(?m)^(?=\s*arch = |\s*Function\s*:? )", text):
        if found := re.match(r"\s*arch = (\w+)", section):
            arch = found[1]
        elif found := re.match(r"\s*Function\s*:? (\w+)", section):
            parts[found[1], arch] = section
    return parts


def readable(names: list[str]) -> list[str]:
    """Names in the terms of the source: the file, the kernel, its template's arguments."""
    plain = names
    if names and shutil.which("c++filt"):
        plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout.split("\n")
    found = []
    for mangled, name in zip(names, plain, strict=False):
        file = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", mangled)
        name = re.sub(r"\((anonymous namespace)\)::|^void ", "", name)
        name = re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", name)  # the parameters; (int)4 in a template stays
        found.append(f"{file[1]}.{name}" if file else name)
    return found


def kernels(path: Path, tool: str) -> list[Kernel]:
    usage, code = by_function(said(tool, "-res-usage", str(path))), by_function(said(tool, "-sass", str(path)))
    found = []
    for (function, arch), name in zip(usage, readable([function for function, _ in usage]), strict=True):
        numbers = dict(re.findall(r"\b(REG|SHARED):(\d+)", usage[function, arch]))
        text = code[function, arch]
        found.append(
            Kernel(name, arch, int(numbers["REG"]), int(numbers["SHARED"]), sass.spills(text), *sass.loads(text))
        )
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("op", nargs="*", help="only these (default: all)")
    parser.add_argument("--file", type=Path, default=binary(), help="default: the package's own")
    parser.add_argument("--save", type=Path, metavar="PATH", help="write the table as Markdown")
    options = parser.parse_args()
    tool = sass.cuobjdump()
    if options.file is None or not options.file.is_file():
        parser.error("rlhf_fast._cuda is not built: install with nvcc, or name a file by --file")
    if tool is None:
        parser.error("cuobjdump was not found, neither CUDA's nor Triton's")
    found = kernels(options.file, tool)
    if not found:
        parser.error(f"{options.file} has no kernel in it")
    there = sorted({kernel.op for kernel in found})
    if unknown := set(options.op) - set(there):
        parser.error(f"{options.file} has no kernel of {', '.join(sorted(unknown))}; it has: {', '.join(there)}")
    found = [kernel for kernel in found if kernel.op in options.op or not options.op]
    cells = [HEADER, *(kernel.cells for kernel in found)]
    print("\n".join(report.aligned(cells)))
    if options.save:
        title = f"{__doc__.partition(chr(10))[0]}\n\n{compiler()}. `{COMMAND}`\n\n"
        options.save.write_text(title + report.markdown_table(cells), encoding="utf-8")
    faults = [kernel.fault for kernel in found if kernel.fault]
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if faults else 0


def compiler() -> str:
    """nvcc's release."""
    nvcc = shutil.which("nvcc")
    words = re.search(r"release ([\d.]+)", said(nvcc, "--version")) if nvcc else None
    return f"nvcc {words[1]}" if words else "nvcc"


if __name__ == "__main__":
    sys.exit(main())
