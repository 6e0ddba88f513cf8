"""Estimates as text: `0.397 ± 0.048`, or `0.025 [0.004, 0.129]` where the interval is asymmetric."""

from __future__ import annotations

import math
import re

from rlhf_fast.eval.estimates import Estimate

ASYMMETRY = 0.15
"""Share of half the interval's width by which the value may lie off its middle and still be shown with ±."""
MISSING = "–"
LARGE, HUGE = 1e6, 1e300
"""From the first on numbers are shown with four digits, above the second as that."""


def show(estimate: Estimate, digits: int = 3, scale: float = 1.0, unit: str = "", sign: bool = False) -> str:
    """Return value and interval, multiplied by `scale`, with `unit` behind them; "–" for an estimate of nothing."""
    value, low, high = (scale * x for x in estimate[:3])
    if math.isnan(value):
        return MISSING
    if value > HUGE:
        return f"> {HUGE:g}{unit}".replace("e+", "e")
    plus = "+" if sign else ""
    text = _number(value, digits, plus)
    half = (high - low) / 2
    if math.isnan(half):
        return f"{text} (no interval){unit}"
    if abs(value - (low + high) / 2) <= ASYMMETRY * half or half < 10**-digits / 2:
        return f"{text} ± {_number(half, digits)}{unit}"
    return f"{text} [{_number(low, digits, plus)}, {_number(high, digits, plus)}]{unit}"


def _number(value: float, digits: int, plus: str = "") -> str:
    return f"{value:{plus}.4g}" if abs(value) >= LARGE else f"{value:{plus}.{digits}f}"


def show_short(estimate: Estimate, sign: bool = False) -> str:
    """Return value and half the interval's width for a narrow table: `.36±.09`. With `sign` a digit more."""
    value, half = estimate.value, estimate.half_width
    if math.isnan(value) or value > HUGE:
        return show(estimate)
    digits = max(2 + sign - (abs(value) >= 10) - (abs(value) >= 100), 0)
    text = _number(value, digits, "+" if sign else "")
    text = text if math.isnan(half) else f"{text}±{'>1e300' if half > HUGE else _number(half, digits)}"
    return re.sub(r"(^|[-+±])0\.", r"\1.", text)


def percent(estimate: Estimate, sign: bool = False) -> str:
    """Return a share as a percentage: `73.4 ± 2.3 %`."""
    return show(estimate, 1, 100.0, " %", sign)
