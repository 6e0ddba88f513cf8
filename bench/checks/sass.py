"""Read a GPU kernel's machine code (SASS), by nvcc or Triton, and find the tool that prints it."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path


def cuobjdump() -> str | None:
    """Return the path of cuobjdump: on PATH, beside nvcc, or in Triton's package. None if there is none."""
    if found := shutil.which("cuobjdump"):
        return found
    nvccs = [nvcc for nvcc in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if nvcc]
    folders = [Path(nvcc).resolve().parent for nvcc in nvccs]
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    return next((str(folder / "cuobjdump") for folder in folders if (folder / "cuobjdump").is_file()), None)


def spills(code: str) -> tuple[int, int]:
    """Return the numbers of stores to local memory and of loads from it.

    There are some if registers were too few, or if an array has a variable index."""
    return len(re.findall(r"\bSTL\b", code)), len(re.findall(r"\bLDL\b", code))


def loads(code: str) -> tuple[int, int]:
    """Return the numbers of loads from global memory that take 16 bytes or a tile of a tensor, and of all loads."""
    widths = re.findall(r"\bLDG(?:STS)?\.E[.\w]*", code)
    tiles = len(re.findall(r"\bUTMALDG", code))
    return sum(".128" in width for width in widths) + tiles, len(widths) + tiles
