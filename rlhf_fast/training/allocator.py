"""The C library's memory, kept between the ops of a training step.

glibc returns a freed tensor of over 128 KiB to the system, which zeroes its pages anew at the next op: a page fault for
every 1024 numbers of an activation or a gradient.
"""

from __future__ import annotations

import ctypes
import functools
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**31 - 1
LARGEST = (2**30, 2**25)
"""Sizes up to which a tensor's memory is kept; a glibc that refuses the first takes the second."""


@functools.cache
def keep_freed_memory() -> bool:
    """Keep up to KEPT_BYTES of freed memory in this process. Return whether the C library can: glibc does."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)) and any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST)
