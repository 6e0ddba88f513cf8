"""PPO against a reward with a KL penalty (InstructGPT C.4), with or without pretraining gradients (PPO-ptx).

The KL penalty enters the reward of each token: `make_experience` (training/experience.py) calls `ops.ppo_advantages`
(kernels/ppo_advantages.py) for it. training/kl.py holds its coefficient. The losses have no KL term.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_fast.batches import Experience, Prompts, Responses
from rlhf_fast.config.fields import LoraConfig, ModelConfig
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.data import Dataset, Split, read_prompts, read_texts
from rlhf_fast.errors import UserError, locating_rows
from rlhf_fast.model.model import Model
from rlhf_fast.model.pretrained import check_tokenizers
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.folder import BestModel, RunFolder
from rlhf_fast.run.logs import Log
from rlhf_fast.stages.validation import sample_rows, should_validate, validation_prompts
from rlhf_fast.training.experience import make_experience, minibatches
from rlhf_fast.training.kl import KLController
from rlhf_fast.training.learner import Learner, Term
from rlhf_fast.training.losses import ppo_policy_loss, ppo_value_loss, pretrain_loss
from rlhf_fast.training.rewards import RewardFunction, is_function, load_reward

PROGRESS_METRICS = ("objective/scores", "objective/kl", "tokens/length", "valid/rlhf_reward")


def run(cfg: PPOConfig) -> None:
    """Train cfg.policy on the prompts of cfg.data; write the chosen weights, an ordinary causal LM folder, to cfg.out.

    Its subfolders `ema/` and `value/` hold the moving average and the value model.
    """
    with RunFolder(cfg, cfg.data, cfg.pretrain) as folder:
        if folder.finished:
            return
        torch.manual_seed(cfg.seed)
        models = load_models(cfg, folder.device)
        data, texts = load_data(cfg, models.policy, folder)
        rollout = Rollout(models.policy, cfg.sampling, cfg.seed)
        state = init_state(cfg, models, folder)
        log = folder.begin(cfg.num_batches, PROGRESS_METRICS, state._asdict())
        with locating_rows(**row_locators(data.train, texts)):
            for step in range(log.start, cfg.num_batches):
                prompts = data.train.batch(step * cfg.batch, cfg.batch)
                with log.phase("generate"):
                    responses = rollout.generate(prompts, step=step)
                with log.phase("score"):
                    experience, stats = make_experience(responses, *models, cfg, state.kl.coef)
                with log.phase("learn"):
                    stats |= ppo_update(state, experience, texts, cfg, step)
                with log.phase("validate"):
                    stats |= validate(rollout, models, state, data, cfg, step)
                state.kl.update(stats["objective/kl"], stats["objective/kl_token"], episodes=cfg.batch)
                log_step(log, step + 1, stats, prompts, responses, experience, models.policy, cfg)
                folder.checkpoint(step + 1, state._asdict())
        summary = {"kl_coef": state.kl.coef, "step": state.best.step or cfg.num_batches}
        folder.finish(partial(save_models, cfg, models, state), summary)


class Models(NamedTuple):
    """The four models of PPO, in the order of `make_experience`'s arguments."""

    policy: Model
    reference: Model
    value: Model
    reward: RewardFunction


class State(NamedTuple):
    """The parts of a run that change and are saved in its checkpoints."""

    policy: Learner
    value: Learner
    kl: KLController
    best: BestModel


def init_state(cfg: PPOConfig, models: Models, folder: RunFolder) -> State:
    """Return the state before the first batch."""
    return State(
        policy=Learner(models.policy, cfg.optim, cfg.steps, ema=cfg.ema),
        value=Learner(models.value, cfg.value_optim, cfg.steps),
        kl=KLController(cfg.kl),
        best=BestModel(folder),
    )


def load_models(cfg: PPOConfig, device: str | None) -> Models:
    """Load the four models; raise UserError if their tokenizers differ or a scalar head was never trained.

    If the reward is a Python function and no value model is given, the value model is the policy's start with a fresh
    head, a row of N(0, 1 / (D + 1)).
    """
    policy = Model.load(cfg.policy, seed=cfg.seed, device=device)
    if cfg.reference or not cfg.policy.lora.rank:
        reference = Model.load(_frozen(cfg.policy, cfg.reference or cfg.policy.path), device=device)
        check_tokenizers(policy.tokenizer, reference.tokenizer, reference.name)
    else:
        reference = policy.reference()
    reward = load_reward(
        cfg.reward,
        policy.tokenizer,
        _frozen(cfg.value, cfg.value.path),
        micro_batch_tokens=cfg.optim.micro_batch_tokens,
        device=device,
    )
    fresh_head = is_function(cfg.reward) and not cfg.value.path
    start = cfg.value.path or (cfg.policy.path if fresh_head else cfg.reward)
    value_cfg = replace(cfg.value, path=start)
    value = Model.load(value_cfg, head="scalar", fresh_head=fresh_head, seed=cfg.seed, device=device)
    check_tokenizers(policy.tokenizer, value.tokenizer, value.name)
    return Models(policy, reference, value, reward)


def _frozen(cfg: ModelConfig, path: str) -> ModelConfig:
    """Return the settings of a model at `path` that is not trained."""
    return replace(cfg, path=path, lora=LoraConfig(), gradient_checkpointing=False)


