"""`rlhf-fast env`: versions, machine, and for each op and device its backend and why no faster one runs."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("torch", "triton", "tokenizers", "safetensors", "numpy", "peft", "matplotlib")
VARIABLES = (
    "RLHF_FAST_BACKEND",
    "RLHF_FAST_ISA",
    "RLHF_FAST_STRICT",
    "RLHF_FAST_VERL",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "CUDA_VISIBLE_DEVICES",
)


def report() -> Iterator[str]:
    """Yield the lines of the report, which is made to be pasted into a bug report."""
    yield from _packages()
    yield from _integrations()
    yield from _machine()
    for name in VARIABLES:
        if name in os.environ:
            yield f"{name}={os.environ[name]}"
    yield from ops_report()


def _packages() -> Iterator[str]:
    import rlhf_fast
    from rlhf_fast.run.info import package_version

    yield f"rlhf-fast      {rlhf_fast.__version__} ({Path(rlhf_fast.__file__).parent})"
    yield f"python         {platform.python_version()}, {platform.platform()}"
    for name in PACKAGES:
        yield f"{name:<14} {package_version(name) or 'not installed'}"
    yield f"package `kernels` (Hugging Face's, not ours): {package_version('kernels') or 'not installed'}"


def _integrations() -> Iterator[str]:
    """Yield a line for each library whose trainers can call the ops by rlhf_fast.integrations."""
    from rlhf_fast.integrations import openrlhf, transformers_hooks, trl, verl
    from rlhf_fast.integrations.hooks import report

    for integration in (transformers_hooks, trl, openrlhf, verl):
        yield f"{integration.HOOKS[0].library:<14} {report(integration.HOOKS)}"


def _machine() -> Iterator[str]:
    import torch

    from rlhf_fast.kernels._backends import COMPILED, WHY_MISSING, cpu_kernels_have_openmp

    yield f"processor      {_processor()}; {_cores()} usable cores, torch uses {torch.get_num_threads()} threads"
    isas = [backend.partition(":")[2] for backend in COMPILED if backend.startswith("cpu:")]
    one_thread = "" if not isas or cpu_kernels_have_openmp() else ", on one thread: built without OpenMP"
    yield f"cpu kernels    {', '.join(isas) + f' (the last is used){one_thread}' if isas else WHY_MISSING['cpu']}"
    yield f"cuda kernels   {'built, and a device is there' if 'cuda' in COMPILED else WHY_MISSING['cuda']}"
    yield f"triton kernels {WHY_MISSING.get('triton') or 'answers on CUDA devices where no compiled kernel does'}"
    yield f"gpu            {', '.join(_gpus()) or 'none that torch sees'}; nvcc {shutil.which('nvcc') or 'not found'}"


def ops_report() -> Iterator[str]:
    """Yield who answers on each device, for each op."""
    from rlhf_fast import ops
    from rlhf_fast.kernels._backends import forced_backend
    from rlhf_fast.kernels._op import OPS

    public = [OPS[name] for name in sorted(OPS.keys() & set(ops.__all__))]
    if forced := forced_backend():
        without = [op.name for op in public if forced not in op.backends]
        note = f"; without it, and an error: {', '.join(without)}" if without else ""
        yield f"{forced} is forced for every op{note}"
    width = max(len(op.name) for op in public) + 2
    for device in ("cpu", "cuda"):
        yield ""
        if all(op.chosen(device) == "reference" for op in public):
            yield f"on {device} every op runs on its plain-torch reference: {public[0].why(device)}"
            continue
        yield f"who answers on {device}"
        for op in public:
            backend = op.chosen(device)
            why = "" if backend.startswith(device) else op.why(device)
            yield f"  {op.name:<{width}}{backend:<11}  {why}".rstrip()


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
        gpu = torch.cuda.get_device_properties(i)
        found.append(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor})")
    return found
