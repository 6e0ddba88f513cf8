"""PPO against a reward with a KL penalty (InstructGPT C.4), with or without pretraining gradients (PPO-ptx).

The KL penalty enters the reward of each token: `make_experience` (training/experience.py) calls `ops.ppo_advantages`
(kernels/ppo_advantages.py) for it. training/kl.py holds its coefficient. The losses add none: `linear_ppo_loss` has a
kl_coef, which stays 0 here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_fast.batches import Experience, Prompts, Responses
from rlhf_fast.config.fields import LoraConfig, ModelConfig
from rlhf_fast.config.rewards import model_specs
from rlhf_fast.config.stages import PPOConfig, StageConfig
from rlhf_fast.data import Dataset, Split, read_prompts, read_texts
from rlhf_fast.errors import UserError, row_locations
from rlhf_fast.eval.in_training import TrainingEvaluation
from rlhf_fast.model.model import Model
from rlhf_fast.model.pretrained import check_tokenizers
from rlhf_fast.model.saved_model import save_with_probe
from rlhf_fast.rollout.exact import make_exact
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.folder import BestModel, RunFolder, Stateful
from rlhf_fast.run.logs import Log
from rlhf_fast.run.prompt_format import bind_prompt_format, bound_prompt_format, check_same_format
from rlhf_fast.stages.fit import check_fit, planned
from rlhf_fast.stages.forecast import forecast_ppo
from rlhf_fast.stages.plan import DryRun
from rlhf_fast.stages.validation import sample_rows, should_validate, validation_prompts
from rlhf_fast.training.experience import make_experience, minibatches
from rlhf_fast.training.gradient_buffers import GradientPool
from rlhf_fast.training.kl import KLController
from rlhf_fast.training.learner import Learner, Term
from rlhf_fast.training.losses import ppo_policy_loss, ppo_value_loss, pretrain_loss
from rlhf_fast.training.reward_calls import CallLimits
from rlhf_fast.training.rewards import Reward, load_reward

PROGRESS_METRICS = ("objective/scores", "objective/kl", "tokens/length", "valid/rlhf_reward")


def run(cfg: PPOConfig, dry_run: DryRun = False, earlier: Sequence[StageConfig] = ()) -> None:
    """Train cfg.policy on the prompts of cfg.data; write the selected weights (cfg.select) to cfg.out.

    cfg.out becomes an ordinary causal LM folder, with the moving average in `ema/` and the value model in `value/`.
    dry_run: print what the run takes, and write nothing; fit: only what of memory and disk. earlier: stages that by
    then will have written models which this one reads; theirs are taken now.
    """
    with RunFolder(cfg, bool(dry_run)) as run_folder:
        if run_folder.finished:
            return
        context = check_fit(cfg, earlier)
        cfg = planned(cfg, earlier) if dry_run else cfg
        torch.manual_seed(cfg.seed)
        stand_ins = bool(dry_run and earlier)
        models = load_models(cfg, run_folder.device, untrained=stand_ins)
        prompt_data, pretrain_data = load_data(cfg, models, run_folder, context, stand_ins)
        rollout = Rollout(models.policy, cfg.sampling, cfg.seed)
        evaluation = TrainingEvaluation(cfg.log, models.policy, bound_prompt_format(run_folder))
        run_folder.notes += evaluation.notes
        state = init_state(cfg, models, run_folder)
        learners = (state.policy_learner, state.value_learner)
        if forecast_ppo(cfg, run_folder, models, learners, prompt_data, pretrain_data, dry_run):
            return
        log = run_folder.start_or_resume(cfg.num_batches, PROGRESS_METRICS, state.parts())
        models.reward.notify = log.message
        with row_locations(**row_locators(prompt_data.train, pretrain_data)):
            for step in range(log.start, cfg.num_batches):
                prompts = prompt_data.train.batch(step * cfg.batch, cfg.batch)
                with log.phase("generate"):
                    responses = rollout.generate(prompts, step=step)
                with log.phase("score"):
                    experience, stats = make_experience(responses, *models, cfg, state.kl.coef, prompts)
                with log.phase("learn"):
                    stats |= ppo_update(state, experience, pretrain_data, cfg, step)
                with log.phase("validate"):
                    stats |= validate(rollout, models, state, prompt_data, cfg, step)
                if evaluation.is_due(step + 1, cfg.num_batches):
                    with log.phase("evaluate"):
                        stats |= evaluation()
                state.kl.update(stats["objective/kl"], stats["objective/kl_token"], episodes=cfg.batch)
                log_step(log, step + 1, stats, prompt_data.train, responses, experience, models.policy, cfg)
                run_folder.checkpoint(step + 1, state.parts())
        summary = {"kl_coef": state.kl.coef, "step": state.best.step or cfg.num_batches}
        run_folder.finish(partial(save_models, cfg, models, state), summary)


class Models(NamedTuple):
    """The four models of PPO, in the order of `make_experience`'s arguments."""

    policy: Model
    reference: Model
    value: Model
    reward: Reward


