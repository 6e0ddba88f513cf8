"""The switch of a handle, which copies of a model share, and its references to modules that hold it."""

from __future__ import annotations

import weakref
from typing import Any


class Switch:
    """Say whether a handle is open. Copies of a model have the same switch: `remove()` turns all of them off."""

    def __init__(self) -> None:
        self.on = True

    def __deepcopy__(self, memo: dict) -> Switch:
        return self


def alive(reference: weakref.ref, name: str) -> Any:
    """Return what a weak reference is to. RuntimeError if it is gone."""
    found = reference()
    if found is None:
        raise RuntimeError(f"{name} of this forward was freed; call the model, not a forward that was taken from it")
    return found
