"""A reward model from ranked responses (InstructGPT C.2)."""

from __future__ import annotations

import torch

from rlhf_fast.batches import Comparisons
from rlhf_fast.config.stages import RewardConfig
from rlhf_fast.data import Dataset, read_comparisons, read_demonstrations
from rlhf_fast.errors import UserError, locating_rows
from rlhf_fast.model.model import Model
from rlhf_fast.run.folder import RunDir
from rlhf_fast.stages.validation import averages, due
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.losses import reward_loss

HEADLINE = ("loss/reward", "reward/accuracy", "valid/accuracy")


def run(cfg: RewardConfig) -> None:
    """Trains a scalar head and cfg.model's decoder on cfg.data; writes AutoModelForSequenceClassification to cfg.out.

    The head starts as a row of N(0, 1 / (D + 1)) (Stiennon et al. 2020), the decoder as cfg.model's.
    """
    with RunDir(cfg, cfg.data, cfg.demonstrations) as out:
        if out.finished:
            return
        torch.manual_seed(cfg.seed)
        model = Model.load(cfg.model, head="scalar", fresh_head=True, seed=cfg.seed, device=out.device)
        data = read_comparisons(cfg.data, model.tokenizer, cfg.seed, model.max_positions)
        out.notes.append(data.train.notes)
        demonstrations = read_demonstrated(cfg, model)
        steps = -(-cfg.epochs * len(data.train) // cfg.batch)
        learner = Learner(model, cfg.optim, steps)
        parts = {"learner": learner}
        for step in range(out.begin(steps, HEADLINE, parts) + 1, steps + 1):
            done = (step - 1) * cfg.batch
            batch = data.train.batch(done, min(cfg.batch, cfg.epochs * len(data.train) - done))
            with out.log.phase("learn"), locating_rows(Comparisons=data.train.location):
                stats = learner.step(reward_loss, batch)
            if len(data.valid) and due(step, cfg.log.validate_every, cfg.batch, len(data.train), steps):
                with out.log.phase("validate"):
                    stats |= averages(model, data.valid, reward_loss, cfg.optim.micro_batch_tokens)
                    stats["valid/longer_wins"] = longer_wins(data.valid)
                out.log.samples(step, scored(model, data.valid, cfg.log.samples))
            out.log.metrics(step, stats, tokens=int(batch.lengths.sum()))
            out.checkpoint(step, parts)
        if demonstrations is not None:
            model.score_bias -= mean_score(model, demonstrations)
        out.finish(model.save, {"bias": model.score_bias})


def read_demonstrated(cfg: RewardConfig, model: Model) -> Dataset | None:
    """The demonstrations whose mean score becomes 0."""
    if not cfg.demonstrations.path:
        return None
    found = read_demonstrations(cfg.demonstrations, model.tokenizer, cfg.seed, model.max_positions).train
    if not len(found):
        raise UserError(f"{cfg.demonstrations.path}: holds no demonstration that fits, so no mean score can be taken")
    return found


@torch.no_grad()
def mean_score(model: Model, demonstrations: Dataset) -> float:
    """Of the responses in `demonstrations`, under the model as it is."""
    scores = [model.last_scores(batch.tokens, batch.lengths).double() for batch in demonstrations.in_order(32)]
    return float(torch.cat(scores).mean())


def longer_wins(data: Dataset[Comparisons]) -> float:
    """The accuracy of preferring the longer response: what a reward model must beat to have read anything. Of responses
    of one length, half."""
    right = pairs = 0.0
    for batch in data.in_order(256):
        sizes, offsets = (batch.lengths - batch.prompt_lengths).tolist(), batch.group_offsets.tolist()
        for start, end in zip(offsets, offsets[1:], strict=False):
            for i in range(start, end):
                for j in range(start, end):
                    if batch.ranks[i] < batch.ranks[j]:
                        pairs += 1
                        right += 1.0 if sizes[i] > sizes[j] else 0.5 if sizes[i] == sizes[j] else 0.0
    return right / pairs if pairs else 0.0


@torch.no_grad()
def scored(model: Model, data: Dataset[Comparisons], count: int) -> list[dict]:
    """The first `count` held-out prompts with their responses, ranks and scores, for samples.jsonl."""
    rows = data.rows[:count]
    if not rows:
        return []
    batch = data.join(rows, list(range(len(rows))))
    scores = model.last_scores(batch.tokens, batch.lengths).split(batch.group_offsets.diff().tolist())
    return [
        {
            "prompt": row.text,
            "responses": model.tokenizer.batch_decode(list(row.responses), skip_special_tokens=True),
            "ranks": list(row.ranks),
            "scores": [float(score) for score in own],
        }
        for row, own in zip(rows, scores, strict=True)
    ]
