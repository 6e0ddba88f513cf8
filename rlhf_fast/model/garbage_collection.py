"""Python's garbage collector, off within a block."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Collect no garbage within the block. A collection goes through all objects of the process, of which torch and
    transformers have some hundred thousand: in the steps of a small model a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
