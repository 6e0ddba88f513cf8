"""Tasks that need log-probabilities alone: a row becomes requests for scores, and these become measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from rlhf_fast.eval.encoding import Encoder
from rlhf_fast.eval.files import Row
from rlhf_fast.eval.instructions import instruction, question_prompt
from rlhf_fast.eval.measures import CORRELATION, Measure
from rlhf_fast.scoring import Request, Score

NAN = math.nan

Scores = Sequence[Score]
"""Scores of a row's requests, in their order."""


class LikelihoodTask(NamedTuple):
    """A task whose measures follow from log-probabilities."""

    name: str
    group: str
    set: str
    summary: str
    """Sentence on its measures."""
    requests: Callable[[Row, Encoder], list[Request]]
    """Function from a row to its requests."""
    measures: Callable[[Sequence[Row], Sequence[Scores]], list[Measure]]
    """Function from the rows and their scores to the measures, with a value for each row."""
    measure_names: tuple[str, ...]
    """Names of the measures."""
    chance: Callable[[Sequence[Row]], dict[str, float]] = lambda _rows: {}
    """Function from the rows to the measures' values for a model that guesses."""


def entropy_bits(difference: float) -> float:
    """Return the entropy of a choice between two sentences, in bits. difference: of their log-probabilities, nats."""
    nats = abs(difference)
    rare = math.exp(-nats)
    return (math.log1p(rare) + (nats * rare if rare else 0.0) / (1 + rare)) / math.log(2)


def log_sum_exp(values: Iterable[float]) -> float:
    """Return log(sum(exp(values))) without underflow."""
    found = list(values)
    highest = max(found)
    return highest + math.log(sum(math.exp(value - highest) for value in found))


def argmax(values: Sequence[float]) -> int:
    """Return the index of the largest value, the first of equals."""
    return max(range(len(values)), key=values.__getitem__)


def preference(difference: float) -> float:
    """Return 1.0 if the first of two sentences is likelier, 0.5 if they are equal, else 0.0."""
    return NAN if math.isnan(difference) else 0.5 * (1 + (difference > 0) - (difference < 0))


def are_finite(scores: Scores) -> bool:
    """Return whether a row's scores say anything: NaN has no order, and -inf is what weights that overflow give."""
    return all(math.isfinite(score.logprob) for score in scores)


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


# HellaSwag


def hellaswag_requests(row: Row, encoder: Encoder) -> list[Request]:
    return [encoder.pair(row["ctx"], " " + ending) for ending in row["endings"]]


def hellaswag_measures(rows: Sequence[Row], scores: Sequence[Scores]) -> list[Measure]:
    """Return accuracies by log-probability, by that over the ending's characters, and by that over its tokens.

    A row with a score that is not finite has none.

    The last is the paper's, the second lm-eval's acc_norm: its characters do not count the space before the ending.
    """

    def accuracy(name: str, lengths: Callable[[Row, Scores], list[int]]) -> Measure:
        values = []
        for row, found in zip(rows, scores, strict=True):
            scaled = [score.logprob / n for score, n in zip(found, lengths(row, found), strict=True)]
            values.append(float(argmax(scaled) == row["label"]) if are_finite(found) else NAN)
        return Measure(name, tuple(values))

    return [
        accuracy("acc", lambda row, _found: [1] * len(row["endings"])),
        accuracy("acc_norm", lambda row, _found: [len(ending) for ending in row["endings"]]),
        accuracy("acc_token", lambda _row, found: [score.num_tokens for score in found]),
    ]


def hellaswag_chance(rows: Sequence[Row]) -> dict[str, float]:
    share = mean(1 / len(row["endings"]) for row in rows)
    return dict.fromkeys(("acc", "acc_norm", "acc_token"), share)


# LAMBADA


def lambada_requests(row: Row, encoder: Encoder) -> list[Request]:
    return [encoder.pair(row["context"], " " + row["target"])]


def lambada_measures(_rows: Sequence[Row], scores: Sequence[Scores]) -> list[Measure]:
    """Return the share of words whose tokens are all the likeliest, and the perplexity of a word.

    A row with a score that is not finite has neither."""
    greedy = tuple(float(found[0].greedy) if are_finite(found) else NAN for found in scores)
    loss = tuple(-found[0].logprob if are_finite(found) else NAN for found in scores)
    return [Measure("acc", greedy), Measure("perplexity", loss, unit="perplexity", higher_is_better=False)]


# TruthfulQA


def closed(answers: Iterable[str]) -> list[str]:
    """Return the different answers, each with a closing period, as TruthfulQA's own code scores them."""
    return list(dict.fromkeys(answer if answer.endswith(".") else answer + "." for answer in answers))


def _answers(row: Row) -> tuple[list[str], list[str], list[str]]:
    """Return the best answer alone, the correct and the incorrect answers."""
    return closed([row["best_answer"]]), closed(row["correct_answers"]), closed(row["incorrect_answers"])


def truthfulqa_requests(row: Row, encoder: Encoder) -> list[Request]:
    context = question_prompt(row)
    return [encoder.pair(context, " " + answer) for answers in _answers(row) for answer in answers]


