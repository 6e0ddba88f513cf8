"""The C library's memory, kept between the ops of a training step.

glibc returns a freed tensor of over 128 KiB to the system, which zeroes its pages anew at the next op: a page fault for
every 1024 numbers of an activation or a gradient. Here tensors of up to 32 MiB come from its heap, whose free end is
returned only beyond 2 GiB. A long-lived tensor above free memory keeps it from being returned.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_FREE_END = 2**31 - 1
LARGEST = 2**25
"""The most that glibc takes for it, bytes of a tensor."""
ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""glibc's own variables; a user who sets one of them has chosen."""


@functools.cache
def keep_freed_memory() -> bool:
    """Keep freed memory in this process. Return whether that was set: only glibc has it, and not where the user has set
    one of ENVIRONMENT."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in ENVIRONMENT):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_TRIM_THRESHOLD, MAX_FREE_END) and mallopt(M_MMAP_THRESHOLD, LARGEST))
