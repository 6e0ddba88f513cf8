"""A reward model's own report: how it orders responses that people ranked, and what is left of its scores when a policy
or a choice among n responses has maximized them.

It works for a Model with a scalar head and for any reward function of texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from rlhf_fast.batches import Comparisons, GivenRow
from rlhf_fast.config.fields import DataConfig
from rlhf_fast.data import Dataset, read_comparisons
from rlhf_fast.data.datasets import prompt_as_text
from rlhf_fast.data.encode import PromptFormat
from rlhf_fast.data.rows import read_examples
from rlhf_fast.errors import UserError
from rlhf_fast.eval.cells import show
from rlhf_fast.eval.estimates import Estimate, mean
from rlhf_fast.eval.measures import Measure, result_record
from rlhf_fast.eval.paper import paper_text
from rlhf_fast.model.model import Model
from rlhf_fast.training.reward_calls import call_all, print_note
from rlhf_fast.training.reward_functions import FunctionReward
from rlhf_fast.training.rewards import NO_LIMITS, check_scores

NUM_BINS = 5
TextReward = Callable[..., Sequence[float]]
"""A function of a list of texts (prompt and response together), or of two lists, prompts and responses."""


class Ranked(NamedTuple):
    """The responses to one prompt: the rewards and the labelers' ranks, 0 for the best, equal ranks for a tie."""

    scores: tuple[float, ...]
    ranks: tuple[int, ...]
    prompt: str = ""
    """Rows of one prompt belong together. "" = a prompt of its own."""

    def pairs(self) -> Iterator[float]:
        """Yield score(better) - score(worse) of each pair of responses that labelers ranked apart."""
        for i, j in combinations(range(len(self.ranks)), 2):
            if self.ranks[i] != self.ranks[j]:
                difference = self.scores[i] - self.scores[j]
                yield difference if self.ranks[i] < self.ranks[j] else -difference


class Bin(NamedTuple):
    """Pairs whose preferred response is predicted to be the better one with a probability from `low` to `high`."""

    low: float
    high: float
    predicted: float
    """Mean of sigmoid(score difference)."""
    observed: Estimate
    """Share of pairs where it is the better one. Its n counts prompts."""
    num_pairs: int


class RewardReport(NamedTuple):
    """Figures on ranked responses. A prompt is what is independent."""

    measures: tuple[Measure, ...]
    """pair_accuracy, best_of_k and best_of_k_random, rank and rank_random, label_ties, score_ties."""
    calibration: tuple[Bin, ...]
    calibration_error: float
    """Mean distance of the bins' predicted from observed shares, weighted by pairs (expected calibration error)."""
    num_pairs: int


def reward_accuracy(reward: Model | TextReward, data: str | DataConfig) -> Estimate:
    """Return how often the reward orders two responses as the labeler did.

    Pairs that the labeler tied are left out, equal scores count half. Pairs of one prompt belong together, also where
    a file has them in several rows.
    """
    return pair_accuracy(score_comparisons(reward, data)).estimate()


def score_comparisons(
    reward: Model | TextReward,
    data: str | DataConfig,
    prompt_format: PromptFormat | None = None,
    notes: list[str] | None = None,
) -> list[Ranked]:
    """Return the rewards and ranks of each row of a comparisons file.

    prompt_format: that of a model's run, which replaces the file's template. A function reads prompts as plain text.
    notes: gets a sentence on the rows that a model reads, and on those that are left out.
    """
    cfg = DataConfig(path=data) if isinstance(data, str) else data
    if isinstance(reward, Model):
        rows = read_comparisons(cfg, reward.tokenizer, context=reward.max_positions, prompt_format=prompt_format).train
        if notes is not None:
            notes.append(rows.notes)
        return score_rows(reward, rows)
    examples = read_examples(cfg.path, "comparisons", cfg.columns, cfg.limit, cfg.remove_columns)
    prompts = [prompt_as_text(example.prompt) for example in examples for _ in example.responses]
    responses = [response for example in examples for response in example.responses]
    given = [GivenRow(example.prompt, example.row) for example in examples for _ in example.responses]
    scores = iter(score_texts(reward, prompts, responses, given))
    return [
        Ranked(tuple(next(scores) for _ in example.responses), example.ranks, prompt_as_text(example.prompt))
        for example in examples
    ]


