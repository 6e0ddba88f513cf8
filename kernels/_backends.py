"""The backends that this machine has: modules of compiled kernels, devices for Triton, and why others are missing.

Callers choose by `forcing` and `strict`, users by the environment:

    RLHF_FAST_BACKEND=reference    force one backend for the whole process
    RLHF_FAST_ISA=generic|avx2|avx512    instruction set of the CPU kernels (default: the best that this CPU has)
    RLHF_FAST_STRICT=1             raise where the reference would run in a kernel's place
    TRITON_INTERPRET=1             allow to force Triton's kernels on CPU tensors, run by its interpreter (for tests)
    RLHF_FAST_SIMT=PATH            allow to force csrc/cuda's kernels on CPU tensors: PATH is what tests/simt compiles
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from rlhf_fast.kernels._openmp import share_openmp

DEVICES = ("cpu", "cuda")


def _load_file(name: str, path: str) -> ModuleType:
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a module")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cannot_load(name: str, error: ImportError) -> str:
    """Return why an extension that is there does not load. Those of g++ have OpenMP's symbols from another library."""
    remedy = "install rlhf-fast again, on this machine and for this Python"
    if re.search(r"undefined symbol: (GOMP|omp)_", str(error)):
        remedy = "neither torch nor the system has the OpenMP runtime libgomp.so.1; install it (Debian: libgomp1)"
    return f"{name} is built, but cannot be loaded ({error}); {remedy}"


def _load_compiled() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Return the modules of compiled kernels by backend, best last, and for each device without one the reason."""
    found: dict[str, ModuleType] = {}
    missing: dict[str, str] = {}
    if path := os.environ.get("RLHF_FAST_SIMT"):
        found["simt"] = _load_file("_simt", path).simt
    share_openmp()
    try:
        cpu = import_module("rlhf_fast._cpu")
        wanted = os.environ.get("RLHF_FAST_ISA")
        if wanted and wanted not in cpu.groups:
            raise ValueError(f"RLHF_FAST_ISA={wanted} does not run here; this machine has: {', '.join(cpu.groups)}")
        found |= {f"cpu:{isa}": getattr(cpu, isa) for isa in cpu.groups if not wanted or isa == wanted}
    except ModuleNotFoundError as error:
        missing["cpu"] = f"rlhf_fast._cpu is not built ({error}): no C++ compiler at the install, or RLHF_FAST_EXT=0"
        tree = Path(__file__).resolve().parent.parent
        if (tree / "csrc").is_dir():  # a source tree in the working directory hides an installed package
            missing["cpu"] = (
                f"the source tree {tree} is imported, not an installed package, and its rlhf_fast._cpu is not built"
                f" ({error}); leave that folder, or install with `pip install -e .` and a C++ compiler"
            )
    except ImportError as error:
        missing["cpu"] = _cannot_load("rlhf_fast._cpu", error)
    try:
        cuda = import_module("rlhf_fast._cuda").cuda
        cuda.why_not()  # raises where the driver cannot run this build
        if torch.cuda.is_available():
            found["cuda"] = cuda
        else:
            missing["cuda"] = "rlhf_fast._cuda is built, but no CUDA device is visible to torch"
    except ModuleNotFoundError as error:
        missing["cuda"] = f"rlhf_fast._cuda is not built ({error}): installed without nvcc, or with RLHF_FAST_CUDA=0"
    except ImportError as error:
        missing["cuda"] = _cannot_load("rlhf_fast._cuda", error)
    except RuntimeError as error:
        missing["cuda"] = f"rlhf_fast._cuda is built, but {str(error).partition(': ')[2]}"
    return found, missing


COMPILED, WHY_MISSING = _load_compiled()


def cpu_kernels_have_openmp() -> bool:
    """Return whether the compiled CPU kernels, which must be there, use more than one thread."""
    return bool(getattr(import_module("rlhf_fast._cpu"), "has_openmp", True))  # an older build has it


def _triton_devices() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the devices where Triton's kernels run by default, and the devices where they can be forced."""
    if find_spec("triton") is None:
        WHY_MISSING["triton"] = "triton is not installed; `pip install triton` (Linux)"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        WHY_MISSING["triton"] = "TRITON_INTERPRET=1: its kernels are interpreted, and answer only where they are forced"
        return (), DEVICES
    elif not torch.cuda.is_available():
        WHY_MISSING["triton"] = "no CUDA device is visible to torch"
    else:
        return ("cuda",), ("cuda",)
    return (), ()


TRITON_DEFAULT_DEVICES, TRITON_DEVICES = _triton_devices()


class _Forced(threading.local):
    """The backend that this thread forces; every thread starts with the environment's."""

    backend: str | None = os.environ.get("RLHF_FAST_BACKEND") or None
    in_backward: bool = False


_forced = _Forced()
_strict = os.environ.get("RLHF_FAST_STRICT") == "1"


@contextlib.contextmanager
def forcing(backend: str | None, *, in_backward: bool = False) -> Iterator[None]:
    """Within the block, every op that this thread calls runs on `backend`; an op without that backend raises.

    in_backward: the block is a backward pass, whose forward pass ran on `backend`. An op without it then runs on the
        device's best.
    """
    before = _forced.backend, _forced.in_backward
    _forced.backend, _forced.in_backward = backend, in_backward
    try:
        yield
    finally:
        _forced.backend, _forced.in_backward = before


def forced_backend() -> str | None:
    """Return the backend that this thread forces, by `forcing` or RLHF_FAST_BACKEND."""
    return _forced.backend


def is_backward() -> bool:
    """Return True within a backward pass for which a backend is forced."""
    return _forced.in_backward


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Within the block, in every thread, an op raises where its reference would run in a kernel's place."""
    global _strict
    before = _strict
    _strict = True
    try:
        yield
    finally:
        _strict = before


def is_strict() -> bool:
    """Return True within `strict`, or everywhere under RLHF_FAST_STRICT=1."""
    return _strict
