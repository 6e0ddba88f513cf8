"""Supervised fine-tuning on demonstrations (InstructGPT C.1), with pretraining text mixed in for PPO's start (C.3)."""

from __future__ import annotations

from functools import partial

import torch

from rlhf_fast.config.stages import SFTConfig
from rlhf_fast.data import Dataset, Split, read_demonstrations, read_texts
from rlhf_fast.errors import UserError, locating_rows
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.folder import Best, RunDir
from rlhf_fast.stages.validation import averages, due, prompts_of, told
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.losses import pretrain_loss, sft_loss
from rlhf_fast.training.rewards import Reward, load_reward

HEADLINE = ("loss/sft", "valid/sft", "valid/scores")


def run(cfg: SFTConfig) -> None:
    """Trains cfg.model on cfg.data and writes the chosen weights, an ordinary causal LM folder, to cfg.out."""
    with RunDir(cfg, cfg.data, cfg.pretrain) as out:
        if out.finished:
            return
        torch.manual_seed(cfg.seed)
        model = Model.load(cfg.model, seed=cfg.seed, device=out.device)
        data, texts, reward = read(cfg, model, out)
        steps = -(-cfg.epochs * len(data.train) // cfg.batch)
        learner, best = Learner(model, cfg.optim, steps, dropout=cfg.residual_dropout), Best(out)
        parts = {"learner": learner, "best": best}
        for step in range(out.begin(steps, HEADLINE, parts) + 1, steps + 1):
            with (
                out.log.phase("learn"),
                locating_rows(Demonstrations=data.train.location, Texts=texts and texts.location),
            ):
                terms = mixture(cfg, data.train, texts, step)
                stats = learner.step(terms)
            if due(step, cfg.log.validate_every, cfg.batch, len(data.train), steps):
                with out.log.phase("validate"):
                    stats |= validate(cfg, model, data.valid, reward, out, step)
                if cfg.select != "last":
                    score = stats["valid/scores"] if cfg.select == "reward" else -stats["valid/sft"]
                    best.offer(step, score, model.save)
            out.log.metrics(step, stats, tokens=sum(int(batch.lengths.sum()) for _, batch, _ in terms))
            out.checkpoint(step, parts)
        out.finish(best.model(steps, model.save), {"step": best.step or steps, "score": best.score})


def read(cfg: SFTConfig, model: Model, out: RunDir) -> tuple[Split, Dataset | None, Reward | None]:
    """Demonstrations, pretraining text if any is mixed in, and the reward model if it selects."""
    data = read_demonstrations(cfg.data, model.tokenizer, cfg.seed, model.max_positions)
    if cfg.select != "last" and not len(data.valid):
        raise UserError(
            f"sft: select={cfg.select} needs validation rows, and there are none; set data.valid to a file or"
            " data.valid_fraction above 0, or choose select=last"
        )
    out.notes.append(data.train.notes)
    texts = reward = None
    if cfg.pretrain_fraction:
        texts = read_texts(cfg.pretrain, model.tokenizer, cfg.seed, model.max_positions).train
        out.notes.append(texts.notes)
    if cfg.select == "reward":
        if not prompts_of(data.valid, model.max_positions, cfg.sampling.max_new_tokens).ids:
            raise UserError(
                f"sft: select=reward: no validation prompt leaves room for sampling.max_new_tokens"
                f" ({cfg.sampling.max_new_tokens}) in the model's {model.max_positions} positions; lower it"
            )
        budget = cfg.optim.micro_batch_tokens
        reward = load_reward(cfg.select_reward, model.tokenizer, micro_batch_tokens=budget, device=out.device)
    return data, texts, reward


def mixture(cfg: SFTConfig, data: Dataset, texts: Dataset | None, step: int) -> list[tuple]:
    """The terms of step 1, 2, ...: its demonstrations, and pretraining texts so that they are cfg.pretrain_fraction of
    its sequences. Every token that carries loss counts alike, whichever of the two it is from."""
    done = (step - 1) * cfg.batch
    demonstrations = data.batch(done, min(cfg.batch, cfg.epochs * len(data) - done))
    if texts is None:
        return [(partial(sft_loss, pack=cfg.packing), demonstrations, 1.0)]
    share = cfg.pretrain_fraction / (1 - cfg.pretrain_fraction) * cfg.batch
    first = round((step - 1) * share)
    mixed = texts.batch(first, max(round(step * share) - first, 0))
    units = demonstrations.units() + mixed.units()
    return [
        (partial(sft_loss, pack=cfg.packing), demonstrations, demonstrations.units() / units),
        (partial(pretrain_loss, pack=cfg.packing), mixed, mixed.units() / units),
    ]


def validate(
    cfg: SFTConfig, model: Model, data: Dataset, reward: Reward | None, out: RunDir, step: int
) -> dict[str, float]:
    """The validation loss, and with a reward model the mean score of responses to the validation prompts: all of them
    if it selects, else those for samples.jsonl. The noise is the same at every validation."""
    if not len(data):
        return {}
    stats = averages(model, data, partial(sft_loss, pack=cfg.packing), cfg.optim.micro_batch_tokens)
    prompts = prompts_of(data, model.max_positions, cfg.sampling.max_new_tokens)
    prompts = prompts if reward else prompts.take(range(min(cfg.log.samples, len(prompts.ids))))
    if not prompts.ids:
        return stats
    columns = {}
    with locating_rows(Responses=data.location):
        responses = Rollout(model, cfg.sampling, cfg.seed).generate(prompts)
        if reward:
            columns["score"] = reward(responses)
    if reward:
        stats |= {
            "valid/scores": float(columns["score"].double().mean()),
            "valid/length": float((responses.lengths - responses.prompt_lengths).double().mean()),
            "valid/eos_rate": float(responses.finished.double().mean()),
        }
    out.log.samples(step, told(responses, prompts.texts, model.tokenizer, **columns))
    return stats