def load_data(cfg: PPOConfig, policy: Model, folder: RunFolder) -> tuple[Split, Dataset | None]:
    """Return the prompts, and the pretraining text of PPO-ptx if there is any."""
    context = policy.max_positions
    max_prompt = max(context - cfg.sampling.max_new_tokens, 1) if context else 0
    prompts = read_prompts(cfg.data, policy.tokenizer, cfg.seed, max_prompt)
    if cfg.select == "reward" and not len(prompts.valid):
        raise UserError(
            "ppo: select=reward needs validation prompts, and there are none; set data.valid to a file or"
            " data.valid_fraction above 0"
        )
    folder.notes.append(prompts.train.notes)
    if not cfg.pretrain.path:
        return prompts, None
    texts = read_texts(cfg.pretrain, policy.tokenizer, cfg.seed, context).train
    folder.notes.append(texts.notes)
    return prompts, texts


def ppo_update(
    state: State, experience: Experience, texts: Dataset | None, cfg: PPOConfig, step: int
) -> dict[str, float]:
    """Make cfg.inner_epochs passes over a batch, with a step of both optimizers for each minibatch.

    With `texts`, the policy's gradient is PPO's plus cfg.ptx_coef times that of cfg.ptx_ratio pretraining texts per
    response, accumulated into one step.
    """
    loss = partial(
        ppo_policy_loss,
        temperature=cfg.sampling.temperature,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        dual_clip=cfg.dual_clip,
        entropy_coef=cfg.entropy_coef,
    )
    rows: list[dict[str, float]] = []
    first: dict[str, float] = {}
    for minibatch in minibatches(experience, cfg, seed=(cfg.seed * 1_000_003 + step) % 2**63):
        stats = _value_update(state.value, minibatch, cfg)
        if step >= cfg.critic_warmup:
            terms: list[Term] = [(loss, minibatch, 1.0)]
            if texts is not None:
                position = state.policy.steps * cfg.ptx_ratio * cfg.minibatch
                text_batch = texts.batch(position, cfg.ptx_ratio * len(minibatch.lengths))
                terms.append((pretrain_loss, text_batch, cfg.ptx_coef))
            stats |= state.policy.step(terms)
            first = first or {"val/ratio_first": stats["val/ratio"]}
        rows.append(stats)
        if cfg.target_kl and stats.get("policy/approxkl_avg", 0.0) > cfg.target_kl:
            break
    return average_stats(rows) | first | {"steps": len(rows)}


def _value_update(learner: Learner, minibatch: Experience, cfg: PPOConfig) -> dict[str, float]:
    """Take one step of the value model; its loss, grad_norm and lr are renamed value/..."""
    stats = learner.step([(partial(ppo_value_loss, value_clip=cfg.value_clip), minibatch, cfg.value_coef)])
    return {f"value/{name}" if name in ("loss", "grad_norm", "lr") else name: x for name, x in stats.items()}


def average_stats(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the rows that have it, or for `..._max` and `..._min` the extreme."""
    columns = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            columns[name].append(value)
    combine: dict[str, Callable[[list[float]], float]] = {"_max": max, "_min": min}
    return {name: combine.get(name[-4:], _mean)(values) for name, values in columns.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def validate(
    rollout: Rollout, models: Models, state: State, data: Split, cfg: PPOConfig, step: int
) -> dict[str, float]:
    """Return reward, score and KL on the held-out prompts if step `step` validates, else {}.

    The sampling noise is the same at every validation. With select=reward the best weights so far are kept.
    """
    done = step + 1
    if not len(data.valid) or not should_validate(
        done, cfg.log.validate_every, cfg.batch, len(data.train), cfg.num_batches
    ):
        return {}
    with locating_rows(Responses=data.valid.location):
        responses = rollout.generate(validation_prompts(data.valid))
        _, stats = make_experience(responses, *models, cfg, state.kl.coef)
    if cfg.select == "reward":
        state.best.update(done, stats["objective/rlhf_reward"], models.policy.save)
    names = ("objective/rlhf_reward", "objective/scores", "objective/kl", "tokens/length", "tokens/eos_rate")
    return {f"valid/{name.partition('/')[2]}": stats[name] for name in names}


def row_locators(prompts: Dataset, texts: Dataset | None) -> dict[str, Callable[[int], str] | None]:
    """Return functions from the uid of a row that an error names to its file:line, by type of batch."""

    def location(uid: int) -> str:
        return prompts.location(prompts.row_at(uid))

    return {"Responses": location, "Experience": location, "Texts": texts.location if texts else None}


def log_step(
    log: Log,
    step: int,
    stats: dict[str, float],
    prompts: Prompts,
    responses: Responses,
    experience: Experience,
    policy: Model,
    cfg: PPOConfig,
) -> None:
    """Write one row of metrics and a few of samples after step 1, 2, ..."""
    log.metrics(step, {"episode": step * cfg.batch, **stats}, tokens=int(responses.mask.sum()))
    if step % cfg.log.every == 0:
        count = min(cfg.log.samples, len(responses.lengths))
        kl = (experience.old_logprobs - experience.ref_logprobs).sum(1)
        shown = responses.take(range(count))
        rows = sample_rows(shown, prompts.texts[:count], policy.tokenizer, score=experience.scores, kl=kl)
        log.samples(step, rows)


def save_models(cfg: PPOConfig, models: Models, state: State, folder: Path) -> None:
    """Save the chosen weights to `folder`, and the moving average and the value model to folders in it."""
    policy = models.policy
    if cfg.ema:
        with state.policy.averaged():
            policy.save(folder / "ema")
            if cfg.select == "ema":
                policy.save(folder)
    if cfg.select == "ema":
        policy.save(folder / "last")
    else:
        state.best.writer(cfg.num_batches, policy.save)(folder)
    models.value.save(folder / "value")
