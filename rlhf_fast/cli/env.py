"""`rlhf-fast env`: versions, machine, and who answers for each op on each device, and why nobody faster does."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "peft", "matplotlib")
VARIABLES = (
    "RLHF_FAST_BACKEND", "RLHF_FAST_ISA", "RLHF_FAST_STRICT", "TRITON_INTERPRET", "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)  # fmt: skip


def report() -> Iterator[str]:
    """The report, line by line; made to be pasted into a bug report."""
    import torch

    from rlhf_fast import __version__, ops
    from rlhf_fast.kernels._backends import COMPILED, WHY_MISSING, forced_backend
    from rlhf_fast.kernels._op import OPS

    yield f"rlhf-fast      {__version__} ({Path(__file__).parent})"
    yield f"python         {platform.python_version()}, {platform.platform()}"
    for name in PACKAGES:
        yield f"{name:<14} {_version(name)}"
    yield f"package `kernels` (Hugging Face's, not ours): {_version('kernels')}"
    yield f"processor      {_processor()}; {_cores()} usable cores, torch uses {torch.get_num_threads()} threads"
    sets = [backend.partition(":")[2] for backend in COMPILED if backend.startswith("cpu:")]
    yield f"cpu kernels    {', '.join(sets) + ' (the last is used)' if sets else WHY_MISSING['cpu']}"
    yield f"cuda kernels   {'built, and a device is there' if 'cuda' in COMPILED else WHY_MISSING['cuda']}"
    yield f"triton kernels {WHY_MISSING.get('triton') or 'answers on CUDA devices where no compiled kernel does'}"
    yield f"gpu            {', '.join(_gpus()) or 'none that torch sees'}; nvcc {shutil.which('nvcc') or 'not found'}"
    for name in VARIABLES:
        if name in os.environ:
            yield f"{name}={os.environ[name]}"
    shown = sorted(OPS.keys() & set(ops.__all__))  # the others are parts of these
    if forced := forced_backend():
        without = [name for name in shown if forced not in OPS[name].backends]
        rest = f"; without it, and an error: {', '.join(without)}" if without else ""
        yield f"{forced} is forced for every op{rest}"
    width = max(map(len, shown)) + 2
    for device in ("cpu", "cuda"):
        yield ""
        if all(op.chosen(device) == "reference" for op in map(OPS.get, shown)):
            yield f"on {device} every op runs on its plain-torch reference: {OPS[shown[0]].why(device)}"
            continue
        yield f"who answers on {device}"
        for op in map(OPS.get, shown):
            backend = op.chosen(device)
            why = "" if backend.startswith(device) else op.why(device)
            yield f"  {op.name:<{width}}{backend:<11}  {why}".rstrip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    import torch

    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        found.append(
            f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor})"
        )
    return found
