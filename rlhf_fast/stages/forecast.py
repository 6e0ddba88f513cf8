"""Work out before the first step of each stage what it will do and take. stages/plan.py prints it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from rlhf_fast.config.stages import PPOConfig, RewardConfig, SFTConfig, StageConfig
from rlhf_fast.data import Dataset, Split
from rlhf_fast.data.datasets import Row
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.kv_cache import page_size_for
from rlhf_fast.run.estimate import ModelSize, Work, count, duration
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.stages import timing
from rlhf_fast.stages.plan import DryRun, Plan, tell
from rlhf_fast.training.learner import Learner, Loss
from rlhf_fast.training.losses import reward_loss, sft_loss
from rlhf_fast.training.rewards import Reward


def forecast_sft(
    cfg: SFTConfig, run_folder: RunFolder, learner: Learner, data: Split, pretrain: Dataset | None, dry_run: DryRun
) -> bool:
    """Print what is left of the run; return whether it is to end here."""
    left = _left(cfg, run_folder, learner, data, partial(sft_loss, pack=cfg.packing))
    sizes, parts = [step_tokens(data.train, cfg.batch, left.model.packs_rows)], [data.train, data.valid]
    if pretrain is not None:
        per_step = cfg.pretrain_fraction / (1 - cfg.pretrain_fraction) * cfg.batch
        left.tokens += tokens_between(pretrain, round(left.done * per_step), round(left.steps * per_step))
        sizes.append(-(-int(per_step * 100) // 100) * max(map(row_tokens, pretrain.rows)))
        parts.append(pretrain)
    size = model_size(left.model, learner)
    work = _work(run_folder, left.model, (size,), parts, max(sizes), dropout=bool(cfg.residual_dropout))
    saved = size.weights  # merged, and an adapter beside it
    best = 0 if cfg.select == "last" or not len(data.valid) else saved
    return tell(cfg, run_folder, left.model, left.plan(f"{len(data.train):,} rows", work, size, best), dry_run)


def forecast_reward(cfg: RewardConfig, run_folder: RunFolder, learner: Learner, data: Split, dry_run: DryRun) -> bool:
    """Print what is left of the run; return whether it is to end here."""
    left = _left(cfg, run_folder, learner, data, reward_loss)
    size = model_size(left.model, learner)
    largest = step_tokens(data.train, cfg.batch, left.model.packs_rows)
    work = _work(run_folder, left.model, (size,), [data.train, data.valid], largest)
    responses = sum(len(row.responses) for row in data.train.rows)
    rows = f"{len(data.train):,} prompts with {responses:,} responses"
    return tell(cfg, run_folder, left.model, left.plan(rows, work, size, best=0), dry_run)


@dataclass
class _Left:
    """The rest of a run that takes its rows in epochs."""

    cfg: SFTConfig | RewardConfig
    learner: Learner
    loss: Loss
    train: Dataset
    model: Model
    steps: int
    """Steps of the whole run."""
    done: int
    """Steps that an earlier process has made."""
    first: int
    """The position of the next row over all epochs."""
    tokens: int
    held_out: int
    """Tokens of all validations."""

    def plan(self, rows: str, work: Work, size: ModelSize, best: int) -> Plan:
        """Return the plan. rows: how many there are, in words."""
        epochs, steps = self.cfg.epochs, self.steps - self.done
        counts = f"{rows}, {_plural(epochs, 'epoch')}, {_steps(self.steps, self.done)} of {self.cfg.batch}"
        return Plan(
            f"{counts}; {_tokens(self.tokens, self.done, epochs)}", steps, work, 6 * size.params * self.tokens,
            self.tokens, self._time, checkpoint=12 * size.trained, saved=size.weights, best=best,
        )  # fmt: skip

    def _time(self, seconds: float) -> tuple[float, str]:
        rows = _rows_of_a_pass(self.train, self.first, self.cfg.batch, self.cfg.optim.micro_batch_tokens)
        rates = timing.rates_of(self.learner, self.loss, partial(self.train.batch, self.first), rows, seconds)
        tokens = self.tokens + timing.FORWARD_SHARE * self.held_out
        total = rates.token * tokens + rates.step * (self.steps - self.done)
        speed = count(self.tokens / max(total, 1e-9))
        return total, f"about {duration(total)} ({speed} tokens/s by a timed micro-batch)"


def _left(cfg: SFTConfig | RewardConfig, run_folder: RunFolder, learner: Learner, data: Split, loss: Loss) -> _Left:
    assert isinstance(learner.model, Model)
    rows = cfg.epochs * len(data.train)
    steps = -(-rows // cfg.batch)
    done = run_folder.steps_done()
    first = min(done * cfg.batch, rows)
    validations = _validations(cfg, len(data.train), cfg.batch, steps - done)
    return _Left(
        cfg, learner, loss, data.train, learner.model, steps, done, first,
        tokens=tokens_between(data.train, first, rows), held_out=validations * sum(map(row_tokens, data.valid.rows)),
    )  # fmt: skip


def forecast_ppo(
    cfg: PPOConfig,
    run_folder: RunFolder,
    models: tuple[Model, Model, Model, Reward],
    learners: tuple[Learner, Learner],
    prompt_data: Split,
    pretrain: Dataset | None,
    dry_run: DryRun,
) -> bool:
    """Print what is left of the run; return whether it is to end here."""
    policy, reference, _, reward = models
    data, new_tokens = prompt_data.train, cfg.sampling.max_new_tokens
    done = min(run_folder.steps_done(), cfg.num_batches)
    left = cfg.num_batches - done
    policy_size, value_size = (model_size(learner.model, learner) for learner in learners)
    frozen_sizes = [model_size(model) for model in (reference, *reward.models())]
    if reference.module is policy.module:  # the policy without its adapter
        frozen_sizes = frozen_sizes[1:]
    lengths = sorted((len(row.prompt) for row in data.rows), reverse=True)
    prompt_tokens = sum(lengths) / len(lengths) * cfg.batch
    text_tokens = 0.0
    parts, sizes = [data, prompt_data.valid], [sum(lengths[: cfg.minibatch]) + new_tokens * cfg.minibatch]
    if pretrain is not None:
        mean = sum(map(row_tokens, pretrain.rows)) / len(pretrain)
        text_tokens = mean * cfg.ptx_ratio * cfg.batch
        parts.append(pretrain)
        sizes.append(cfg.ptx_ratio * cfg.minibatch * max(map(row_tokens, pretrain.rows)))
    slots = min(cfg.sampling.batch, cfg.batch)
    longest = max([lengths[0] + new_tokens, *(map(row_tokens, pretrain.rows) if pretrain is not None else ())])
    # a batch takes its prompts again where there are too few
    answered = tuple(lengths[i // -(-slots // len(lengths))] for i in range(slots))
    work = replace(
        _work(run_folder, policy, (policy_size, value_size), parts, max(sizes)),
        frozen=tuple(frozen_sizes), longest=longest, ema=bool(cfg.ema), prompts=answered, new_tokens=new_tokens,
        page=page_size_for(policy.device), may_adapt=not cfg.exact,
    )  # fmt: skip
    response_tokens = prompt_tokens + new_tokens * cfg.batch
    scored = sum(size.params for size in (policy_size, value_size, *frozen_sizes))
    trained = policy_size.params + value_size.params
    operations = left * (
        2 * policy_size.params * response_tokens
        + 2 * scored * response_tokens
        + 6 * cfg.inner_epochs * (trained * response_tokens + policy_size.params * text_tokens)
    )
    sampled = left * cfg.batch * new_tokens
    in_all = f"{cfg.num_batches:,} batches" if not done else f"{left:,} of {cfg.num_batches:,} batches left"
    counts = (
        f"{len(data):,} prompts, {in_all} of {cfg.batch} episodes in {cfg.steps // cfg.num_batches} steps; at most"
        f" {count(sampled)} tokens to sample"
    )

    def time(seconds: float) -> tuple[float, str]:
        rates = timing.ppo_rates(cfg, models, learners, data.batch(done * cfg.batch, cfg.batch), seconds)
        generate = rates.prefill * prompt_tokens + rates.decode * new_tokens * (-(-cfg.batch // slots))
        score = rates.score * response_tokens
        learn = cfg.inner_epochs * (
            (rates.policy + rates.value) * response_tokens + rates.policy * text_tokens
        ) + rates.step * (cfg.steps // cfg.num_batches)
        validations = _validations(cfg, len(data), cfg.batch, left) * len(prompt_data.valid) / cfg.batch
        batch = generate + score + learn
        total = left * batch + validations * (generate + score)
        phases = {"generate": generate, "score": score, "learn": learn}
        shares = ", ".join(f"{name} {spent / max(batch, 1e-9):.0%}" for name, spent in phases.items())
        calls_functions = len(reward.models()) < len(reward.parts)
        unknown = " and the reward functions'" if calls_functions else ""
        return total, f"at most about {duration(total)}{unknown}, {duration(batch)} a batch: {shares}"

    copies = 1 + bool(cfg.ema) + (cfg.select == "ema")
    plan = Plan(
        counts, left, work, operations, sampled, time,
        checkpoint=(16 if cfg.ema else 12) * policy_size.trained + 12 * value_size.trained,
        saved=copies * policy_size.weights + value_size.weights,
        best=policy_size.weights if cfg.select == "reward" else 0,
    )  # fmt: skip
    return tell(cfg, run_folder, policy, plan, dry_run)


def row_tokens(row: Row) -> int:
    """Return the tokens of a row as metrics.jsonl counts them: a prompt once for each of its responses."""
    return sum(len(row.prompt) + len(response) for response in row.responses) or len(row.prompt)


def tokens_between(data: Dataset, first: int, end: int) -> int:
    """Return the tokens of the rows at the positions from `first` to `end`."""
    sizes = [row_tokens(row) for row in data.rows]
    whole = sum(sizes)

    def before(position: int) -> int:
        epochs, rest = divmod(position, len(sizes))
        return epochs * whole + sum(sizes[data.row_at(epochs * len(sizes) + i)] for i in range(rest))

    return before(end) - before(first) if end > first else 0


def step_tokens(data: Dataset, batch: int, packed: bool) -> int:
    """Return the tokens of the largest optimizer step of the first epoch: as they lie in packed rows, or padded."""
    order = iter([data.rows[data.row_at(i)] for i in range(len(data))])
    largest = 0
    while rows := list(islice(order, batch)):
        if packed:
            largest = max(largest, sum(map(_packed_tokens, rows)))
        else:
            lengths = [len(row.prompt) + len(response) for row in rows for response in row.responses]
            largest = max(largest, len(lengths) * max(lengths))
    return largest


def _packed_tokens(row: Row) -> int:
    return len(row.prompt) + sum(map(len, row.responses))


def model_size(model: Any, learner: Learner | None = None) -> ModelSize:
    """Return the sizes of a model by its tensors and its config."""
    cfg = model.text_config

    def number(*names: str, default: int = 0) -> int:
        found = (getattr(cfg, name, None) for name in names)
        return next((value for value in found if isinstance(value, int) and value > 0), default)

    parameters = list(model.module.parameters())  # a shared one comes once
    itemsize = model.head_weight.element_size()
    hidden = number("hidden_size", "n_embd", "d_model", default=1)
    heads = number("num_attention_heads", "n_head", "num_heads", default=1)
    head_dim = number("head_dim", default=hidden // heads)
    inner = number("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * hidden)
    return ModelSize(
        params=-(-sum(p.numel() * p.element_size() for p in parameters) // itemsize),
        trained=sum(p.numel() for p in learner.params.values()) if learner else 0,
        itemsize=itemsize,
        layers=number("num_hidden_layers", "n_layer", "num_layers", default=1),
        hidden=hidden,
        inner=inner,
        heads=heads * head_dim,
        kv=number("num_key_value_heads", default=heads) * head_dim,
        vocab=model.num_rows if model.head == "lm" else 1,
        adapters=model.module is not model.base,
        checkpointing=model.cfg.gradient_checkpointing,
        packed=model.packs_rows,
    )


def _work(
    run_folder: RunFolder,
    model: Model,
    trained: tuple[ModelSize, ...],
    parts: Sequence[Dataset],
    largest: int,
    dropout: bool = False,
) -> Work:
    rows = [row for data in parts for row in data.rows]
    packed = model.packs_rows
    longest = (_packed_tokens(row) if packed else len(row.responses) * _longest(row) for row in rows)
    return Work(
        base=run_folder.base_memory,
        trained=trained,
        step_tokens=largest,
        longest=max(longest, default=1),
        rows_tokens=sum(map(_packed_tokens, rows)),
        dropout=dropout,
        on_gpu=model.device.type == "cuda",
    )


def _longest(row: Row) -> int:
    return len(row.prompt) + max(map(len, row.responses), default=0)


def _rows_of_a_pass(data: Dataset, first: int, batch: int, budget: int) -> int:
    """Return how many of the first rows are about one micro-batch."""
    total = 0
    for rows in range(min(batch, len(data))):
        total += _packed_tokens(data.rows[data.row_at(first + rows)])
        if total > budget:
            return max(rows, 1)
    return min(batch, len(data))


def _validations(cfg: StageConfig, rows: int, batch: int, steps: int) -> int:
    """Return about how many of `steps` validate."""
    every = cfg.log.validate_every
    return max(1, steps // every if every else steps * batch // rows) if steps else 0


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _steps(steps: int, done: int) -> str:
    return f"{steps - done:,} of {steps:,} steps left" if done else _plural(steps, "step")


def _tokens(tokens: int, done: int, epochs: int) -> str:
    if done:
        return f"{count(tokens)} tokens left"
    return f"{count(tokens)} tokens" + (f", {count(tokens / epochs)} an epoch" if epochs > 1 else "")
