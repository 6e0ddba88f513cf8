"""Time a few passes of a stage before its first step, without a trace in the run.

No optimizer step is taken. Random states and the CUDA graphs of training are put back, so that a run with these passes
ends with the same weights, to the bit, as one without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch

from rlhf_fast.batches import Batch, Experience, Prompts, Responses, pad_rows, response_mask
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.model.model import Model
from rlhf_fast.model.packed_graphs import PackedGraphs
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.checkpoint import random_states, restore_random_states
from rlhf_fast.run.estimate import sizes_up_to
from rlhf_fast.training.experience import make_experience
from rlhf_fast.training.learner import Learner, Loss
from rlhf_fast.training.losses import ppo_policy_loss, ppo_value_loss
from rlhf_fast.training.rewards import ModelReward, Reward

clock = time.perf_counter
MIN_SECONDS = 20.0
"""A run that takes less by a guess from its sizes is not timed."""
GUESSED_FLOPS = {"cpu": 2e10, "cuda": 1e14}
"""Operations per second of the guess."""
SHARE = 0.01
"""Share of the guessed time that each timing of a pass may take, above MIN_BUDGET and below MAX_BUDGET seconds."""
MIN_BUDGET, MAX_BUDGET = 0.3, 5.0
WARM_UP_LIMIT = 1.5
"""A first pass of more seconds is not repeated, though it also loads what later ones have."""
DECODE_STEPS = 4
FORWARD_SHARE = 1 / 3
"""Time of a forward pass alone, of one with its backward pass."""
OPTIMIZER_BYTES = {False: 36, True: 48}
"""Bytes that an optimizer step reads and writes for each trained weight, without and with a moving average."""


class Rates(NamedTuple):
    """Seconds of each token of a micro-batch, forward and backward, and of an optimizer step."""

    token: float
    step: float


class PPORates(NamedTuple):
    """Seconds of PPO's phases: per prompt token, per decode step of all slots, and per token of a whole response."""

    prefill: float
    decode: float
    score: float
    policy: float
    value: float
    step: float


def guessed_seconds(operations: float, device: torch.device) -> float:
    """Return a guess of the time of so many multiplications and additions."""
    return operations / GUESSED_FLOPS.get(device.type, GUESSED_FLOPS["cpu"])


@contextmanager
def no_trace(*models: Model) -> Iterator[None]:
    """Put random states and the models' CUDA graphs back at the end of the block."""
    states = random_states()
    graphs = [(model, model._packed_graphs) for model in models]
    for model in models:
        model._packed_graphs = PackedGraphs()
    try:
        yield
    finally:
        for model, own in graphs:
            model._packed_graphs = own
        restore_random_states(states)


def rates_of(learner: Learner, loss: Loss, batch_of: Callable[[int], Batch], rows: int, seconds: float) -> Rates:
    """Time micro-batches of 1, 2, 4, ... to `rows` rows, as long as they take a small share of `seconds`."""
    model = learner.model
    assert isinstance(model, Model)
    with no_trace(model):
        size, elapsed = _largest_timed(
            lambda size: learner.rehearse([(loss, batch_of(size), 1.0)]), sizes_up_to(rows), seconds, model.device
        )
        step = optimizer_seconds(learner, model.device)
    return Rates(elapsed / max(int(batch_of(size).lengths.sum()), 1), step)


def optimizer_seconds(learner: Learner, device: torch.device) -> float:
    """Return about the time of an optimizer step, from the speed at which an update of vectors reads and writes."""
    numbers = sum(p.numel() for p in learner.params.values())
    size = min(numbers, 2**22)
    x, y = (torch.zeros(size, device=device) for _ in range(2))
    x.lerp_(y, 0.5)
    elapsed = _time(lambda: x.lerp_(y, 0.5), device)
    return elapsed / (12 * max(size, 1)) * OPTIMIZER_BYTES[bool(learner.ema)] * numbers


