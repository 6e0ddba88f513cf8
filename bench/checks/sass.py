"""Read a GPU kernel's machine code (SASS), by nvcc or Triton, and find the tool that prints it."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path


def cuobjdump() -> str | None:
    """Return the path of CUDA's cuobjdump, which is beside nvcc, or of Triton's."""
    if found := shutil.which("cuobjdump"):
        return found
    homes = [Path(nvcc).resolve().parent for nvcc in [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"] if nvcc]
    if spec := find_spec("triton"):
        homes.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    return next((str(home / "cuobjdump") for home in homes if (home / "cuobjdump").is_file()), None)


def spills(code: str) -> tuple[int, int]:
    """Return the numbers of stores to local memory and of loads from it.

    There are some if registers were too few, or if an array has a variable index.
    """
    return len(re.findall(r"\bSTL\b", code)), len(re.findall(r"\bLDL\b", code))


def loads(code: str) -> tuple[int, int]:
    """Return the numbers of loads from global memory that take 16 bytes or a tile of a tensor, and of all loads."""
    found, tiles = re.findall(r"\bLDG(?:STS)?\.E[.\w]*", code), len(re.findall(r"\bUTMALDG", code))
    return sum(".128" in load for load in found) + tiles, len(found) + tiles