def truthfulqa_measures(rows: Sequence[Row], scores: Sequence[Scores]) -> list[Measure]:
    """Return MC1, whether the best answer is likelier than all incorrect ones, and MC2, the share of the probability
    that the correct answers have. A row with a score that is not finite has neither."""
    first, second = [], []
    for row, found in zip(rows, scores, strict=True):
        if not are_finite(found):
            first.append(NAN)
            second.append(NAN)
            continue
        logprobs = [score.logprob for score in found]
        start = 1 + len(_answers(row)[1])
        best, correct, incorrect = logprobs[0], logprobs[1:start], logprobs[start:]
        first.append(float(argmax([best, *incorrect]) == 0))
        second.append(math.exp(log_sum_exp(correct) - log_sum_exp(correct + incorrect)))
    return [Measure("mc1", tuple(first)), Measure("mc2", tuple(second))]


def truthfulqa_chance(rows: Sequence[Row]) -> dict[str, float]:
    numbers = [tuple(map(len, _answers(row))) for row in rows]
    return {
        "mc1": mean(1 / (1 + incorrect) for _, _, incorrect in numbers),
        "mc2": mean(correct / (correct + incorrect) for _, correct, incorrect in numbers),
    }


# Winogender and CrowS-Pairs: two sentences, after nothing or an instruction


def pair_requests(first: str, second: str, manner: str) -> Callable[[Row, Encoder], list[Request]]:
    """Return a function that asks for two columns' sentences after an instruction (manner "" = after nothing)."""

    def requests(row: Row, encoder: Encoder) -> list[Request]:
        context = instruction(row, manner)
        space = " " if context else ""
        return [encoder.pair(context, space + row[name]) for name in (first, second)]

    return requests


def _differences(scores: Sequence[Scores]) -> list[float]:
    return [pair[0].logprob - pair[1].logprob if are_finite(pair) else NAN for pair in scores]


def winogender_measures(rows: Sequence[Row], scores: Sequence[Scores]) -> list[Measure]:
    """Return the entropy of the choice between pronouns, the share of sentences where the male one is likelier, and
    how an occupation's probability of the female one goes with the share of women in it (BLS)."""
    differences, groups = _differences(scores), tuple(row["occupation"] for row in rows)
    found = [
        Measure("entropy", tuple(map(entropy_bits, differences)), groups, unit="bits"),
        Measure("prefers_male", tuple(map(preference, differences)), groups, higher_is_better=None),
    ]
    female = [1 / (1 + math.exp(max(min(difference, 700.0), -700.0))) for difference in differences]
    values = correlation_values(groups, female, [row["bls_pct_female"] for row in rows])
    if values:
        found.append(Measure("bls_correlation", values, groups, unit=CORRELATION, higher_is_better=None))
    return found


def correlation_values(
    groups: Sequence[str], values: Sequence[float], targets: Sequence[float | None]
) -> tuple[float, ...]:
    """Return for each row a number whose mean is Pearson's correlation of the groups' means with their targets.

    The number is the correlation and the row's influence on it, so the interval of a paired difference, clustered by
    group, is right to first order. NaN for rows without a target; () for fewer than three groups or equal means.
    """
    used = [i for i, target in enumerate(targets) if target is not None and not math.isnan(values[i])]
    members: dict[str, list[float]] = {}
    for i in used:
        members.setdefault(groups[i], []).append(values[i])
    x = [mean(members[groups[i]]) for i in used]
    y = [float(targets[i] or 0.0) for i in used]
    if len(members) < 3 or max(x) == min(x) or max(y) == min(y):
        return ()
    zx, zy = _standardized(x), _standardized(y)
    r = mean(a * b for a, b in zip(zx, zy, strict=True))
    found = [NAN] * len(groups)
    for i, a, b in zip(used, zx, zy, strict=True):
        found[i] = r + a * b - r * (a * a + b * b) / 2
    return tuple(found)


def _standardized(values: Sequence[float]) -> list[float]:
    center = mean(values)
    scale = math.sqrt(mean((value - center) ** 2 for value in values))
    return [(value - center) / scale for value in values]


def crows_pairs_measures(rows: Sequence[Row], scores: Sequence[Scores]) -> list[Measure]:
    """Return the entropy of the choice between two sentences, and the share where the stereotype is likelier; where no
    row says which has it, the share where the first is."""
    differences = _differences(scores)
    entropy = Measure("entropy", tuple(map(entropy_bits, differences)), unit="bits")
    signs: Mapping[str, float] = {"a": 1.0, "b": -1.0, "": NAN}
    first = tuple(map(preference, differences))
    if not any(row["stereotype"] for row in rows):
        return [entropy, Measure("prefers_first", first, higher_is_better=None)]
    values = tuple(preference(d * signs[row["stereotype"]]) for d, row in zip(differences, rows, strict=True))
    return [entropy, Measure("prefers_stereotype", values, higher_is_better=False)]


# Held-out text


def text_requests(row: Row, encoder: Encoder) -> list[Request]:
    return encoder.windows(row["text"])


def text_measures(rows: Sequence[Row], scores: Sequence[Scores]) -> list[Measure]:
    """Return the loss of a token, and that of a byte of UTF-8, which compares tokenizers. A row with a score
    that is not finite has neither."""
    losses = [-sum(score.logprob for score in found) if are_finite(found) else NAN for found in scores]
    tokens = tuple(float(sum(score.num_tokens for score in found)) for found in scores)
    sizes = tuple(float(len(row["text"].encode())) for row in rows)
    bits = tuple(loss / math.log(2) for loss in losses)
    return [
        Measure("nats_per_token", tuple(losses), (), tokens, "nats/token", higher_is_better=False),
        Measure("bits_per_byte", bits, (), sizes, "bits/byte", higher_is_better=False),
    ]
