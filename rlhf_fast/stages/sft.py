"""Supervised fine-tuning on demonstrations (InstructGPT C.1), with pretraining text mixed in for PPO's start (C.3)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from rlhf_fast.config.stages import SFTConfig, StageConfig
from rlhf_fast.data import Dataset, Split, read_demonstrations, read_texts
from rlhf_fast.errors import UserError, row_locations
from rlhf_fast.eval.in_training import TrainingEvaluation
from rlhf_fast.model.model import Model
from rlhf_fast.model.saved_model import save_with_probe
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.folder import BestModel, RunFolder, Stateful
from rlhf_fast.run.logs import Log
from rlhf_fast.run.prompt_format import bind_prompt_format, bound_prompt_format, check_same_format
from rlhf_fast.stages.fit import check_fit, planned
from rlhf_fast.stages.forecast import forecast_sft
from rlhf_fast.stages.plan import DryRun
from rlhf_fast.stages.validation import sample_rows, should_validate, validation_metrics, validation_prompts
from rlhf_fast.training.learner import Learner, Term
from rlhf_fast.training.losses import pretrain_loss, sft_loss
from rlhf_fast.training.rewards import Reward, load_reward

PROGRESS_METRICS = ("loss/sft", "valid/sft", "valid/scores")


def run(cfg: SFTConfig, dry_run: DryRun = False, earlier: Sequence[StageConfig] = ()) -> None:
    """Train cfg.model on cfg.data; write the selected weights (cfg.select) to cfg.out, an ordinary causal LM folder.

    dry_run: print what the run takes, and write nothing; fit: only what of memory and disk. earlier: stages that by
    then will have written models which this one reads; theirs are taken now.
    """
    with RunFolder(cfg, bool(dry_run)) as run_folder:
        if run_folder.finished:
            return
        context = check_fit(cfg, earlier)
        cfg = planned(cfg, earlier) if dry_run else cfg
        torch.manual_seed(cfg.seed)
        model = Model.load(cfg.model, seed=cfg.seed, device=run_folder.device)
        data, pretrain_data, reward = load_data(cfg, model, run_folder, context)
        steps = -(-cfg.epochs * len(data.train) // cfg.batch)
        learner = Learner(model, cfg.optim, steps, dropout=cfg.residual_dropout)
        evaluation = TrainingEvaluation(cfg.log, model, bound_prompt_format(run_folder))
        run_folder.notes += evaluation.notes
        if forecast_sft(cfg, run_folder, learner, data, pretrain_data, dry_run):
            return
        best, save = BestModel(run_folder), partial(save_with_probe, model)
        state: dict[str, Stateful] = {"learner": learner, "best": best}
        text_location = pretrain_data.location if pretrain_data else None
        row_locators = {"Demonstrations": data.train.location, "Texts": text_location}
        log = run_folder.start_or_resume(steps, PROGRESS_METRICS, state)
        for step in range(log.start + 1, steps + 1):
            with log.phase("learn"), row_locations(**row_locators):
                terms = step_terms(cfg, data.train, pretrain_data, step)
                stats = learner.step(terms)
            if should_validate(step, cfg.log.validate_every, cfg.batch, len(data.train), steps):
                with log.phase("validate"):
                    stats |= validate(cfg, model, data.valid, reward, log, step, context)
                if cfg.select != "last":
                    score = stats["valid/scores"] if cfg.select == "reward" else -stats["valid/sft"]
                    best.update(step, score, save)
            if evaluation.is_due(step, steps):
                with log.phase("evaluate"):
                    stats |= evaluation()
            log.metrics(step, stats, tokens=sum(int(batch.lengths.sum()) for _, batch, _ in terms))
            run_folder.checkpoint(step, state)
        run_folder.finish(best.writer(steps, save), {"step": best.step or steps, "score": best.score})


def load_data(
    cfg: SFTConfig, model: Model, run_folder: RunFolder, context: int
) -> tuple[Split, Dataset | None, Reward | None]:
    """Return the demonstrations, the pretraining text if any is mixed in, and the reward model if it selects.

    context: positions of the smaller model.
    """
    prompt_format = bind_prompt_format(run_folder, cfg.model.path, model.tokenizer, {"data": cfg.data}, teaches=True)
    reward = None
    if cfg.select == "reward":
        budget = cfg.optim.micro_batch_tokens
        reward = load_reward(cfg.select_reward, model.tokenizer, micro_batch_tokens=budget, device=run_folder.device)
    wanted = reward.wanted if reward else ()
    data = read_demonstrations(cfg.data, model.tokenizer, cfg.seed, model.max_positions, prompt_format, wanted)
    if cfg.select != "last" and not len(data.valid):
        raise UserError(
            f"sft: select={cfg.select} needs validation rows, and there are none; set data.valid to a file or"
            " data.valid_fraction above 0, or choose select=last"
        )
    run_folder.notes.append(data.train.notes)
    pretrain_data = None
    if cfg.pretrain_fraction:
        pretrain_data = read_texts(cfg.pretrain, model.tokenizer, cfg.seed, model.max_positions).train
        run_folder.notes.append(pretrain_data.notes)
    if reward is not None:
        if not validation_prompts(data.valid, context, cfg.sampling.max_new_tokens).uids:
            raise UserError(
                f"sft: select=reward: no validation prompt leaves room for sampling.max_new_tokens"
                f" ({cfg.sampling.max_new_tokens}) in {context} positions; lower it"
            )
        run_folder.notes += [*check_same_format(prompt_format, cfg), *reward.notes()]
    return data, pretrain_data, reward


def step_terms(cfg: SFTConfig, data: Dataset, pretrain_data: Dataset | None, step: int) -> list[Term]:
    """Return the loss terms of step 1, 2, ...: its demonstrations, and pretraining texts if they are mixed in.

    Texts are cfg.pretrain_fraction of all sequences. Every token with loss weighs the same in either of the two terms.
    """
    done = (step - 1) * cfg.batch
    demonstrations = data.batch(done, min(cfg.batch, cfg.epochs * len(data) - done))
    if pretrain_data is None:
        return [(partial(sft_loss, pack=cfg.packing), demonstrations, 1.0)]
    texts_per_step = cfg.pretrain_fraction / (1 - cfg.pretrain_fraction) * cfg.batch
    first = round((step - 1) * texts_per_step)
    text_batch = pretrain_data.batch(first, max(round(step * texts_per_step) - first, 0))
    num_items = demonstrations.num_items() + text_batch.num_items()
    return [
        (partial(sft_loss, pack=cfg.packing), demonstrations, demonstrations.num_items() / num_items),
        (partial(pretrain_loss, pack=cfg.packing), text_batch, text_batch.num_items() / num_items),
    ]


def validate(
    cfg: SFTConfig, model: Model, data: Dataset, reward: Reward | None, log: Log, step: int, context: int
) -> dict[str, float]:
    """Return the validation loss, and with a reward model the mean score of responses to the validation prompts.

    A reward model scores responses to all validation prompts; without one, only the prompts for samples.jsonl are
    answered. The sampling noise is the same at every validation.
    """
    if not len(data):
        return {}
    stats = validation_metrics(model, data, partial(sft_loss, pack=cfg.packing), cfg.optim.micro_batch_tokens)
    prompts = validation_prompts(data, context, cfg.sampling.max_new_tokens)
    if not reward:
        prompts = prompts.take(range(min(cfg.log.samples, len(prompts.uids))))
    if not prompts.uids:
        return stats
    columns = {}
    with row_locations(Responses=data.location):
        responses = Rollout(model, cfg.sampling, cfg.seed).generate(prompts)
        if reward:
            columns["score"], rewards, _ = reward.score(responses, prompts)
    if reward:
        stats |= {
            "valid/scores": float(columns["score"].double().mean()),
            "valid/length": float((responses.lengths - responses.prompt_lengths).double().mean()),
            "valid/eos_rate": float(responses.finished.double().mean()),
            **{f"valid/{name}": number for name, number in rewards.items()},
        }
    log.samples(step, sample_rows(responses, [data[uid] for uid in prompts.uids], model.tokenizer, **columns))
    return stats