def score_rows(reward: Model, rows: Dataset[Comparisons], limit: int = 0) -> list[Ranked]:
    """Return the rewards and ranks of the first `limit` rows; 0 = all."""
    return [_score_batch(reward, batch) for batch in islice(rows.in_order(1), limit or None)]


def score_texts(
    reward: TextReward, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[GivenRow] = ()
) -> list[float]:
    """Return a reward function's score of each response. UserError unless it gives a finite number for each.

    rows: the row of each response, for a function that is called by the names of its parameters.
    """
    function = FunctionReward(reward, None)
    call = function.call_with_texts(prompts, responses, rows)
    (scores,) = call_all([call], NO_LIMITS, print_note)
    return check_scores(scores, range(len(prompts)), function.name).tolist()


def report(ranked: Sequence[Ranked]) -> RewardReport:
    """Return the figures on scored comparisons."""
    bins = calibration(ranked)
    total = sum(found.num_pairs for found in bins)
    error = sum(found.num_pairs * abs(found.observed.value - found.predicted) for found in bins)
    measures = (pair_accuracy(ranked), *best_of_k(ranked), *ties(ranked))
    return RewardReport(measures, tuple(bins), error / total if total else math.nan, total)


def pair_accuracy(ranked: Sequence[Ranked]) -> Measure:
    """Return the share of pairs that the scores order as the labelers did; equal scores count half."""
    right, pairs = [], []
    for row in ranked:
        differences = list(row.pairs())
        right.append(float(sum(0.5 + 0.5 * np.sign(differences))) if differences else math.nan)
        pairs.append(float(len(differences)))
    return Measure("pair_accuracy", tuple(right), _prompts(ranked), tuple(pairs))


def best_of_k(ranked: Sequence[Ranked]) -> tuple[Measure, ...]:
    """Return the label of the response with the highest score, against a random one of the same K.

    best_of_k is the share of prompts where its label is the best, and rank its mean rank, 1 for the best. Responses
    with equal scores are chosen equally often. Prompts whose responses are all tied have no best one and are left out.
    """
    values: list[tuple[float, ...]] = []
    for row in ranked:
        if len(set(row.ranks)) < 2:
            values.append((math.nan,) * 4)
            continue
        chosen = [rank for rank, score in zip(row.ranks, row.scores, strict=True) if score == max(row.scores)]
        shares = [float(np.mean([rank == min(row.ranks) for rank in ranks])) for ranks in (chosen, row.ranks)]
        values.append((*shares, *(float(np.mean(ranks)) + 1 for ranks in (chosen, row.ranks))))
    best, random, rank, random_rank = zip(*values, strict=True) if values else ((), (), (), ())
    prompts = _prompts(ranked)
    return (
        Measure("best_of_k", best, prompts),
        Measure("best_of_k_random", random, prompts, unit="chance", higher_is_better=None),
        Measure("rank", rank, prompts, unit="rank", higher_is_better=False),
        Measure("rank_random", random_rank, prompts, unit="rank", higher_is_better=None),
    )


def ties(ranked: Sequence[Ranked]) -> tuple[Measure, Measure]:
    """Return the share of all pairs that labelers tied, and of the others the share with equal scores."""
    labels, scores, pairs, labelled = [], [], [], []
    for row in ranked:
        differences = list(row.pairs())
        pairs.append(float(math.comb(len(row.ranks), 2)))
        labelled.append(float(len(differences)))
        labels.append(pairs[-1] - labelled[-1])
        scores.append(float(differences.count(0.0)) if differences else math.nan)
    return (
        Measure("label_ties", tuple(labels), _prompts(ranked), tuple(pairs), higher_is_better=None),
        Measure("score_ties", tuple(scores), _prompts(ranked), tuple(labelled), higher_is_better=False),
    )


