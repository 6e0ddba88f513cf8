"""The logistic function and the area under the ROC curve, by numpy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def sigmoid(margin: float) -> float:
    """Return 1 / (1 + exp(-margin)) without overflow."""
    if margin >= 0:
        return 1 / (1 + math.exp(-margin))
    return math.exp(margin) / (1 + math.exp(margin))


def area_under_curve(
    labels: Sequence[bool], scores: Sequence[float], weights: Sequence[float] | None = None
) -> float | None:
    """Return the weighted share of pairs (yes, no) in which the yes has the higher score; equal scores are half.

    None if all labels are the same.
    """
    yes = np.asarray(labels, bool)
    weight = np.ones(len(yes)) if weights is None else np.asarray(weights, float)
    values, place = np.unique(np.asarray(scores, float), return_inverse=True)
    of_yes = np.bincount(place, weight * yes, len(values))
    of_no = np.bincount(place, weight * ~yes, len(values))
    if not of_yes.sum() or not of_no.sum():
        return None
    below = np.cumsum(of_no) - of_no
    return float((of_yes * (below + of_no / 2)).sum() / (of_yes.sum() * of_no.sum()))
