"""Win rates: both orders, ties by halves, and what is left at equal lengths."""

import json
import math
import os
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
    assert found.estimates() == {"win_rate": wilson(1, 2), "win_rate_length_controlled": None}


def drawn(strength, length_effect, n=600):
    """Pairs in which ours is the longer one mostly, and wins by `strength` and by its length."""
    random = np.random.default_rng(0)
    lengths = np.round(20 + 50 * random.normal(size=n))
    logits = strength + length_effect * np.tanh(lengths / lengths.std())
    return (random.random(n) < 1 / (1 + np.exp(-logits))) * 1.0, lengths


def test_length_is_controlled_for():
    wins, lengths = drawn(0.0, 4.0, 2400)
    found = length_controlled(wins, lengths)
    assert wins.mean() > 0.58 and found.value == pytest.approx(0.5, abs=0.04) and found.low < 0.5 < found.high
    wins, lengths = drawn(1.0, 3.0)
    found = length_controlled(wins, lengths)
    assert found.low < 1 / (1 + math.exp(-1)) < found.high < wins.mean() + 0.1
    assert found == length_controlled(wins, lengths)


def test_a_judge_of_length_alone_is_brought_to_a_half():
    random, raw, controlled = np.random.default_rng(0), [], []
    for _ in range(8):
        lengths = np.round(20 + 50 * random.normal(size=252))
        raw.append((lengths > 0).mean())
        controlled.append(length_controlled((lengths > 0) * 1.0, lengths))
    assert np.mean(raw) > 0.63 and np.mean([e.value for e in controlled]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.skipif(not RESPONSES.is_file(), reason=f"no file {RESPONSES}")
def test_real_pairs():
    """252 answers of two models and a judge of length alone; and a model that is longer in nearly all pairs."""
    rows = [json.loads(line)["responses"] for line in RESPONSES.read_text().splitlines()]
    lengths = {name: np.array([len(row[name]) for row in rows]) for name in rows[0]}
    longer = lengths["text-davinci-003"] - lengths["text-davinci-001"]
    found = Preferences(tuple((longer > 0) * 1.0), longer=tuple(longer * 1.0)).estimates()
    assert found["win_rate"].value == pytest.approx(0.679, abs=5e-4)
    assert found["win_rate_length_controlled"].value == pytest.approx(0.485, abs=5e-4)
    longer = lengths["davinci"] - lengths["text-davinci-001"]
    assert length_controlled((longer > 0) * 1.0, longer * 1.0) is None


def test_length_that_cannot_be_controlled_for():
    random = np.random.default_rng(1)
    wins = (random.random(100) < 0.8) * 1.0
    lengths = random.integers(1, 90, 100).astype(float)
    assert length_controlled(wins, lengths) is None  # always longer
    lengths[:4] *= -1
    assert length_controlled(wins, lengths) is None  # in 96 of 100
    lengths[4] *= -1
    assert length_controlled(wins, lengths) is not None
    assert length_controlled([], []) is length_controlled([1.0], [0.0]) is None
    assert length_controlled([math.nan, 1.0], [-3.0, 3.0]) is None


def test_length_control_of_groups_and_of_winners_of_all():
    wins, lengths = drawn(0.5, 1.0, 240)
    alone = length_controlled(wins, lengths)
    doubled = length_controlled([*wins, *wins], [*lengths, *lengths], [f"{i % 240}" for i in range(480)])
    assert doubled.n == alone.n == 240
    assert doubled.value == pytest.approx(alone.value, abs=5e-3)
    assert doubled.half_width == pytest.approx(alone.half_width, rel=0.15)
    won = length_controlled([1.0] * 40, [5.0, -5.0] * 20)
    few = [1.0, 0.0] * 10, [5.0, -5.0, -5.0, 5.0] * 5
    assert length_controlled(*few, [f"{i % 9}" for i in range(20)]) is length_controlled(few[0][:9], few[1][:9]) is None
    assert length_controlled(*few, [f"{i % 10}" for i in range(20)]).n == 10
    assert won.value > 0.98 and won.low < 0.93 and won.n == 40