class State(NamedTuple):
    """The parts of a run that change and are saved in its checkpoints."""

    policy_learner: Learner
    value_learner: Learner
    kl: KLController
    best: BestModel

    def parts(self) -> dict[str, Stateful]:
        """Return the parts under their names in a checkpoint."""
        return {"policy": self.policy_learner, "value": self.value_learner, "kl": self.kl, "best": self.best}


def init_state(cfg: PPOConfig, models: Models, run_folder: RunFolder) -> State:
    """Return the state before the first batch."""
    pool = GradientPool()
    return State(
        policy_learner=Learner(models.policy, cfg.optim, cfg.steps, ema=cfg.ema, pool=pool),
        value_learner=Learner(models.value, cfg.value_optim, cfg.steps, pool=pool),
        kl=KLController(cfg.kl),
        best=BestModel(run_folder),
    )


def load_models(cfg: PPOConfig, device: str | None, untrained: bool = False) -> Models:
    """Load the four models; raise UserError if their tokenizers differ or a scalar head was never trained.

    If no value model is given, the value model starts from the first reward model. If no reward is a model, it starts
    from the policy's initial weights, with a new scalar head drawn with variance 1 / (D + 1). untrained: give one to
    the reward models too, which are only to be measured.
    """
    policy = Model.load(cfg.policy, seed=cfg.seed, device=device)
    if cfg.reference or not cfg.policy.lora.rank:
        reference = Model.load(_frozen_config(cfg.policy, cfg.reference or cfg.policy.path), device=device)
        check_tokenizers(policy.tokenizer, reference.tokenizer, reference.name)
    else:
        reference = policy.reference()
    reward = load_reward(
        cfg.reward,
        policy.tokenizer,
        _frozen_config(cfg.value, cfg.value.path),
        weights=cfg.reward_weights,
        limits=CallLimits(cfg.reward_timeout, cfg.reward_retries),
        micro_batch_tokens=cfg.optim.micro_batch_tokens,
        device=device,
        fresh_head=untrained,
    )
    scorers = model_specs(cfg.reward)
    from_policy = not scorers and not cfg.value.path
    start, fresh_head = cfg.value.path or (scorers[0] if scorers else cfg.policy.path), from_policy or untrained
    value_cfg = replace(cfg.value, path=start)
    value = Model.load(value_cfg, head="scalar", fresh_head=fresh_head, seed=cfg.seed, device=device)
    check_tokenizers(policy.tokenizer, value.tokenizer, value.name)
    if cfg.exact:
        make_exact(policy, reference, value)
    return Models(policy, reference, value, reward)


def _frozen_config(cfg: ModelConfig, path: str) -> ModelConfig:
    """Return the settings of a model at `path` that is not trained."""
    return replace(cfg, path=path, lora=LoraConfig(), gradient_checkpointing=False)


def load_data(
    cfg: PPOConfig, models: Models, run_folder: RunFolder, context: int, stand_ins: bool = False
) -> tuple[Split, Dataset | None]:
    """Return the prompts, and the pretraining text of PPO-ptx if there is any.

    context: of the smallest model. stand_ins: the models are not yet those that learn the format of the prompts.
    """
    policy, reward = models.policy, models.reward
    max_prompt = max(context - cfg.sampling.max_new_tokens, 1) if context else 0
    sources = {"data": cfg.data}
    prompt_format = bind_prompt_format(run_folder, cfg.policy.path, policy.tokenizer, sources, teaches=stand_ins)
    run_folder.notes += [] if stand_ins else check_same_format(prompt_format, cfg)
    prompt_data = read_prompts(cfg.data, policy.tokenizer, cfg.seed, max_prompt, prompt_format, reward.wanted)
    if cfg.select == "reward" and not len(prompt_data.valid):
        raise UserError(
            "ppo: select=reward needs validation prompts, and there are none; set data.valid to a file or"
            " data.valid_fraction above 0"
        )
    run_folder.notes += [prompt_data.train.notes, *reward.notes()]
    if not cfg.pretrain.path:
        return prompt_data, None
    pretrain_data = read_texts(cfg.pretrain, policy.tokenizer, cfg.seed, policy.max_positions).train
    run_folder.notes.append(pretrain_data.notes)
    return prompt_data, pretrain_data


