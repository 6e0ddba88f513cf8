"""Intervals hold what they promise, and every odd number of rows has an honest one."""

import math

import numpy as np
import pytest

from rlhf_fast.eval.estimates import Estimate as E
from rlhf_fast.eval.estimates import (
    Z,
    agreement,
    correlation,
    difference,
    estimate_from,
    mean,
    student_t,
    unpaired_difference,
    wilson,
)
from rlhf_fast.eval.measures import Measure, difference_record, paired_difference, result_record

NAN = math.nan


def near(estimate, *expected):
    return estimate == pytest.approx(expected, abs=5e-4, nan_ok=True)


def test_published_values():
    assert near(wilson(8, 10), 0.8, 0.490, 0.943, 10)
    # Fleiss' example: how many of 14 labelers gave 10 units each of 5 labels, in hexadecimal.
    counts = ["0000e", "02642", "00356", "03920", "22811", "77000", "32630", "25322", "65210", "02237"]
    table = [[label for label, k in enumerate(row) for _ in range(int(k, 16))] for row in counts]
    assert agreement(table).fleiss == pytest.approx(0.210, abs=5e-4)
    # Krippendorff's example: 4 labelers, 12 units, some labels missing.
    labelers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[None if label == "." else label for label in unit] for unit in zip(*labelers, strict=True)]
    found = agreement(units)
    assert found.krippendorff == pytest.approx(0.743, abs=5e-4)
    assert math.isnan(found.fleiss) and found.pairwise.n == 11


def test_agreement_where_there_is_little_to_agree_on():
    assert agreement([]).pairwise.n == agreement([[1], [None, 2], [NAN, 1.0]]).pairwise.n == 0
    alike = agreement([["a", "a"], ["a", "a"]])
    assert alike.pairwise.value == 1 and alike.pairwise.low < 0.5
    assert math.isnan(alike.krippendorff) and math.isnan(alike.fleiss)
    assert agreement([["a", "b"], ["b", "a"]]).pairwise.value == 0


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([], {}, (NAN, NAN, NAN, 0)),
        ([NAN], {}, (NAN, NAN, NAN, 0)),
        ([1, NAN], {}, wilson(1, 1)),
        ([0.25], {}, wilson(0.25, 1)),
        ([3.0], {}, (3.0, NAN, NAN, 1)),
        ([2.0, 2.0], {}, (2.0, 2.0, 2.0, 2)),
        ([0.5] * 9, {}, wilson(4.5, 9)),
        ([0, 0, 0, 0], {}, wilson(0, 4)),
        ([1, 1, 1, 1], {"groups": "aabb"}, wilson(2, 2)),  # all right, but only two groups
        ([1, 1, 1], {"groups": "aaa"}, wilson(1, 1)),
        ([1, 1, 1], {"bounded": False}, (1.0, 1.0, 1.0, 3)),  # answers of one token each, no shares
        ([1, NAN, 3], {"weights": [1, 5, 1]}, mean([1.0, 3.0])),
        ([6, 2], {"weights": [3, 1]}, (2.0, 2.0, 2.0, 2)),
        ([1.0, 2.0], {"weights": [0, 0]}, (NAN, NAN, NAN, 0)),
    ],
)
def test_mean_of_odd_rows(values, options, expected):
    assert near(mean(values, **options), *expected)


def test_mean_by_hand():
    # Three values: standard error of the mean .2 / sqrt 3, and Student's t with 2 degrees of freedom.
    half = 4.30265 * 0.2 / 3**0.5
    assert near(mean([0.2, 0.4, 0.6], bounded=False), 0.4, 0.4 - half, 0.4 + half, 3)
    # In [0, 1]: the bounds are where |bound - mean| is half a width, scaled by sqrt(bound (1 - bound) / (.4 x .6)).
    found = mean([0.2, 0.4, 0.6])
    for bound in (found.low, found.high):
        assert abs(bound - 0.4) == pytest.approx(half * math.sqrt(bound * (1 - bound) / 0.24))
    # Ratio 10 / 5 over two groups: 7 / 3 and 3 / 2, which is what is left without the other: 2 - 1/2 and 2 + 1/3. The
    # weights 3 and 2 are worth 25 / 13 equal groups. The long tail is that of the estimate's fall without a group.
    squares, cubes = (1 / 2**k + (-1 / 3) ** k for k in (2, 3))
    half, shift = 12.7062 * math.sqrt(squares / 2), 2 * cubes / squares * (1 / 6 + Z * Z / 3)
    assert near(mean([3, 4, 3], "aab", [1, 2, 2]), 2, 2 - half, 2 + half + shift, 2)
    # Weights 4, 1, 1, 1, 1 are worth 64 / 20 = 3.2 equal groups: Student's t has 2 degrees of freedom.
    found = mean([8, 1, 3, 2, 2], None, [4, 1, 1, 1, 1])
    assert near(found, 2, 2 - 4.30265 * math.sqrt(2 / 49 * 4 / 5), 2 + 4.30265 * math.sqrt(2 / 49 * 4 / 5), 5)
    assert near(mean([2, 0], None, [1, 0], False), 2, NAN, NAN, 2)  # one group is all
    assert mean([1, 0, 1, 0], [5, 6, 7, 8]) == wilson(2, 4)
    assert mean([1, 0, 1], groups=[1, 1, 2]).n == 2
    with pytest.raises(ValueError, match="2 groups for 3 rows"):
        mean([1, 2, 3], groups="ab")


