"""A reward model from ranked responses (InstructGPT C.2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise, permutations
from typing import Any

import torch

from rlhf_fast.batches import Comparisons
from rlhf_fast.config.stages import RewardConfig, StageConfig
from rlhf_fast.data import Dataset, read_comparisons, read_demonstrations
from rlhf_fast.data.encode import PromptFormat
from rlhf_fast.errors import UserError, row_locations
from rlhf_fast.eval.reward_report import pair_accuracy, score_rows
from rlhf_fast.model.model import Model
from rlhf_fast.model.saved_model import save_with_probe
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.prompt_format import bind_prompt_format
from rlhf_fast.stages.fit import check_fit, planned
from rlhf_fast.stages.forecast import forecast_reward
from rlhf_fast.stages.plan import DryRun
from rlhf_fast.stages.validation import prompt_columns, should_validate, validation_metrics
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.losses import reward_loss

CHANCE_ROWS = 1000
"""Held-out prompts that show at the end whether the reward model beats chance."""
PROGRESS_METRICS = ("loss/reward", "reward/accuracy", "valid/accuracy")


def run(cfg: RewardConfig, dry_run: DryRun = False, earlier: Sequence[StageConfig] = ()) -> None:
    """Train cfg.model with a scalar head on cfg.data; write AutoModelForSequenceClassification to cfg.out.

    The head starts as a row of N(0, 1 / (D + 1)) (Stiennon et al. 2020), the decoder as cfg.model's.
    dry_run: print what the run takes, and write nothing; fit: only what of memory and disk. earlier: stages that by
    then will have written models which this one reads; theirs are taken now.
    """
    with RunFolder(cfg, bool(dry_run)) as run_folder:
        if run_folder.finished:
            return
        check_fit(cfg, earlier)
        cfg = planned(cfg, earlier) if dry_run else cfg
        torch.manual_seed(cfg.seed)
        model = Model.load(cfg.model, head="scalar", fresh_head=True, seed=cfg.seed, device=run_folder.device)
        sources = {"data": cfg.data, "demonstrations": cfg.demonstrations}
        is_stand_in = bool(dry_run and earlier)  # the model that learns the format is not there yet
        prompt_format = bind_prompt_format(run_folder, cfg.model.path, model.tokenizer, sources, teaches=is_stand_in)
        data = read_comparisons(cfg.data, model.tokenizer, cfg.seed, model.max_positions, prompt_format)
        run_folder.notes.append(data.train.notes)
        demonstrations = load_demonstrations(cfg, model, prompt_format)
        steps = -(-cfg.epochs * len(data.train) // cfg.batch)
        learner = Learner(model, cfg.optim, steps)
        if forecast_reward(cfg, run_folder, learner, data, dry_run):
            return
        state = {"learner": learner}
        log = run_folder.start_or_resume(steps, PROGRESS_METRICS, state)
        for step in range(log.start + 1, steps + 1):
            done = (step - 1) * cfg.batch
            batch = data.train.batch(done, min(cfg.batch, cfg.epochs * len(data.train) - done))
            with log.phase("learn"), row_locations(Comparisons=data.train.location):
                stats = learner.step([(reward_loss, batch, 1.0)])
            if len(data.valid) and should_validate(step, cfg.log.validate_every, cfg.batch, len(data.train), steps):
                with log.phase("validate"):
                    stats |= validation_metrics(model, data.valid, reward_loss, cfg.optim.micro_batch_tokens)
                    stats["valid/longer_wins"] = longer_wins(data.valid)
                log.samples(step, scored_rows(model, data.valid, cfg.log.samples))
            log.metrics(step, stats, tokens=int(batch.lengths.sum()))
            run_folder.checkpoint(step, state)
        if note := chance_note(model, data.valid):
            log.message(note, style="yellow")
        if demonstrations is not None:
            model.score_bias -= mean_score(model, demonstrations)
        run_folder.finish(partial(save_with_probe, model), {"bias": model.score_bias})


def load_demonstrations(cfg: RewardConfig, model: Model, prompt_format: PromptFormat) -> Dataset | None:
    """Return the demonstrations whose mean score the bias puts at 0, or None if cfg names none."""
    if not cfg.demonstrations.path:
        return None
    context = model.max_positions
    demonstrations = read_demonstrations(cfg.demonstrations, model.tokenizer, cfg.seed, context, prompt_format).train
    if not len(demonstrations):
        raise UserError(f"{cfg.demonstrations.path}: holds no demonstration that fits, so no mean score can be taken")
    return demonstrations


def chance_note(model: Model, data: Dataset[Comparisons]) -> str:
    """Return a sentence if the held-out pairs do not show that the reward model beats chance; else ""."""
    found = pair_accuracy(score_rows(model, data, CHANCE_ROWS)).estimate()
    if not found.n or not found.low <= 0.5:
        return ""
    return (
        "the held-out pairs do not show that the reward model is better than a coin: it orders"
        f" {found.value:.1%} of them as the labelers did, 95 % interval {found.low:.1%} to {found.high:.1%} on"
        f" {found.n} prompts, and a coin 50 %; give more comparisons,"
        " another optim.lr or more epochs, or hold out more rows to see (data.valid_fraction)"
    )


@torch.no_grad()
def mean_score(model: Model, demonstrations: Dataset) -> float:
    """Return the mean score of the demonstrated responses under the model as it is."""
    scores = [model.last_scores(batch.tokens, batch.lengths).double() for batch in demonstrations.in_order(32)]
    return float(torch.cat(scores).mean())


def longer_wins(data: Dataset[Comparisons]) -> float:
    """Return the accuracy of always preferring the longer response, which a reward model should beat.

    A pair of equal length counts as half right.
    """
    right = pairs = 0.0
    for batch in data.in_order(256):
        sizes = (batch.lengths - batch.prompt_lengths).tolist()
        offsets = batch.group_offsets.tolist()
        for start, end in pairwise(offsets):
            for better, worse in permutations(range(start, end), 2):
                if batch.ranks[better] >= batch.ranks[worse]:
                    continue
                pairs += 1
                if sizes[better] == sizes[worse]:
                    right += 0.5
                else:
                    right += sizes[better] > sizes[worse]
    return right / pairs if pairs else 0.0


@torch.no_grad()
def scored_rows(model: Model, data: Dataset[Comparisons], count: int) -> list[dict[str, Any]]:
    """Return rows for samples.jsonl: the first `count` held-out prompts with their responses, ranks and scores."""
    rows = data.rows[:count]
    if not rows:
        return []
    batch = data.join(rows, list(range(len(rows))))
    scores = model.last_scores(batch.tokens, batch.lengths, batch.prompt_lengths).split(
        batch.group_offsets.diff().tolist()
    )
    return [
        {
            **prompt_columns(row),
            "responses": model.tokenizer.batch_decode(list(row.responses), skip_special_tokens=True),
            "ranks": list(row.ranks),
            "scores": [float(score) for score in group_scores],
        }
        for row, group_scores in zip(rows, scores, strict=True)
    ]
