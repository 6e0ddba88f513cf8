"""Win rates: both orders, ties by halves, and what is left if either answer is the longer one equally often."""

import json
import math
import os
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.eval.estimates import mean, wilson
from rlhf_fast.eval.preference import Preferences, compare, length_controlled

DATA = Path(os.environ.get("RLHF_FAST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
RESPONSES = DATA / "model_responses_eval.jsonl"


class Judge:
    """Prefers by a score of the text, and the first one by `bias`."""

    name, validation = "test", None

    def __init__(self, score, bias=0.0):
        self.score, self.bias = score, bias

    def __call__(self, prompts, first, second):
        found = [self.score(a) - self.score(b) + self.bias for a, b in zip(first, second, strict=True)]
        return [0.5 if x == 0 else float(x > 0) for x in found]


PROMPTS = ["p"] * 4
OURS, BASELINE = ["aaa", "bb", "c", "d"], ["a", "b", "c", "ddd"]


def named(preferences):
    return {measure.name: measure for measure in preferences.measures()}


def test_both_orders_are_asked():
    fair = named(compare(Judge(len), PROMPTS, OURS, BASELINE))
    assert fair["win_rate"].values == fair["longer_wins"].values == (1, 1, 0.5, 0)
    assert fair["flips"].values == (0, 0, 0, 0) and fair["win_rate"].judge == "test"
    # A judge that likes the first one by 1.5 characters changes its mind wherever the lengths are closer.
    biased = named(compare(Judge(len, 1.5), PROMPTS, OURS, BASELINE))
    assert biased["win_rate"].values == (1, 0.5, 0.5, 0) and biased["flips"].values == (0, 1, 0, 0)
    first = named(compare(Judge(lambda text: 0, 1), PROMPTS, OURS, BASELINE))
    assert first["win_rate"].estimate().value == 0.5 and first["flips"].values == (1, 1, 0, 1)


def test_equal_answers_are_a_tie_that_no_judge_is_asked_about():
    class Asked(Judge):
        def __call__(self, prompts, first, second):
            pairs.extend(zip(prompts, first, second, strict=True))
            return [0.9] * len(prompts)

    pairs = []
    found = compare(Asked(len), ["p", "q", "r"], ["a", "same", "b"], ["b", "same", "a"], groups="xyz")
    assert pairs == [("p", "a", "b"), ("r", "b", "a"), ("p", "b", "a"), ("r", "a", "b")]
    assert found.scores == pytest.approx((0.5, 0.5, 0.5)) and found.flips == (1, 0, 1) and found.longer == (0, 0, 0)
    pairs.clear()
    assert compare(Asked(len), ["p"], ["a"], ["a"]).scores == (0.5,) and not pairs


def test_probabilities_and_missing_judgements():
    class Unsure(Judge):
        def __call__(self, prompts, first, second):
            return [0.9, math.nan, 0.2] if list(first) == ["aaa", "bb", "d"] else [0.3, 0.5, 0.6]

    found = compare(Unsure(len), PROMPTS, OURS, BASELINE, groups="aabb")
    assert found.scores == pytest.approx((0.8, math.nan, 0.5, 0.3), nan_ok=True)
    assert named(found)["win_rate"].estimate() == pytest.approx(mean([0.8, 0.5, 0.3], "abb"))
    assert named(found)["longer_wins"].values == pytest.approx((1, math.nan, 0.5, 0), nan_ok=True)
    assert named(found)["flips"].values == pytest.approx((0, math.nan, 0, 0), nan_ok=True)
    assert named(found)["unjudged"].values == (0, 1, 0, 0)


@pytest.mark.parametrize(
    ("scores", "message"),
    [([0.5], "returned 1 scores for 3 pairs"), ([0, 1, -2], r"returned -2 for pair 3 \(1 such of 3\)")],
)
def test_a_judge_that_returns_something_else_is_named(scores, message):
    class Wrong(Judge):
        def __call__(self, prompts, first, second):
            return scores

    with pytest.raises(UserError, match=f"^test: {message}"):
        compare(Wrong(len), PROMPTS, OURS, BASELINE)


def test_people_who_saw_one_order():
    found = Preferences((1.0, 0.0), groups=("a", "b"))
    assert [*named(found)] == ["win_rate"]
    assert found.estimates() == {"win_rate": wilson(1, 2), "lc_win_rate": None}


LENGTHS = {
    "longer in 50 %": lambda random, n: random.normal(0.0, 1, n),
    "longer in 69 %": lambda random, n: random.normal(0.5, 1, n),
    "longer in 84 %": lambda random, n: random.normal(1.0, 1, n),
    "longer in 92 %": lambda random, n: random.normal(1.4, 1, n),
    "skewed": lambda random, n: random.lognormal(0, 1.5, n) - 0.6,
    "rarely shorter": lambda random, n: random.exponential(1, n) * np.where(random.random(n) < 0.08, -1, 1),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.exhaustive(2)
def test_judges_of_length_alone_are_brought_to_a_half(name):
    """A half for one that sees the sign, and within 0.015 for one that sees the size too."""
    random = np.random.default_rng(0)
    for n in (40, 250, 1000):
        found = []
        for _ in range(200):
            lengths = np.round(200 * LENGTHS[name](random, n))
            by_sign = length_controlled((np.sign(lengths) + 1) / 2, lengths)
            if by_sign is None:
                continue
            assert by_sign.value == pytest.approx(0.5) and by_sign.low < 0.45 + n / 1e4
            found.append(length_controlled(random.random(n) < 1 / (1 + np.exp(-2 * np.tanh(lengths / 200))), lengths))
        held = [e.low <= 0.5 <= e.high for e in found]
        assert len(found) > 150 or n == 40
        if len(found) > 150:
            assert np.mean([e.value for e in found]) == pytest.approx(0.5, abs=0.02) and np.mean(held) > 0.92


def test_quality_is_left():
    """A judge of quality alone keeps its rate, and one of both has the mean of its rates at either sign."""
    random = np.random.default_rng(1)
    for by_length in (0.0, 2.0):
        rates, errors, held = [], [], []
        for _ in range(200):
            lengths = np.round(200 * random.normal(0.7, 1, 400))
            chances = [1 / (1 + np.exp(-1 - by_length * np.tanh(sign * lengths / 200))) for sign in (1, -1)]
            found = length_controlled((random.random(400) < chances[0]) * 1.0, lengths)
            rate = float(np.mean(chances, 0)[lengths < 0].mean())
            rates.append(rate)
            errors.append(found.value - rate)
            held.append(found.low <= rate <= found.high)
        assert abs(np.mean(errors)) < 0.015 and np.mean(held) > 0.92 and np.mean(rates) > 0.69


def test_length_control_by_hand():
    """Twelve pairs where ours is longer, ten where it is shorter, in strata of differences of 1, 2, 3 and 4."""
    longer = [1.0, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 9, -1, -1, -1, -2, -2, -2, -3, -3, -4, -4]
    scores = [1.0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    # Quantiles of the shorter ones: 1.25, 2, 3, 4; a 9 is beyond. Each stratum has 2 pairs of its rarer sign.
    expected = np.mean([(0.5 + 1 / 3) / 2, (1 + 0) / 2, (2 / 3 + 0.5) / 2, (0.75 + 0) / 2])
    found = length_controlled(scores, longer)
    assert found.value == pytest.approx(expected) and found.n == 21
    # A pair of equal lengths counts as one pair of the rarer sign.
    assert length_controlled([*scores, 1.0], [*longer, 0.0]).value == pytest.approx((16 * expected + 1) / 17)


@pytest.mark.skipif(not RESPONSES.is_file(), reason=f"no file {RESPONSES}")
def test_real_pairs():
    """252 answers of each two of eight models, and a judge of length alone: one model is always the longer one."""
    rows = [json.loads(line)["responses"] for line in RESPONSES.read_text().splitlines()]
    lengths = {name: np.array([len(row[name]) for row in rows]) for name in rows[0]}
    for ours, baseline in permutations(lengths, 2):
        longer = lengths[ours] - lengths[baseline]
        found = Preferences(tuple((np.sign(longer) + 1) / 2), longer=tuple(longer * 1.0)).estimates()
        controlled = found["lc_win_rate"]
        assert (controlled is None) == ("davinci" in (ours, baseline))
        if controlled:
            assert controlled.value == pytest.approx(0.5) and controlled.low < 0.46 and controlled.high > 0.54
            smooth = length_controlled(1 / (1 + np.exp(-longer / 200)), longer)
            assert smooth.value == pytest.approx(0.5, abs=0.02)
    longer = lengths["text-davinci-003"] - lengths["davinci-t0-ft"]
    assert wilson(float(((np.sign(longer) + 1) / 2).sum()), 252).value == pytest.approx(0.891, abs=5e-4)


def test_length_that_cannot_be_controlled_for():
    random = np.random.default_rng(1)
    wins = (random.random(100) < 0.8) * 1.0
    lengths = random.integers(1, 90, 100).astype(float)
    assert length_controlled(wins, lengths) is None  # always longer
    lengths[:9] *= -1
    assert length_controlled(wins, lengths) is None  # in 91 of 100
    lengths[9] *= -1
    assert length_controlled(wins, lengths) is not None
    assert length_controlled(wins, np.where(lengths < 0, lengths, lengths + 90)) is None  # by sizes of one sign alone
    assert length_controlled([], []) is length_controlled([1.0] * 30, [0.0] * 30) is None
    assert length_controlled([math.nan, 1.0], [-3.0, 3.0]) is None


def test_length_control_of_groups_and_of_winners_of_all():
    random = np.random.default_rng(2)
    lengths = np.round(50 * random.normal(0.4, 1, 240))
    wins = (random.random(240) < 0.6) * 1.0
    alone = length_controlled(wins, lengths)
    doubled = length_controlled([*wins, *wins], [*lengths, *lengths], [f"{i % 240}" for i in range(480)])
    assert doubled.n == alone.n and doubled[:3] == pytest.approx(alone[:3], abs=0.01)
    missing = length_controlled([*wins, math.nan], [*lengths, -900.0])  # its length bounds no stratum
    assert missing == alone
    swapped = length_controlled(1 - wins, -lengths)
    assert swapped[:3] == pytest.approx((1 - alone.value, 1 - alone.high, 1 - alone.low))
    few = [1.0, 0.0] * 10, [5.0, -5.0] * 10
    assert length_controlled(*few, [f"{i % 18}" for i in range(20)]) is None  # nine groups of either sign
    assert length_controlled(*few).n == 20
    won = length_controlled([1.0] * 40, [5.0, -5.0] * 20)
    assert won == wilson(40, 40)
