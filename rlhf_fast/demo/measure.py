"""What is measured of a model: its responses, preferences between two models, loss; all with 95 % intervals."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_fast.batches import Prompts
from rlhf_fast.config.fields import DataConfig, ModelConfig, SamplingConfig
from rlhf_fast.data import read_comparisons, read_texts
from rlhf_fast.demo.labelers import Labeler, preferences
from rlhf_fast.demo.tasks import Task
from rlhf_fast.demo.world import World
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.training.learner import evaluate
from rlhf_fast.training.losses import pretrain_loss

NEW_TOKENS = 32
MICRO_BATCH = 8192
Z = 1.96  # standard errors on each side of a 95 % interval


class Estimate(NamedTuple):
    """A mean of independent things and half the width of its 95 % interval."""

    value: float
    error: float

    @property
    def low(self) -> float:
        return self.value - self.error

    @property
    def high(self) -> float:
        return self.value + self.error


def estimate(values: Iterable[float]) -> Estimate:
    """Mean of shares in [0, 1] and 1.96 standard errors, or Wilson's bound where all are 0 or all are 1."""
    values = [float(value) for value in values]
    count = len(values)
    if count == 0:
        return Estimate(math.nan, math.nan)
    mean = sum(values) / count
    if mean in (0.0, 1.0):
        return Estimate(mean, Z * Z / (count + Z * Z))
    variance = sum((value - mean) ** 2 for value in values) / max(count - 1, 1)
    return Estimate(mean, Z * math.sqrt(variance / count))


def respond(model: Model, tasks: Sequence[Task], seed: int, samples: Sequence[int] | int = 1) -> list[list[str]]:
    """Responses at temperature 1, each task its number of `samples`; what is cut off at the limit stays cut off."""
    counts = [samples] * len(tasks) if isinstance(samples, int) else list(samples)
    who = [i for i, count in enumerate(counts) for _ in range(count)]
    rows = model.tokenizer([tasks[i].prompt for i in who]).input_ids
    rollout = Rollout(model, SamplingConfig(max_new_tokens=NEW_TOKENS, batch=256), seed)
    responses = rollout.generate(Prompts(list(range(len(rows))), rows, [tasks[i].prompt for i in who]))
    texts = model.tokenizer.batch_decode(responses.response_ids(), skip_special_tokens=True)
    answers: list[list[str]] = [[] for _ in tasks]
    for i, text in zip(who, texts, strict=True):
        answers[i].append(text)
    return answers


def preferred(
    labelers: Sequence[Labeler], tasks: Sequence[Task], ours: Sequence[str], theirs: Sequence[str], world: World
) -> Estimate:
    """How often our response is preferred. A prompt counts once, with the mean of its labelers' votes."""
    pairs = zip(tasks, ours, theirs, strict=True)
    votes = [preferences(labelers, pair, world) for pair in pairs]
    return estimate(sum(vote) / len(vote) for vote in votes)


def text_losses(model: Model, texts: Path) -> Estimate:
    """Nats a token on held-out raw text; ten documents at a time are what is independent."""
    rows = read_texts(DataConfig(path=str(texts)), model.tokenizer, context=model.max_positions).train
    losses, units = [], []
    for batch in rows.in_order(10):
        losses.append(evaluate(model, pretrain_loss, [batch], MICRO_BATCH)["loss/pretrain"])
        units.append(batch.num_items())
    total = sum(units)
    mean = sum(loss * unit for loss, unit in zip(losses, units, strict=True)) / total
    spread = sum(((loss - mean) * unit) ** 2 for loss, unit in zip(losses, units, strict=True))
    return Estimate(mean, Z * math.sqrt(spread) / total)


@torch.no_grad()
def reward_accuracy(reward: Model, ranked: Path) -> Estimate:
    """How often the reward model orders a pair of ranked responses as the labeler did; ties are left out, a prompt
    counts once."""
    rows = read_comparisons(DataConfig(path=str(ranked)), reward.tokenizer, context=reward.max_positions).train
    shares = []
    for batch in rows.in_order(1):
        scores, ranks = reward.last_scores(batch.tokens, batch.lengths), batch.ranks
        better = ranks[:, None] < ranks[None, :]
        right = (scores[:, None] > scores[None, :]) & better
        if better.any():
            shares.append(float(right.sum() / better.sum()))
    return estimate(shares)


def load(path: Path | str, head: str = "lm") -> Model:
    return Model.load(ModelConfig(path=str(path)), head=head)
