"""What is read off the machine code of a GPU kernel, whoever compiled it; and where the tools that show it are."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path


def cuobjdump() -> str | None:
    """CUDA's own, beside nvcc, or Triton's."""
    if found := shutil.which("cuobjdump"):
        return found
    homes = [Path(nvcc).resolve().parent for nvcc in [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"] if nvcc]
    if spec := find_spec("triton"):
        homes.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    return next((str(home / "cuobjdump") for home in homes if (home / "cuobjdump").is_file()), None)


def spills(code: str) -> tuple[int, int]:
    """Stores to local memory and loads from it: registers that were too few, or an array that has none."""
    return len(re.findall(r"\bSTL\b", code)), len(re.findall(r"\bLDL\b", code))


def loads(code: str) -> tuple[int, int]:
    """Loads from global memory: those of 16 bytes or a tensor's tile, and all."""
    found, tiles = re.findall(r"\bLDG(?:STS)?\.E[.\w]*", code), len(re.findall(r"\bUTMALDG", code))
    return sum(".128" in load for load in found) + tiles, len(found) + tiles
