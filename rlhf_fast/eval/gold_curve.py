"""The held-out curve of a reward model: what a second reward (gold) says while the first (proxy) is maximized.

Where the proxy still rises and the gold one falls, it is over-optimized (arXiv 2210.10760).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_fast.data.fields import InvalidRow
from rlhf_fast.data.json_lines import parse_object, read_lines
from rlhf_fast.errors import UserError
from rlhf_fast.eval.cells import show
from rlhf_fast.eval.estimates import Array, Estimate, mean, unpaired_difference
from rlhf_fast.eval.reward_report import TextReward, score_texts
from rlhf_fast.run.logs import SAMPLES

CURVE = "gold_curve"
"""The task of a curve's records."""
NUM_POINTS, MIN_SAMPLES = 10, 16
"""Points of a curve at the most, and samples of a point at the least."""


class CurvePoint(NamedTuple):
    """Mean rewards of the responses at some steps of a run, or of the best of n."""

    at: int
    """Last of the steps, or n."""
    proxy: Estimate
    gold: Estimate
    kl: float = math.nan
    """Distance to the sampled model in nats a response: log n - (n - 1) / n for the best of n. NaN = unknown."""


class Sample(NamedTuple):
    """A row of a PPO run's samples.jsonl."""

    step: int
    prompt: str
    response: str
    score: float
    kl: float = math.nan


def read_samples(run: str | Path) -> list[Sample]:
    """Return the rows of a PPO run's samples.jsonl. `run`: its folder, or the file."""
    path = Path(run) / SAMPLES if Path(run).is_dir() else Path(run)
    samples = []
    for number, line in read_lines(path):
        try:
            row = parse_object(line)
        except InvalidRow as error:
            raise UserError(f"{path}:{number}: {error}") from error
        try:
            kl = math.nan if row.get("kl") is None else float(row["kl"])
            step, score = int(row["step"]), float(row["score"])
            samples.append(Sample(step, str(row["prompt"]), str(row["response"]), score, kl))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}:{number}: has no step, prompt, response and score; give the samples.jsonl of a PPO run"
            ) from error
    return samples


