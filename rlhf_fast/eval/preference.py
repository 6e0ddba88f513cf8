"""Win rates of a model against a baseline, and what may mislead a judge: the order of the answers and their length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_fast.errors import UserError
from rlhf_fast.eval.estimates import Array, Estimate, mean
from rlhf_fast.eval.judges.protocol import PairJudge
from rlhf_fast.eval.measures import Measure

MIN_OTHER_SIGN = 10
"""Groups of pairs in which either answer must be the longer one, for length and quality to be told apart."""
NUM_STRATA = 4
"""Strata by the size of the difference in length."""


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
        """Return the measures' estimates, and lc_win_rate: None where it is not identifiable."""
        found: dict[str, Estimate | None] = {measure.name: measure.estimate() for measure in self.measures()}
        controlled = length_controlled(self.scores, self.longer, self.groups) if self.longer else None
        return {**found, "lc_win_rate": controlled}


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


def length_controlled(scores: Sequence[float], longer: Sequence[float], groups: Sequence[str] = ()) -> Estimate | None:
    """Return the win rate if either answer were the longer one equally often; None where it is not identifiable.

    Pairs whose differences in length are of similar size make a stratum, and both signs have the same weight in it. So
    a judge of length alone is at 1/2: exactly if it sees the sign, within 0.015 if it sees the size too. Where ours is
    longer in 50 to 92 % of 250 or 1,000 pairs, of symmetric or skewed lengths, the interval holds this rate in 93 to
    100 % of cases, of judges of length, of quality and of both. Differences of a size that only one sign has are left
    out. Fewer than 10 groups of either sign give no rate.
    It is not AlpacaEval 2's rate at a difference of 0 (arXiv 2404.04475): no regression extrapolates from the lengths
    that there are, and a preference for length does not have to be smooth.
    """
    wins, lengths = np.asarray(scores, dtype=np.float64), np.asarray(longer, dtype=np.float64)
    judged = ~np.isnan(wins + lengths)
    weights = np.zeros_like(wins)
    weights[judged] = _balancing_weights(lengths[judged])
    kept = np.flatnonzero(weights).tolist()
    names = [groups[i] if groups else i for i in kept]
    signs = [{name for name, i in zip(names, kept, strict=True) if sign * lengths[i] > 0} for sign in (1, -1)]
    if min(map(len, signs)) < MIN_OTHER_SIGN:
        return None
    return mean((wins * weights)[kept], names, weights[kept].tolist(), bounded=True)


def _balancing_weights(lengths: Array) -> Array:
    """Return weights of the pairs, with which either answer is the longer one equally often in each stratum.

    Strata are bounded by quantiles of the rarer sign's differences. A pair of a stratum's rarer sign weighs 1, as does
    one of equal lengths.
    """
    sizes, weights = np.abs(lengths), (lengths == 0) * 1.0
    rarer = min((sizes[lengths < 0], sizes[lengths > 0]), key=len)
    if not len(rarer):
        return weights
    strata = np.searchsorted(np.quantile(rarer, np.arange(1, NUM_STRATA + 1) / NUM_STRATA), sizes)
    for number in range(NUM_STRATA):
        sides = [(strata == number) & (sign * lengths > 0) for sign in (1, -1)]
        count = min(side.sum() for side in sides)
        for side in sides:
            weights[side] = count / max(side.sum(), 1)
    return weights


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
