"""Win rates of a model against a baseline, and what may mislead a judge: the order of the answers and their length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_fast.errors import UserError
from rlhf_fast.eval.estimates import Array, Estimate, bootstrap, wilson
from rlhf_fast.eval.judges.protocol import PairJudge
from rlhf_fast.eval.measures import Measure

MIN_OTHER_SIGN = 0.05
"""Share of pairs in which either model must be the longer one, for length and quality to be told apart."""
MIN_GROUPS = 10
"""Groups of pairs below which resampling them says nothing about the spread."""
INTERCEPT_SD, COEFFICIENT_SD = 10.0, 2.5
"""Standard deviations of the normal priors on the logistic regression's two coefficients."""
RESAMPLES = 1000


class Preferences(NamedTuple):
    """One model's pairs with a baseline's answers to the same prompts. A row is one pair; NaN = not judged."""

    scores: tuple[float, ...]
    """1 = ours is the better answer, 0 = the baseline's, 0.5 = a tie. The mean over both orders."""
    flips: tuple[float, ...] = ()
    """1 where the winner changes with the order in which the judge reads the answers. () = the order was not tried."""
    longer: tuple[float, ...] = ()
    """Characters of our answer less those of the baseline's. () = unknown."""
    groups: tuple[str, ...] = ()
    """The group of each row, within which rows belong together. () = each row is its own."""
    judge: str = ""

    def measures(self) -> list[Measure]:
        """Return win_rate; longer_wins, the win rate that a judge of length alone would give; and flips.

        Where pairs have no judgement, unjudged counts them.
        """
        found = [Measure("win_rate", self.scores, self.groups, judge=self.judge)]
        if self.longer:
            judged = zip(self.scores, self.longer, strict=True)
            longer = tuple(math.nan if math.isnan(score) else _vote(length) for score, length in judged)
            found.append(Measure("longer_wins", longer, self.groups, higher_is_better=None))
        if self.flips:
            found.append(Measure("flips", self.flips, self.groups, judge=self.judge, higher_is_better=False))
        if any(map(math.isnan, self.scores)):
            unjudged = tuple(map(float, map(math.isnan, self.scores)))
            found.append(Measure("unjudged", unjudged, self.groups, judge=self.judge, higher_is_better=False))
        return found

    def estimates(self) -> dict[str, Estimate | None]:
        """Return the measures' estimates, and win_rate_length_controlled: None where it is not identifiable."""
        found: dict[str, Estimate | None] = {measure.name: measure.estimate() for measure in self.measures()}
        controlled = length_controlled(self.scores, self.longer, self.groups) if self.longer else None
        return {**found, "win_rate_length_controlled": controlled}


def compare(
    judge: PairJudge,
    prompts: Sequence[str],
    ours: Sequence[str],
    baseline: Sequence[str],
    groups: Sequence[str] = (),
) -> Preferences:
    """Ask a judge about each pair in both orders and return the mean of both; two equal answers are a tie."""
    forward = _ask(judge, prompts, ours, baseline)
    backward = [1 - score for score in _ask(judge, prompts, baseline, ours)]
    pairs = list(zip(forward, backward, strict=True))
    return Preferences(
        scores=tuple((a + b) / 2 for a, b in pairs),
        flips=tuple(a + b if math.isnan(a + b) else float(_vote(a - 0.5) != _vote(b - 0.5)) for a, b in pairs),
        longer=tuple(float(len(a) - len(b)) for a, b in zip(ours, baseline, strict=True)),
        groups=tuple(groups),
        judge=judge.name,
    )


def length_controlled(
    scores: Sequence[float], longer: Sequence[float], groups: Sequence[str] = (), seed: int = 0
) -> Estimate | None:
    """Return the win rate at equal lengths, with a bootstrap interval; None where it is not identifiable.

    It is that of AlpacaEval 2 (arXiv 2404.04475) without its per-prompt difficulties: a logistic regression of the
    score on tanh(d / sd(d)), d the difference in length, read off at d = 0. Where one model is nearly always the longer
    one (the other in fewer than 5 % of the pairs), length and quality cannot be told apart. Fewer than 10 groups of
    pairs give no interval.
    """
    wins, lengths = np.asarray(scores, dtype=np.float64), np.asarray(longer, dtype=np.float64)
    kept = ~np.isnan(wins + lengths)
    wins, lengths = wins[kept], lengths[kept]
    chosen = [group for group, keep in zip(groups, kept, strict=True) if keep] if groups else None
    count = len(set(chosen)) if chosen else len(wins)
    if count < MIN_GROUPS or min((lengths > 0).mean(), (lengths < 0).mean()) < MIN_OTHER_SIGN:
        return None
    scaled = np.tanh(lengths / lengths.std())
    found = bootstrap(lambda rows: _rate_at_equal_length(wins[rows], scaled[rows]), len(wins), chosen, RESAMPLES, seed)
    if wins.min() == wins.max():  # resampling shows no spread
        return wilson(found.value * found.n, found.n)
    return found


def _rate_at_equal_length(wins: Array, scaled: Array) -> float:
    """Return the fitted rate at difference 0, by Newton's method with ridges from the two priors."""
    intercept = coefficient = 0.0
    for _ in range(50):
        rates = 1 / (1 + np.exp(-(intercept + coefficient * scaled)))
        errors, spread = wins - rates, rates * (1 - rates)
        grad_intercept = errors.sum() - intercept / INTERCEPT_SD**2
        grad_coefficient = (errors * scaled).sum() - coefficient / COEFFICIENT_SD**2
        a = spread.sum() + 1 / INTERCEPT_SD**2
        b = (spread * scaled).sum()
        c = (spread * scaled * scaled).sum() + 1 / COEFFICIENT_SD**2
        determinant = a * c - b * b
        steps = (
            (c * grad_intercept - b * grad_coefficient) / determinant,
            (a * grad_coefficient - b * grad_intercept) / determinant,
        )
        longest = max(map(abs, steps))
        damping = min(1.0, 2.0 / longest) if longest else 1.0  # a longer step could pass the maximum
        intercept, coefficient = float(intercept + damping * steps[0]), float(coefficient + damping * steps[1])
        if longest < 1e-9:
            break
    return 1 / (1 + math.exp(-intercept))


def _ask(judge: PairJudge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """Return a judge's scores; UserError unless there is one in [0, 1], or NaN, for each pair.

    Two equal answers are a tie, and the judge is not asked about them.
    """
    asked = [i for i, (one, other) in enumerate(zip(first, second, strict=True)) if one != other]
    scores = [0.5] * len(first)
    if not asked:
        return scores
    found = [float(score) for score in judge(*([texts[i] for i in asked] for texts in (prompts, first, second)))]
    if len(found) != len(asked):
        raise UserError(f"{judge.name}: returned {len(found)} scores for {len(asked)} pairs; return one for each")
    bad = [i for i, score in enumerate(found) if not (math.isnan(score) or 0 <= score <= 1)]
    if bad:
        raise UserError(
            f"{judge.name}: returned {found[bad[0]]:g} for pair {asked[bad[0]]} ({len(bad)} such of {len(found)});"
            " return the probability that the first answer is better, from 0 to 1"
        )
    for i, score in zip(asked, found, strict=True):
        scores[i] = score
    return scores


def _vote(difference: float) -> float:
    """Return 1 for a positive difference, 0 for a negative one, 0.5 for none."""
    return 0.5 if difference == 0 else float(difference > 0)