def calibration(ranked: Sequence[Ranked], num_bins: int = NUM_BINS) -> list[Bin]:
    """Return, in bins of the predicted probability, how often the preferred response was the better one.

    A pair is read with its higher score first: its prediction, sigmoid of the difference, is in [0.5, 1].
    """
    names = _prompts(ranked)
    found = [(names[i], difference) for i, row in enumerate(ranked) for difference in row.pairs()]
    prompts = np.array([name for name, _ in found], dtype=object)
    differences = np.array([difference for _, difference in found], dtype=np.float64)
    predicted = 1 / (1 + np.exp(-np.abs(differences)))
    right = 0.5 + 0.5 * np.sign(differences)
    edges = np.linspace(0.5, 1.0, num_bins + 1)
    index = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, num_bins - 1)
    bins = []
    for number in range(num_bins):
        rows = index == number
        if rows.any():
            observed = mean(right[rows].tolist(), prompts[rows].tolist(), bounded=True)
            low, high = float(edges[number]), float(edges[number + 1])
            bins.append(Bin(low, high, float(predicted[rows].mean()), observed, int(rows.sum())))
    return bins


def report_lines(found: RewardReport) -> list[str]:
    """Return the report as lines of markdown."""
    estimates = {measure.name: measure.estimate() for measure in found.measures}
    n = estimates["best_of_k"].n

    def cell(name: str, digits: int = 3) -> str:
        return show(estimates[name], digits)

    lines = [
        f"- pair accuracy {cell('pair_accuracy')} ({found.num_pairs} pairs of {n} prompts; ties of the labels"
        f" {cell('label_ties')} left out, ties of the scores {cell('score_ties')} count half)",
        f"- the response it puts first is the best in {cell('best_of_k')}, its mean rank is {cell('rank', 2)} (random"
        f" {estimates['best_of_k_random'].value:.3f}, mean rank {estimates['rank_random'].value:.2f}), n {n}",
        f"- pair accuracy in the InstructGPT paper: {paper_text('reward_model', 'pair_accuracy')}",
    ]
    if found.calibration:
        lines.append(f"- calibration error {found.calibration_error:.3f} (n {found.num_pairs} pairs)")
        lines += ["", "| predicted | mean | observed | pairs | prompts |", "|---|---|---|---|---|"]
        lines += [
            f"| {b.low:.1f} to {b.high:.1f} | {b.predicted:.3f} | {show(b.observed)} | {b.num_pairs} | {b.observed.n} |"
            for b in found.calibration
        ]
    return lines


@torch.no_grad()
def _score_batch(reward: Model, batch: Comparisons) -> Ranked:
    """Return the scores of one prompt's responses."""
    scores = reward.last_scores(batch.tokens, batch.lengths, batch.prompt_lengths).tolist()
    if not all(map(math.isfinite, scores)):
        raise UserError(f"{reward.name}: a score is not finite: {scores}; train the reward model again")
    prompt = batch.tokens[0, : int(batch.prompt_lengths[0])].tolist()
    return Ranked(tuple(scores), tuple(batch.ranks.tolist()), str(prompt))


def _prompts(ranked: Sequence[Ranked]) -> tuple[str, ...]:
    """Return what tells the prompts of the rows apart."""
    return tuple(f"= {row.prompt}" if row.prompt else str(i) for i, row in enumerate(ranked))


def records(found: RewardReport, model: str) -> list[dict[str, Any]]:
    """Return the report's flat records, of task "reward_model"."""
    kept = [result_record(model, "reward_model", measure) for measure in found.measures]
    error = Estimate(found.calibration_error, math.nan, math.nan, found.measures[0].estimate().n)
    last = {"model": model, "task": "reward_model", "measure": "calibration_error", **error.fields(), "unit": "share"}
    return [*kept, {**last, "judge": "", "seconds": 0.0, "higher_is_better": False}]