def test_student_t():
    for degrees, exact in ((1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (30, 2.04227), (10**6, Z)):
        assert student_t(degrees) == pytest.approx(exact, rel=2e-3)


def test_difference_by_hand():
    a, b = [1, 1, 0, NAN, 1], [0, 1, 0, 1, NAN]
    half = student_t(2) * math.sqrt((2 / 3) ** 2 + 2 * (1 / 3) ** 2) * math.sqrt(3 / 2) / 3
    assert near(difference(a, b), 1 / 3, max(1 / 3 - half, -1), min(1 / 3 + half, 1), 3)
    assert near(difference([], []), NAN, NAN, NAN, 0)
    assert near(difference([5.0], [3.0]), 2, NAN, NAN, 1)
    width = 1 - 0.025**0.25  # nothing differs in four rows: that proves little
    assert near(difference([1, 0, 1, 0], [1, 0, 1, 0]), 0, -width, width, 4)
    assert near(difference([1] * 4, [0] * 4), 1, 1 - 2 * width, 1, 4)
    assert near(difference([0.5] * 4, [0] * 4), 0.5, 0.5 - 1.5 * width, 0.5 + 0.5 * width, 4)
    assert near(difference([1, 1], [0, 0], "aa"), 1, 1 - 2 * 0.975, 1, 1)
    assert near(difference([7.5, 3.0], [7.5, 3.0]), 0, 0, 0, 2)
    # Ratios 9 / 4 and 5. Without the first row they are 3 and 6, without the second 2 and 4.
    half, shift = 12.7062 * math.sqrt((1 / 16 + 9 / 16) / 2), 2 * (1 / 64 - 27 / 64) / (10 / 16) * (1 / 6 + Z * Z / 3)
    assert near(difference([6, 3], [4, 6], None, [3, 1], [1, 1]), -2.75, -2.75 - half + shift, -2.75 + half, 2)


def test_pairing_narrows_the_interval():
    random = np.random.default_rng(0)
    a = (random.random(400) < 0.4) * 1.0
    b = np.where(random.random(400) < 0.1, 1 - a, a)
    paired, apart = difference(a, b), unpaired_difference(mean(a), mean(b))
    assert paired.value == pytest.approx(apart.value) and paired.half_width < 0.5 * apart.half_width


def test_unpaired_difference_of_asymmetric_intervals():
    found = unpaired_difference(E(0.5, 0.4, 0.7, 10), E(0.2, 0.1, 0.5, 20))
    assert near(found, 0.3, 0.3 - math.hypot(0.1, 0.3), 0.3 + math.hypot(0.2, 0.1), 10)
    assert not found.excludes(0) and E(0.2, 0.1, 0.5, 3).excludes(0) and not E(0.0, 0.0, 0.0, 3).excludes(0)
    assert not E(0.2, NAN, NAN, 1).excludes(0)


def test_correlation():
    # Fisher's z by hand: atanh .5 = .5493, and half a width of 1.96 / sqrt 25.
    assert near(correlation(0.5, 28), 0.5, math.tanh(0.549306 - Z / 5), math.tanh(0.549306 + Z / 5), 28)
    for value in (1.0, 1 + 1e-12, -1.0, 0.9999999):
        for n in (3, 4, 10, 60):
            found = correlation(value, n)
            assert -1 <= found.low <= found.value <= found.high <= 1 and found.high - found.low > 1 / n**2
    assert correlation(0.3, 3) == (0.3, -1, 1, 3) and correlation(NAN, 0).n == 0


def test_coverage():
    """Over 1,000 draws the interval holds the true mean as often as it says; where rows belong together, only with
    their groups."""
    random = np.random.default_rng(0)
    for n, share in ((30, 0.5), (30, 0.95), (200, 0.05)):
        found = [mean(row) for row in (random.random((1000, n)) < share) * 1.0]
        assert np.mean([e.low <= share <= e.high for e in found]) >= 0.93
    found = [mean(random.exponential(1.0, 40)) for _ in range(1000)]
    assert np.mean([e.low <= 1 <= e.high for e in found]) >= 0.9  # a skewed mean of 40 values
    groups = np.repeat(np.arange(60), 4).tolist()  # four labelers a prompt, and prompts differ much
    naive = clustered = 0
    for _ in range(1000):
        prompt = np.repeat(random.beta(0.5, 0.5, 60), 4)
        votes = (random.random(240) < prompt) * 1.0
        alone, together = mean(votes), mean(votes, groups)
        naive += alone.low <= 0.5 <= alone.high
        clustered += together.low <= 0.5 <= together.high
    assert clustered >= 940 and naive < 850
    groups = np.repeat(np.arange(50), 4).tolist()  # rare things that come together
    votes = (random.random((1000, 200)) < np.repeat(random.beta(0.1, 4.9, (1000, 50)), 4, axis=1)) * 1.0
    assert np.mean([e.low <= 0.02 <= e.high for e in (mean(row, groups) for row in votes)]) >= 0.94


def test_coverage_of_paired_differences_of_decisions():
    random = np.random.default_rng(3)
    for n, only_ours, only_theirs in ((200, 0.03, 0.03), (50, 0.1, 0.02), (200, 0.01, 0.01)):
        held = 0
        for drawn in random.random((1000, n)):
            both = drawn > 0.6
            ours, theirs = (drawn < only_ours) | both, ((drawn >= only_ours) & (drawn < only_ours + only_theirs)) | both
            found = difference(ours, theirs)
            held += found.low <= only_ours - only_theirs <= found.high
        assert held >= 930


def test_few_rows_decide_nothing():
    """The interval excludes 0 in at most 6.4 % of cases where rows differ by chance, and never with up to five."""
    for n in range(1, 11):
        for differing in (1.0, 0.9, 0.7, 0.5, 0.2):
            chance = 0.0
            for ours, theirs in ((i, j) for i in range(n + 1) for j in range(n + 1 - i)):
                rows = [1.0] * ours + [-1.0] * theirs + [0.0] * (n - ours - theirs)
                found = difference([float(x > 0) for x in rows], [float(x < 0) for x in rows])
                ways = math.comb(n, ours) * math.comb(n - ours, theirs)
                same = (1 - differing) ** (n - ours - theirs)
                chance += found.excludes(0) * ways * (differing / 2) ** (ours + theirs) * same
            assert chance <= (0 if n < 6 else 0.064), (n, differing)


def test_coverage_of_ratios_of_long_tailed_lengths():
    """Documents of lognormal lengths, whose rates differ, and those where the longer ones have lower rates."""
    random = np.random.default_rng(4)
    lengths = random.lognormal(6, 1.2, 200_000)
    for fall, promised in ((0.0, 0.935), (0.1, 0.9)):
        rates = 2.0 - fall * np.log(lengths)
        truth = float((lengths * rates).sum() / lengths.sum())
        for n in (10, 30):
            held = 0
            for drawn in random.integers(0, len(lengths), (800, n)):
                noisy = lengths[drawn] * (rates[drawn] + random.normal(0, 0.3, n))
                found = mean(noisy, None, lengths[drawn], False)
                held += found.low <= truth <= found.high
            assert held >= 800 * promised, (fall, n)


def test_coverage_of_paired_differences_of_ratios():
    random = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        tokens = random.integers(5, 60, 50)
        document = random.normal(0, 0.3, 50)  # what makes a document hard is hard for both models
        ours, theirs = (tokens * (level + document + random.normal(0, 0.1, 50)) for level in (2.0, 2.1))
        found = difference(ours, theirs, None, tokens, tokens)
        held += found.low <= -0.1 <= found.high
    assert held >= 930


def test_measures():
    perplexity = Measure("ppl", (2.0, 4.0, 3.0), unit="perplexity", higher_is_better=False)
    nats = mean([2.0, 4.0, 3.0])
    assert near(perplexity.estimate(), *map(math.exp, nats[:3]), 3)
    other = perplexity._replace(values=(1.0, 3.0, 2.0))
    assert near(paired_difference(perplexity, other), 1, 1, 1, 3)
    record = difference_record("sft", "base", "lambada", perplexity, other)
    assert (record["unit"], record["baseline"], record["n"]) == ("nats", "base", 3)
    certain = perplexity._replace(values=(0.0, 0.1, 1.0)).estimate()  # no probability is above 1
    assert certain.low == 1 < certain.value < certain.high
    overflow = result_record("sft", "lambada", perplexity._replace(values=(900.0, 800.0)))
    assert 1e300 < overflow["value"] < math.inf and overflow["n"] == 2
    accuracy = Measure("acc", (1.0, 0.0, NAN, 1.0), groups=("a", "b", "b", "c"))
    assert accuracy.estimate() == wilson(2, 3)
    assert near(Measure("words", (1.0, 1.0), unit="tokens").estimate(), 1, 1, 1, 2)
    assert Measure("pairs", (2.0, 2.0), weights=(2.0, 2.0)).estimate() == wilson(2, 2)
    assert estimate_from(result_record("m", "t", accuracy)) == accuracy.estimate()
    assert math.isnan(estimate_from(result_record("m", "t", Measure("acc", (NAN,)))).value)
    assert result_record("m", "t", Measure("acc", ()), 2.5) == {
        "model": "m", "task": "t", "measure": "acc", "value": None, "low": None, "high": None, "n": 0, "unit": "share",
        "judge": "", "seconds": 2.5, "higher_is_better": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="of 4 rows"):
        paired_difference(accuracy, accuracy._replace(values=(1.0,)))
