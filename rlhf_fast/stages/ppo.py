"""PPO against a reward with a KL penalty (InstructGPT C.4), with or without pretraining gradients (PPO-ptx)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_fast.batches import Experience, Prompts, Responses
from rlhf_fast.config.fields import LoraConfig
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.data import Dataset, Split, read_prompts, read_texts
from rlhf_fast.errors import UserError, locating_rows
from rlhf_fast.model.model import Model
from rlhf_fast.model.pretrained import check_tokenizers
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.folder import Best, RunDir
from rlhf_fast.stages.validation import due, prompts_of, told
from rlhf_fast.training.experience import collect, minibatches
from rlhf_fast.training.kl import KLController
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.losses import policy_loss, pretrain_loss, value_loss
from rlhf_fast.training.rewards import Reward, is_function, load_reward

HEADLINE = ("objective/scores", "objective/kl", "tokens/length", "valid/rlhf_reward")


def run(cfg: PPOConfig) -> None:
    """Trains cfg.policy on the prompts of cfg.data. cfg.out gets the chosen weights, an ordinary causal LM folder, and
    beside them `ema/` (the moving average) and `value/` (the value model)."""
    with RunDir(cfg, cfg.data, cfg.pretrain) as out:
        if out.finished:
            return
        torch.manual_seed(cfg.seed)
        roles = load_roles(cfg, out.device)
        prompts, texts = read(cfg, roles.policy, out)
        rollout, state = Rollout(roles.policy, cfg.sampling, cfg.seed), start(cfg, roles, out)
        begun = out.begin(cfg.batches, HEADLINE, state._asdict())
        with locating_rows(**places(prompts.train, texts)):
            for batch in range(begun, cfg.batches):
                asked = prompts.train.batch(batch * cfg.batch, cfg.batch)
                with out.log.phase("generate"):
                    responses = rollout.generate(asked, step=batch)
                with out.log.phase("score"):
                    experience, stats = collect(responses, *roles, cfg, state.kl.coef)
                with out.log.phase("learn"):
                    stats |= improve(state, experience, texts, cfg, batch)
                with out.log.phase("validate"):
                    stats |= validate(rollout, roles, state, prompts, cfg, batch, out)
                state.kl.update(stats["objective/kl"], stats["objective/kl_token"], cfg.batch)
                record(out, batch + 1, responses, experience, asked, roles, stats, cfg)
                out.checkpoint(batch + 1, state._asdict())
        out.finish(partial(write, cfg, state), {"kl_coef": state.kl.coef, "step": state.best.step or cfg.batches})


class Roles(NamedTuple):
    """Who takes part; in the order in which `collect` wants them."""

    policy: Model
    reference: Model
    value: Model
    reward: Reward


class State(NamedTuple):
    """What changes in a run and is saved with it."""

    policy: Learner
    critic: Learner
    kl: KLController
    best: Best


def start(cfg: PPOConfig, roles: Roles, out: RunDir) -> State:
    """Before the first batch."""
    policy = Learner(roles.policy, cfg.optim, cfg.steps, ema=cfg.ema)
    return State(policy, Learner(roles.value, cfg.value_optim, cfg.steps), KLController(cfg.kl), Best(out))


def load_roles(cfg: PPOConfig, device: str | None) -> Roles:
    """The four, refused with a sentence where their tokenizers differ or a scalar head was never trained.

    Only where the reward is a function and no value model is given, the value model is the policy's start with a fresh
    head, a row of N(0, 1 / (D + 1)).
    """
    policy = Model.load(cfg.policy, seed=cfg.seed, device=device)
    plain = replace(cfg.policy, lora=LoraConfig(), gradient_checkpointing=False)
    if cfg.reference or not cfg.policy.lora.rank:
        reference = Model.load(replace(plain, path=cfg.reference or cfg.policy.path), device=device)
        check_tokenizers(policy.tokenizer, reference.tokenizer, reference.name)
    else:
        reference = policy.reference()
    judge = replace(cfg.value, lora=LoraConfig(), gradient_checkpointing=False)
    budget = cfg.optim.micro_batch_tokens
    reward = load_reward(cfg.reward, policy.tokenizer, judge, micro_batch_tokens=budget, device=device)
    fresh = is_function(cfg.reward) and not cfg.value.path
    start = cfg.value.path or (cfg.policy.path if fresh else cfg.reward)
    settings = replace(cfg.value, path=start)
    value = Model.load(settings, head="scalar", fresh_head=fresh, seed=cfg.seed, device=device)
    check_tokenizers(policy.tokenizer, value.tokenizer, value.name)
    return Roles(policy, reference, value, reward)


def read(cfg: PPOConfig, policy: Model, out: RunDir) -> tuple[Split, Dataset | None]:
    """The prompts, and the pretraining text of PPO-ptx if there is any."""
    context = policy.max_positions
    room = max(context - cfg.sampling.max_new_tokens, 1) if context else 0
    prompts = read_prompts(cfg.data, policy.tokenizer, cfg.seed, room)
    if cfg.select == "reward" and not len(prompts.valid):
        raise UserError(
            "ppo: select=reward needs validation prompts, and there are none; set data.valid to a file or"
            " data.valid_fraction above 0"
        )
    texts = read_texts(cfg.pretrain, policy.tokenizer, cfg.seed, context).train if cfg.pretrain.path else None
    out.notes += [prompts.train.notes] + ([texts.notes] if texts else [])
    return prompts, texts


def improve(
    state: State, experience: Experience, texts: Dataset | None, cfg: PPOConfig, batch: int
) -> dict[str, float]:
    """cfg.inner_epochs passes over a batch, a step of both optimizers a minibatch.

    With `texts` the policy's gradient is PPO's plus cfg.ptx_coef times that of cfg.ptx_ratio pretraining texts for each
    response, accumulated into one step.
    """
    loss = partial(
        policy_loss, temperature=cfg.sampling.temperature, clip_low=cfg.clip_low, clip_high=cfg.clip_high,
        dual_clip=cfg.dual_clip, entropy_coef=cfg.entropy_coef,
    )  # fmt: skip
    rows, first = [], {}
    for part in minibatches(experience, cfg, seed=(cfg.seed * 1_000_003 + batch) % 2**63):
        stats = state.critic.step([(partial(value_loss, value_clip=cfg.value_clip), part, cfg.value_coef)])
        stats = {f"value/{name}" if name in ("loss", "grad_norm", "lr") else name: x for name, x in stats.items()}
        if batch >= cfg.critic_warmup:
            terms = [(loss, part, 1.0)]
            if texts is not None:
                taken = state.policy.steps * cfg.ptx_ratio * cfg.minibatch
                terms.append((pretrain_loss, texts.batch(taken, cfg.ptx_ratio * len(part.lengths)), cfg.ptx_coef))
            stats |= state.policy.step(terms)
            first = first or {"val/ratio_first": stats["val/ratio"]}
        rows.append(stats)
        if cfg.target_kl and stats.get("policy/approxkl_avg", 0.0) > cfg.target_kl:
            break
    return averaged(rows) | first | {"steps": len(rows)}


def averaged(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over the steps that have it; of `..._max` and `..._min` the extreme."""
    columns = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            columns[name].append(value)
    pick = {"_max": max, "_min": min}
    return {name: pick.get(name[-4:], lambda x: sum(x) / len(x))(values) for name, values in columns.items()}