def run_curve(run: str | Path, gold: TextReward, num_points: int = NUM_POINTS) -> list[CurvePoint]:
    """Return the curve of a PPO run's logged samples. gold: a reward function of texts, which the run has not seen.

    With few samples it has fewer points, but two.
    """
    samples = read_samples(run)
    num_points = max(min(num_points, len(samples) // MIN_SAMPLES), 2)
    prompts, responses = [sample.prompt for sample in samples], [sample.response for sample in samples]
    return step_curve(samples, score_texts(gold, prompts, responses), num_points)


def step_curve(samples: Sequence[Sample], gold: Sequence[float], num_points: int = NUM_POINTS) -> list[CurvePoint]:
    """Return at most `num_points` points in the order of the steps, each over as many consecutive steps.

    gold: the second reward of each sample. Samples of one prompt belong together. A point stands at its last step.
    """
    if len(gold) != len(samples):
        raise ValueError(f"{len(gold)} rewards for {len(samples)} samples")
    steps = sorted({sample.step for sample in samples})
    points = []
    for chosen in np.array_split(np.array(steps, dtype=np.int64), min(num_points, len(steps)) or 1):
        part = {int(step) for step in chosen}
        rows = [(sample, reward) for sample, reward in zip(samples, gold, strict=True) if sample.step in part]
        if not rows:
            continue
        prompts = [sample.prompt for sample, _ in rows]
        kl = mean([sample.kl for sample, _ in rows], bounded=False).value
        proxy = mean([sample.score for sample, _ in rows], prompts, bounded=False)
        points.append(CurvePoint(max(part), proxy, mean([reward for _, reward in rows], prompts, bounded=False), kl))
    return points


def best_of_n_curve(
    proxy: Sequence[Sequence[float]], gold: Sequence[Sequence[float]], sizes: Iterable[int] = ()
) -> list[CurvePoint]:
    """Return the rewards of the best of n by the proxy, in expectation over the draws of n from a prompt's responses.

    proxy, gold: both rewards of each prompt's responses. sizes: values of n; () = 1, 2, 4, ... up to the smallest
    number of responses. The estimator is that of arXiv 2112.09332, appendix I; of equal proxies each is chosen equally
    often.
    """
    if [len(row) for row in proxy] != [len(row) for row in gold]:
        raise ValueError("proxy and gold have different numbers of responses")
    smallest = min((len(row) for row in proxy), default=0)
    chosen = list(sizes) or [2**i for i in range(smallest.bit_length()) if 2**i <= smallest]
    points = []
    for n in chosen:
        if not 1 <= n <= smallest:
            raise UserError(f"best of {n}: a prompt has {smallest} responses; ask for at most that many")
        weights = [_best_of_n_weights(row, n) for row in proxy]
        ours, theirs = (
            mean((float(w @ np.asarray(row)) for w, row in zip(weights, rows, strict=True)), bounded=False)
            for rows in (proxy, gold)
        )
        points.append(CurvePoint(n, ours, theirs, math.log(n) - (n - 1) / n))
    return points


def curve_lines(points: Sequence[CurvePoint], name: str = "step") -> list[str]:
    """Return the curve as a markdown table. name: of the first column, step or n."""
    header = [f"| {name} | KL, nats | proxy | gold | prompts |", "|---|---|---|---|---|"]
    kls = ["–" if math.isnan(point.kl) else f"{point.kl:.2f}" for point in points]
    return header + [
        f"| {point.at} | {kl} | {show(point.proxy)} | {show(point.gold)} | {point.gold.n} |"
        for point, kl in zip(points, kls, strict=True)
    ]


def change_line(points: Sequence[CurvePoint]) -> str:
    """Return a sentence on how both rewards change from the first point to the last; "" for fewer than two points."""
    if len(points) < 2:
        return ""
    first, last = points[0], points[-1]
    proxy, gold = unpaired_difference(last.proxy, first.proxy), unpaired_difference(last.gold, first.gold)
    verdict = "neither direction is decided by so few samples"
    if proxy.low > 0:
        verdict = "the gold one's direction is not decided by so few samples"
        if gold.excludes(0):
            verdict = "both rise" if gold.low > 0 else "the policy exploits the proxy"
    elif gold.excludes(0):
        verdict = "the proxy's rise is not decided by so few samples"
    changes = f"the proxy changes by {show(proxy, sign=True)} and the gold one by {show(gold, sign=True)}"
    return f"From the first steps to the last {changes}: {verdict}."


def records(points: Sequence[CurvePoint], model: str, gold: str) -> list[dict[str, Any]]:
    """Return two flat records a point, of task "gold_curve": its proxy and its gold reward, with `step` and `kl`.

    gold: the name of the second reward.
    """
    found = []
    for point in points:
        for measure, estimate, judge in (("proxy", point.proxy, ""), ("gold", point.gold, gold)):
            named = {"model": model, "task": CURVE, "measure": measure, **estimate.fields(), "unit": "score"}
            place = {"step": point.at, "kl": None if math.isnan(point.kl) else point.kl}
            found.append({**named, "judge": judge, "seconds": 0.0, **place})
    return found


def _best_of_n_weights(scores: Sequence[float], n: int) -> Array:
    """Return the probability that each response is the best of n drawn without replacement."""
    values = np.asarray(scores, dtype=np.float64)
    count = len(values)
    order = np.argsort(values, kind="stable")
    weights = np.empty(count)
    weights[order] = [math.comb(rank, n - 1) / math.comb(count, n) for rank in range(count)]
    for value in np.unique(values):
        tied = values == value
        weights[tied] = weights[tied].mean()
    return weights
