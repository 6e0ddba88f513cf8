"""Rotations of keys and queries that change with the length of the text.

transformers turns every token of a call by angles that the longest row of the call decides. Past the original length
keys in a cache would have to turn again, and a sample would hang on its company; below it nothing switches.
"""

from __future__ import annotations

from typing import NamedTuple

from rlhf_fast.model.model import Model

BY_LENGTH = ("dynamic", "longrope")
"""transformers' names of them."""


class ByLength(NamedTuple):
    """A rotation that is the same for all texts of up to `original` positions."""

    kind: str
    original: int


def by_length(model: Model) -> ByLength | None:
    """The one of `model` that switches first; None if none does. Layers of several kinds have several."""
    config = model.text_config
    parameters = getattr(config, "rope_parameters", None) or {}
    found = []
    for part in (parameters, *parameters.values()):
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if kind in BY_LENGTH:
            limits = (part.get("original_max_position_embeddings"), model.max_positions)
            found.append(ByLength(kind, min(limit for limit in limits if limit)))
    return min(found, key=lambda rotation: rotation.original, default=None)
