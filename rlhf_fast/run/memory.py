"""Peak memory between two calls: of torch's allocator if a GPU was used, else of the process. And free memory."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def free_memory() -> None:
    """Give back the memory of models that nothing refers to any more, a GPU's too."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak_memory() -> None:
    """Start a new measurement. Linux resets its high-water mark on request; other systems cannot."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        _CLEAR.write_text("5", encoding="utf-8")
    except OSError:
        return


def peak_memory() -> int:
    """Return bytes since the last reset, or since the process began where the system has no reset."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and (allocated := torch.cuda.max_memory_allocated()):
        return int(allocated)
    try:
        line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
