"""Measurements of models: sampled responses, win rates, losses and accuracies, with 95 % intervals."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from rlhf_fast.config.fields import DataConfig, ModelConfig, SamplingConfig
from rlhf_fast.data import read_comparisons, read_texts
from rlhf_fast.demo.labelers import Labeler, votes
from rlhf_fast.demo.tasks import Task
from rlhf_fast.demo.world import World
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.training.learner import evaluate
from rlhf_fast.training.losses import pretrain_loss

NEW_TOKENS = 32
MICRO_BATCH = 8192
Z = 1.96  # half the width of a 95 % interval in standard errors


class Estimate(NamedTuple):
    """A mean of independent values and half the width of its 95 % interval."""

    value: float
    error: float

    @property
    def low(self) -> float:
        return self.value - self.error

    @property
    def high(self) -> float:
        return self.value + self.error


def estimate(values: Iterable[float]) -> Estimate:
    """Return the mean of values in [0, 1] and 1.96 standard errors; Wilson's bound if all are 0 or all are 1."""
    values = [float(value) for value in values]
    count = len(values)
    if count == 0:
        return Estimate(math.nan, math.nan)
    mean = sum(values) / count
    if mean in (0.0, 1.0):
        return Estimate(mean, Z * Z / (count + Z * Z))
    variance = sum((value - mean) ** 2 for value in values) / max(count - 1, 1)
    return Estimate(mean, Z * math.sqrt(variance / count))


def sample_responses(
    model: Model, tasks: Sequence[Task], seed: int, samples: Sequence[int] | int = 1
) -> list[list[str]]:
    """Return each task's number of `samples` at temperature 1. Responses stop at NEW_TOKENS, even if unfinished."""
    counts = [samples] * len(tasks) if isinstance(samples, int) else list(samples)
    task_of_row = [i for i, count in enumerate(counts) for _ in range(count)]
    prompts = [tasks[i].prompt for i in task_of_row]
    rollout = Rollout(model, SamplingConfig(max_new_tokens=NEW_TOKENS, batch=256), seed)
    texts = rollout.generate(prompts).texts(model.tokenizer)
    answers: list[list[str]] = [[] for _ in tasks]
    for i, text in zip(task_of_row, texts, strict=True):
        answers[i].append(text)
    return answers


def win_rate(
    labelers: Sequence[Labeler], tasks: Sequence[Task], ours: Sequence[str], theirs: Sequence[str], world: World
) -> Estimate:
    """Return how often our response is preferred. A prompt is one value: the mean of its labelers' votes."""
    means = []
    for pair in zip(tasks, ours, theirs, strict=True):
        found = votes(labelers, pair, world)
        means.append(sum(found) / len(found))
    return estimate(means)


def text_loss(model: Model, texts: Path) -> Estimate:
    """Return the loss on raw text in nats per token. Batches of ten documents are taken as independent."""
    rows = read_texts(DataConfig(path=str(texts)), model.tokenizer, context=model.max_positions).train
    losses, counts = [], []
    for batch in rows.in_order(10):
        losses.append(evaluate(model, pretrain_loss, [batch], MICRO_BATCH)["loss/pretrain"])
        counts.append(batch.num_items())
    total = sum(counts)
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / total
    spread = sum(((loss - mean) * count) ** 2 for loss, count in zip(losses, counts, strict=True))
    return Estimate(mean, Z * math.sqrt(spread) / total)


@torch.no_grad()
def reward_accuracy(reward: Model, ranked: Path) -> Estimate:
    """Return how often the reward model orders two responses as the labeler did, ties aside; a prompt is one value."""
    rows = read_comparisons(DataConfig(path=str(ranked)), reward.tokenizer, context=reward.max_positions).train
    shares = []
    for batch in rows.in_order(1):
        scores, ranks = reward.last_scores(batch.tokens, batch.lengths, batch.prompt_lengths), batch.ranks
        better = ranks[:, None] < ranks[None, :]
        right = (scores[:, None] > scores[None, :]) & better
        if better.any():
            shares.append(float(right.sum() / better.sum()))
    return estimate(shares)


def load_model(path: Path | str, head: Literal["lm", "scalar"] = "lm") -> Model:
    return Model.load(ModelConfig(path=str(path)), head=head)
