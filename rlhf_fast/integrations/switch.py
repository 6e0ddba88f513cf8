"""The switch of a handle, which copies of a model share."""

from __future__ import annotations


class Switch:
    """Say whether a handle is open. Copies of a model have the same switch: `remove()` turns all of them off."""

    def __init__(self) -> None:
        self.on = True

    def __deepcopy__(self, memo: dict) -> Switch:
        return self