def ppo_update(
    state: State, experience: Experience, pretrain_data: Dataset | None, cfg: PPOConfig, step: int
) -> dict[str, float]:
    """Make cfg.inner_epochs passes over a batch, with a step of both optimizers for each minibatch.

    With `pretrain_data`, the policy's gradient is PPO's plus cfg.ptx_coef times that of cfg.ptx_ratio pretraining texts
    per response, accumulated into one step.
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
    first_ratio: dict[str, float] = {}
    for minibatch in minibatches(experience, cfg, seed=(cfg.seed * 1_000_003 + step) % 2**63):
        stats = _value_update(state.value_learner, minibatch, cfg)
        if step >= cfg.critic_warmup:
            # until the policy's first step the weights are those that sampled
            measure_gap = not rows and cfg.old_logprobs == "rollout"
            terms: list[Term] = [(partial(loss, measure_gap=measure_gap), minibatch, 1.0)]
            if pretrain_data is not None:
                position = state.policy_learner.steps * cfg.ptx_ratio * cfg.minibatch
                text_batch = pretrain_data.batch(position, cfg.ptx_ratio * len(minibatch.lengths))
                terms.append((pretrain_loss, text_batch, cfg.ptx_coef))
            stats |= state.policy_learner.step(terms)
            first_ratio = first_ratio or {"val/ratio_first": stats["val/ratio"]}
        rows.append(stats)
        if cfg.target_kl and stats.get("policy/approxkl_avg", 0.0) > cfg.target_kl:
            break
    return average_stats(rows) | first_ratio | {"steps": len(rows)}


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
    rollout: Rollout, models: Models, state: State, prompt_data: Split, cfg: PPOConfig, step: int
) -> dict[str, float]:
    """Return reward, score and KL on the held-out prompts if step `step` validates, else {}.

    The sampling noise is the same at every validation. With select=reward the best weights so far are kept.
    """
    done = step + 1
    if not len(prompt_data.valid) or not should_validate(
        done, cfg.log.validate_every, cfg.batch, len(prompt_data.train), cfg.num_batches
    ):
        return {}
    with row_locations(Responses=prompt_data.valid.location):
        prompts = validation_prompts(prompt_data.valid)
        responses = rollout.generate(prompts)
        _, stats = make_experience(responses, *models, cfg, state.kl.coef, prompts)
    if cfg.select == "reward":
        state.best.update(done, stats["objective/rlhf_reward"], partial(save_with_probe, models.policy))
    names = ("objective/rlhf_reward", "objective/scores", "objective/kl", "tokens/length", "tokens/eos_rate")
    rewards = {f"valid/{name}": number for name, number in stats.items() if name.startswith("rewards/")}
    return {f"valid/{name.partition('/')[2]}": stats[name] for name in names} | rewards


def row_locators(prompts: Dataset, pretrain_data: Dataset | None) -> dict[str, Callable[[int], str] | None]:
    """For each type of batch, return a function from a row's uid to its file:line, for error messages."""

    def location(uid: int) -> str:
        return prompts.location(prompts.row_at(uid))

    return {"Responses": location, "Experience": location, "Texts": pretrain_data.location if pretrain_data else None}


def log_step(
    log: Log,
    step: int,
    stats: dict[str, float],
    prompt_data: Dataset[Prompts],
    responses: Responses,
    experience: Experience,
    policy: Model,
    cfg: PPOConfig,
) -> None:
    """Write one row of metrics and a few of samples after step 1, 2, ..."""
    log.metrics(step, {"episode": step * cfg.batch, **stats}, tokens=int(responses.mask.sum()))
    if step % cfg.log.every == 0 or step == cfg.num_batches:
        count = min(cfg.log.samples, len(responses.lengths))
        kl = (experience.old_logprobs - experience.ref_logprobs).sum(1)
        shown = responses.take(range(count))
        asked = [prompt_data[prompt_data.row_at((step - 1) * cfg.batch + i)] for i in range(count)]
        log.samples(step, sample_rows(shown, asked, policy.tokenizer, score=experience.scores, kl=kl))


def save_models(cfg: PPOConfig, models: Models, state: State, folder: Path) -> None:
    """Save the selected weights (cfg.select) to `folder`, the moving average and the value model to folders in it."""
    save = partial(save_with_probe, models.policy)
    if cfg.ema:
        with state.policy_learner.averaged():
            save(folder / "ema")
            if cfg.select == "ema":
                save(folder)
    if cfg.select == "ema":
        save(folder / "last")
    else:
        state.best.writer(cfg.num_batches, save)(folder)
    save_with_probe(models.value, folder / "value")
