"""Estimates as text: `0.397 ± 0.048`, or `0.025 [0.004, 0.129]` where the interval is asymmetric."""

from __future__ import annotations

import math

from rlhf_fast.eval.estimates import Estimate

ASYMMETRY = 0.15
"""Share of half the interval's width by which the value may lie off its middle and still be shown with ±."""
MISSING = "–"


def show(estimate: Estimate, digits: int = 3, scale: float = 1.0, unit: str = "", sign: bool = False) -> str:
    """Return value and interval, multiplied by `scale`, with `unit` behind them; "–" for an estimate of nothing."""
    value, low, high = (scale * x for x in estimate[:3])
    if math.isnan(value):
        return MISSING
    plus = "+" if sign else ""
    text = f"{value:{plus}.{digits}f}"
    half = (high - low) / 2
    if math.isnan(half):
        return f"{text} (no interval){unit}"
    if abs(value - (low + high) / 2) <= ASYMMETRY * half or half < 10**-digits / 2:
        return f"{text} ± {half:.{digits}f}{unit}"
    return f"{text} [{low:{plus}.{digits}f}, {high:{plus}.{digits}f}]{unit}"


def percent(estimate: Estimate, sign: bool = False) -> str:
    """Return a share as a percentage: `73.4 ± 2.3 %`."""
    return show(estimate, 1, 100.0, " %", sign)
