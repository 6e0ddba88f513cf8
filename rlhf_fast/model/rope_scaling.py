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
    found = []
    for part in _length_dependent_parts(model.text_config):
        limits = (part.get("original_max_position_embeddings"), model.max_positions)
        found.append(LengthDependentRope(part["rope_type"], min(limit for limit in limits if limit)))
    return min(found, key=lambda rope: rope.original_positions, default=None)


def is_length_dependent(config: Any) -> bool:
    """Return whether a decoder with this config has a rotary embedding that depends on the length of the text."""
    return bool(_length_dependent_parts(config))


def _length_dependent_parts(config: Any) -> list[dict]:
    parameters = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in (parameters, *parameters.values()) if isinstance(part, dict)]
    return [part for part in parts if part.get("rope_type") in LENGTH_DEPENDENT]
