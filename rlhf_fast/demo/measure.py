"""Measurements of models: sampled responses, win rates and losses, with 95 % intervals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rlhf_fast.config.fields import DataConfig, ModelConfig, SamplingConfig
from rlhf_fast.data import read_texts
from rlhf_fast.demo.labelers import Labeler, votes
from rlhf_fast.demo.tasks import Task
from rlhf_fast.demo.world import World
from rlhf_fast.eval.estimates import Estimate, mean
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.training.learner import evaluate
from rlhf_fast.training.losses import pretrain_loss

NEW_TOKENS = 32
MICRO_BATCH = 8192


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
    return mean(means)


def text_loss(model: Model, texts: Path) -> Estimate:
    """Return the loss on raw text in nats per token. Batches of ten documents are taken as independent."""
    rows = read_texts(DataConfig(path=str(texts)), model.tokenizer, context=model.max_positions).train
    losses, counts = [], []
    for batch in rows.in_order(10):
        losses.append(evaluate(model, pretrain_loss, [batch], MICRO_BATCH)["loss/pretrain"])
        counts.append(batch.num_items())
    sums = (loss * count for loss, count in zip(losses, counts, strict=True))
    return mean(sums, weights=counts)


def load_model(path: Path | str, head: Literal["lm", "scalar"] = "lm") -> Model:
    return Model.load(ModelConfig(path=str(path)), head=head)