def validate(
    rollout: Rollout, roles: Roles, state: State, prompts: Split, cfg: PPOConfig, batch: int, out: RunDir
) -> dict[str, float]:
    """When it is time: reward, score and KL on the held-out prompts, with the same noise each time."""
    rows = len(prompts.train)
    if not len(prompts.valid) or not due(batch + 1, cfg.log.validate_every, cfg.batch, rows, cfg.batches):
        return {}
    with locating_rows(Responses=prompts.valid.location):
        responses = rollout.generate(prompts_of(prompts.valid))
        _, stats = collect(responses, *roles, cfg, state.kl.coef)
    if cfg.select == "reward":
        state.best.offer(batch + 1, stats["objective/rlhf_reward"], roles.policy.save)
    names = ("objective/rlhf_reward", "objective/scores", "objective/kl", "tokens/length", "tokens/eos_rate")
    return {f"valid/{name.partition('/')[2]}": stats[name] for name in names}


def places(prompts: Dataset, texts: Dataset | None) -> dict:
    """How a row that an error blames is found in its file."""

    def prompt(uid: int) -> str:
        return prompts.location(prompts.row_at(uid))

    return {"Responses": prompt, "Experience": prompt, "Texts": texts.location if texts else None}


def record(
    out: RunDir, step: int, responses: Responses, experience: Experience, asked: Prompts, roles: Roles,
    stats: dict[str, float], cfg: PPOConfig,
) -> None:  # fmt: skip
    """One row of metrics, a few of samples."""
    out.log.metrics(step, {"episode": step * cfg.batch} | stats, tokens=int(responses.mask.sum()))
    if step % cfg.log.every == 0:
        few = torch.arange(min(cfg.log.samples, len(responses.lengths)))
        kl = (experience.old_logprobs - experience.ref_logprobs).sum(1)
        columns = {"score": experience.scores, "kl": kl}
        out.log.samples(step, told(responses.take(few), asked.texts[: len(few)], roles.policy.tokenizer, **columns))


def write(cfg: PPOConfig, state: State, folder: Path) -> None:
    """The chosen weights into `folder`, the moving average and the value model below it."""
    model = state.policy.model
    if cfg.ema:
        with state.policy.averaged():
            model.save(folder / "ema")
            if cfg.select == "ema":
                model.save(folder)
    if cfg.select == "ema":
        model.save(folder / "last")
    else:
        state.best.model(cfg.batches, model.save)(folder)
    state.critic.model.save(folder / "value")
