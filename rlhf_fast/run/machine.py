"""Free memory and disk of the machine, as far as this process may use them."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch

from rlhf_fast.run.memory import peak_memory

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
KIB = 1024


def resident_memory() -> int:
    """Return the bytes of RAM that the process holds. What its C library keeps of freed tensors is given back first."""
    if trim := _malloc_trim():
        trim(0)
    try:
        pages = int((PROC / "self/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_memory()


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's function that gives free memory back to the system."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None


def usable_memory(device: torch.device) -> int | None:
    """Return the bytes that the process can have on `device`, those that it has included; None if no one says.

    Of a GPU: what is free and what torch holds. Of the machine: its free memory and swap, or what the cgroups of a
    container or a batch system leave, if that is less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limits = [*_machine_limits(), *_cgroup_limits()]
    return min(limits) + resident_memory() if limits else _total_memory()


def _machine_limits() -> Iterator[int]:
    """Yield the bytes that Linux can still give to processes."""
    try:
        lines = (PROC / "meminfo").read_text(encoding="utf-8").splitlines()
        found = {name: int(rest.split()[0]) * KIB for name, _, rest in (line.partition(":") for line in lines)}
        yield found["MemAvailable"] + found.get("SwapFree", 0)
    except (OSError, ValueError, KeyError, IndexError):
        return


def _total_memory() -> int | None:
    """Return the machine's memory: macOS does not say how much of it is free."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _cgroup_limits() -> Iterator[int]:
    """Yield the bytes that each cgroup of the process with a limit leaves. Its cache of files is free memory."""
    try:
        lines = (PROC / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.strip("/")
        # within a container the path may be the host's, while its own group is the root
        for group in dict.fromkeys([*(f for f in (folder, *folder.parents) if f.is_relative_to(root)), root]):
            left = _left_in(group, *names)
            if left is not None:
                yield left


def _left_in(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """Return the bytes that a cgroup leaves, None without a limit."""
    try:
        limit, usage = (int((group / name).read_text(encoding="utf-8")) for name in (limit_name, usage_name))
        stat = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):  # no such group, or "max"
        return None
    cached = next((int(line.split()[1]) for line in stat if line.startswith(f"{cache_name} ")), 0)
    return max(limit - usage + cached, 0)


def free_disk(folder: str | Path) -> int:
    """Return the free bytes of the file system on which `folder` lies, or will lie."""
    folder = Path(folder).absolute()
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(nearest).free


def size_of(folder: str | Path) -> int:
    """Return the bytes of all files below `folder`; 0 if it is not there."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