def ppo_rates(
    cfg: PPOConfig,
    models: tuple[Model, Model, Model, Reward],
    learners: tuple[Learner, Learner],
    prompts: Prompts,
    seconds: float,
) -> PPORates:
    """Time a few decode steps, then scoring and learning on responses of full length made of the tokens sampled.

    prompts: those of the first batch. A reward that is a Python function is not called: it may count its calls.
    """
    policy, reference, value, reward = models
    own = [policy, reference, value, *reward.models()]
    scored = replace(cfg, missing_eos="keep", score_clip=0.0)
    with no_trace(*own):
        slots = min(cfg.sampling.batch, cfg.batch, len(prompts.uids))
        found: dict[int, tuple[float, float, Responses]] = {}

        def generate(size: int) -> None:
            found[size] = _few_steps(policy, cfg, prompts.take(range(size)))

        asked, _ = _largest_timed(generate, sizes_up_to(slots), seconds, policy.device)
        prefill, decode, sampled = found[asked]
        rows = _full_length(sampled, cfg.sampling.max_new_tokens)
        scorers = [part for part in reward.parts if isinstance(part, ModelReward)]
        scorer = Reward(scorers) if scorers else _zeros
        experience: dict[int, Experience] = {}

        def score(size: int) -> None:
            part = rows.take(range(size))
            experience[size], _ = make_experience(part, policy, reference, value, scorer, scored)

        fit = cfg.optim.micro_batch_tokens // max(int(rows.lengths.max()), 1)
        sizes = sizes_up_to(max(1, min(len(rows.lengths), fit)))
        tokens = rows.lengths.cumsum(0).tolist()

        def per_token(run: Callable[[int], object], sizes: Sequence[int]) -> float:
            size, elapsed = _largest_timed(run, sizes, seconds, policy.device)
            return elapsed / tokens[size - 1]

        def learning(learner: Learner, loss: Loss) -> float:
            return per_token(lambda size: learner.rehearse([(loss, experience[size], 1.0)]), sorted(experience))

        return PPORates(
            prefill,
            decode * slots / asked,
            score=per_token(score, sizes),
            policy=learning(learners[0], ppo_policy_loss),
            value=learning(learners[1], ppo_value_loss),
            step=sum(optimizer_seconds(learner, policy.device) for learner in learners),
        )


def _few_steps(policy: Model, cfg: PPOConfig, prompts: Prompts) -> tuple[float, float, Responses]:
    """Sample a few tokens; return seconds per prompt token, seconds of a decode step, and the responses."""
    steps = min(DECODE_STEPS, cfg.sampling.max_new_tokens)
    sampling = replace(cfg.sampling, max_new_tokens=steps, min_new_tokens=steps, stop=(), allow_biased_filters=True)
    rollout = Rollout(policy, sampling, cfg.seed)
    times = [clock()]
    responses = rollout.generate(prompts, progress=lambda *_: times.append(clock()))
    first, *others = between = [after - before for before, after in pairwise(times)]
    return first / max(sum(map(len, prompts.tokens)), 1), median(others or between), responses


def _full_length(sampled: Responses, new_tokens: int) -> Responses:
    """Return responses of `new_tokens` tokens each, made of those of `sampled` again and again."""
    rows = []
    spans = zip(sampled.tokens, sampled.prompt_lengths.tolist(), sampled.lengths.tolist(), strict=True)
    for tokens, start, end in spans:
        own = tokens[start:end].tolist() or tokens[:1].tolist()
        rows.append(tokens[:start].tolist() + (own * new_tokens)[:new_tokens])
    tokens, lengths = pad_rows(rows)
    mask = response_mask(sampled.prompt_lengths, lengths)
    logprobs = torch.full(mask.shape, -1.0) * mask
    return sampled._replace(
        tokens=tokens, lengths=lengths, mask=mask, logprobs=logprobs, raw_logprobs=logprobs, kept_logprobs=logprobs,
        entropy=-logprobs,
    )  # fmt: skip


def _zeros(responses: Responses) -> torch.Tensor:
    return torch.zeros(len(responses.lengths))


def _largest_timed(
    run: Callable[[int], object], sizes: Sequence[int], seconds: float, device: torch.device
) -> tuple[int, float]:
    """Return the largest size that fits a small share of `seconds`, and the time of `run(size)`.

    The first call counts only where a second one would take too long.
    """
    budget = min(max(SHARE * seconds, MIN_BUDGET), MAX_BUDGET)
    size, elapsed = sizes[0], _time(partial(run, sizes[0]), device)
    spent = elapsed
    if elapsed <= max(WARM_UP_LIMIT, budget / 2):
        elapsed = _time(partial(run, sizes[0]), device)
        spent += elapsed
    for larger in sizes[1:]:
        if spent + elapsed * larger / size > budget:
            break
        size, elapsed = larger, _time(partial(run, larger), device)
        spent += elapsed
    return size, elapsed


def _time(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of `run`. On a GPU those of its third call: the first two make kernels and CUDA graphs."""
    on_gpu = device.type == "cuda"
    for _ in range(2 if on_gpu else 0):
        run()
    if on_gpu:
        torch.cuda.synchronize(device)
    start = clock()
    run()
    if on_gpu:
        torch.cuda.synchronize(device)
    return clock() - start
