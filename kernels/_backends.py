"""The kernels that can run here: compiled ones by backend, Triton's by device, and why there are no better ones."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

DEVICES = ("cpu", "cuda")


def _load_compiled() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The kernels that can run here, by backend name, best last; and for each device, why it has none."""
    found: dict[str, ModuleType] = {}
    missing: dict[str, str] = {}
    if path := os.environ.get("RLHF_FAST_SIMT"):
        spec = spec_from_file_location("_simt", path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        found["simt"] = module.simt
    try:
        cpu = import_module("rlhf_fast._cpu")
        wanted = os.environ.get("RLHF_FAST_ISA")
        if wanted and wanted not in cpu.groups:
            raise ValueError(f"RLHF_FAST_ISA={wanted} does not run here; this machine has: {', '.join(cpu.groups)}")
        found |= {f"cpu:{isa}": getattr(cpu, isa) for isa in cpu.groups if not wanted or isa == wanted}
    except ImportError as error:
        missing["cpu"] = f"rlhf_fast._cpu is not built ({error}); install with a C++ compiler, or `pip install -e .`"
        tree = Path(__file__).resolve().parent.parent
        if (tree / "csrc").is_dir():  # it hides a package that was installed from it
            missing["cpu"] = (
                f"the source tree {tree} is imported, not an installed package, and its rlhf_fast._cpu is not built"
                f" ({error}); leave that folder, or install with `pip install -e .` and a C++ compiler"
            )
    try:
        cuda = import_module("rlhf_fast._cuda").cuda
        cuda.why_not()  # raises where the driver cannot run this build
        if torch.cuda.is_available():
            found["cuda"] = cuda
        else:
            missing["cuda"] = "rlhf_fast._cuda is built, but no CUDA device is visible to torch"
    except ImportError as error:
        missing["cuda"] = f"rlhf_fast._cuda is not built ({error}): installed without nvcc, or with RLHF_FAST_CUDA=0"
    except RuntimeError as error:
        missing["cuda"] = f"rlhf_fast._cuda is built, but {str(error).partition(': ')[2]}"
    return found, missing


COMPILED, MISSING = _load_compiled()


def _find_triton() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The devices where Triton's kernels answer by themselves, and those where they can be forced."""
    if find_spec("triton") is None:
        MISSING["triton"] = "triton is not installed; `pip install triton` (Linux)"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        MISSING["triton"] = "TRITON_INTERPRET=1: its kernels are interpreted, and answer only where they are forced"
        return (), DEVICES
    elif not torch.cuda.is_available():
        MISSING["triton"] = "no CUDA device is visible to torch"
    else:
        return ("cuda",), ("cuda",)
    return (), ()


TRITON_ANSWERS, TRITON_FORCED = _find_triton()
