"""Give the compiled kernels the OpenMP runtime that torch brings. A second one would have threads of its own."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import torch


def share_openmp() -> None:
    """Make torch's libgomp visible to libraries that are loaded later and, as the kernels, are linked against none.

    torch does that itself with its `libtorch_global_deps.so`; some builds of torch have no such file. The library is
    `torch/lib/libgomp.so.1`, in older wheels `torch.libs/libgomp-<hash>.so.1.0.0`, or the system's.
    """
    if sys.platform != "linux" or hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    package = Path(torch.__file__).resolve().parent
    bundled = [*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")]
    with contextlib.suppress(OSError):  # without it the import of the kernels fails, and says so
        ctypes.CDLL(str(bundled[0]) if bundled else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
