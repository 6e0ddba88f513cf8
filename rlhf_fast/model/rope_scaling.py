"""Rotary embeddings that depend on the length of the text (dynamic and long RoPE).

For these, transformers picks the angles from the longest row of a call. Past the original context length, cached keys
would need new angles, and a sample would depend on its batch. Below that length the angles are fixed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""transformers' names of these `rope_type`s."""


class LengthDependentRope(NamedTuple):
    """A rotary embedding whose angles are fixed in texts of up to `original_positions`."""

    kind: str
    original_positions: int


def length_dependent_rope(model: Any) -> LengthDependentRope | None:
    """Return the length-dependent rotary embedding of a Model, or None. If kinds of layers have several, return the one
    with the fewest original positions."""
    parameters = getattr(model.text_config, "rope_parameters", None) or {}
    found = []
    for part in (parameters, *parameters.values()):
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if kind in LENGTH_DEPENDENT:
            limits = (part.get("original_max_position_embeddings"), model.max_positions)
            found.append(LengthDependentRope(kind, min(limit for limit in limits if limit)))
    return min(found, key=lambda rope: rope.original_positions, default=None)
