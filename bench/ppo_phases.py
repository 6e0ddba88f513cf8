"""Calls of ours and of plain torch for each phase of a PPO step, and for a step of reward training.

`Phases` makes both sides of a case, with what shows that they agree. ppo_step.py times them and saves rows,
test_bench_update.py lets pytest do it, process_memory.py runs one side in a process of its own.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.batches import Comparisons, Experience, Responses
from rlhf_fast.bench import plain_learner
from rlhf_fast.bench.decode_step import transformers_generate
from rlhf_fast.bench.ppo_data import Records, Sizes, cut, make_comparisons, make_prompts, response_lengths
from rlhf_fast.bench.shapes import random_model
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.kernels._backends import forcing
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.exact import make_exact
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.stages.ppo import State, ppo_update
from rlhf_fast.training.experience import make_experience
from rlhf_fast.training.gradient_buffers import GradientPool
from rlhf_fast.training.kl import KLController
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.losses import reward_loss

OURS, PLAIN = "ours", "plain torch"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the losses, the gradients' norms and the advantages
Step = Callable[[], dict[str, float]]


class Phase(NamedTuple):
    """Both sides of a phase.

    errors: differences of their results by name; a rollout has none, since it samples. stats: an optimizer step's own
    metrics by side.
    """

    name: str
    ours: Callable[[], object]
    plain: Callable[[], object]
    errors: dict[str, float]
    stats: dict[str, dict[str, float]]


def config_of(sizes: Sizes) -> PPOConfig:
    """Return the stage's defaults with the case's sizes."""
    sampling = SamplingConfig(max_new_tokens=sizes.new, batch=sizes.batch)
    cfg = PPOConfig(
        batch=sizes.batch, minibatch=sizes.minibatch, inner_epochs=sizes.inner_epochs,
        episodes=1000 * sizes.batch, sampling=sampling,
    )  # fmt: skip
    optims = [replace(optim, micro_batch_tokens=sizes.micro_batch_tokens) for optim in (cfg.optim, cfg.value_optim)]
    return replace(cfg, optim=optims[0], value_optim=optims[1])


def value_model(sizes: Sizes, device: str, dtype: torch.dtype) -> Model:
    return random_model(sizes.shape, device, dtype, head="scalar", seed=2)


def state_of(policy: Model, value: Model, cfg: PPOConfig) -> State:
    """Return the stage's state with optimizers of both models, which they train in place."""
    pool = GradientPool()
    policy_learner = Learner(policy, cfg.optim, cfg.steps, ema=cfg.ema, pool=pool)
    value_learner = Learner(value, cfg.value_optim, cfg.steps, pool=pool)
    return State(policy_learner, value_learner, KLController(cfg.kl), best=None)


def reward_learner(model: Model, cfg: PPOConfig) -> Learner:
    return Learner(model, cfg.value_optim, cfg.steps)


def update_step(side: str, state: State, experience: Experience, cfg: PPOConfig) -> Step:
    """Return a call that takes the next update of one side."""
    numbers = itertools.count(1)

    def plain() -> dict[str, float]:
        with forcing("reference"):  # torch's AdamW
            return plain_learner.ppo_update(state, experience, cfg, next(numbers))

    return plain if side == PLAIN else lambda: ppo_update(state, experience, None, cfg, next(numbers))


def reward_step(side: str, learner: Learner, batch: Comparisons) -> Step:
    """Return a call that takes a step of reward training of one side."""

    def plain() -> dict[str, float]:
        with forcing("reference"):
            return learner.step([(plain_learner.reward_loss, batch, 1.0)])

    return plain if side == PLAIN else lambda: learner.step([(reward_loss, batch, 1.0)])


class Phases:
    """The phases of a step in one dtype, for both sides. Each takes what the phases before it have made."""

    def __init__(
        self, sizes: Sizes, dtype: torch.dtype, device: str, records: Records | None = None, exact: bool = False
    ):
        self.sizes, self.dtype, self.records = sizes, dtype, records
        self.name = f"{sizes.name} {str(dtype)[6:]}, {sizes.words}" + ", exact" * exact
        self.cfg = config_of(sizes)
        self.policy = random_model(sizes.shape, device, dtype)
        self.reference = random_model(sizes.shape, device, dtype, seed=1)
        self.value = value_model(sizes, device, dtype)
        if exact:  # of ours
            make_exact(self.policy, self.reference, self.value)
        self.prompts = make_prompts(sizes, records)
        self.sampler = Rollout(self.policy, self.cfg.sampling)

    @cached_property
    def responses(self) -> Responses:
        """Our responses, cut in a ragged case. Making them also compiles the kernels."""
        found = self.sampler.generate(self.prompts)
        return cut(found, response_lengths(self.sizes, self.records)) if self.sizes.ragged else found

    @cached_property
    def experience(self) -> Experience:
        return self.score()

    @cached_property
    def comparisons(self) -> Comparisons:
        return make_comparisons(self.sizes, self.records)

    def score(self) -> Experience:
        """Return our experience of the responses."""
        models = (self.policy, self.reference, self.value)
        return make_experience(self.responses, *models, random_scores, self.cfg)[0]

    def rollout(self) -> Phase:
        """Return the phase that samples responses; plain torch's is transformers' generate."""
        assert len(self.responses.lengths) == self.sizes.batch  # it is warm now
        transformers_generate(self.policy, self.prompts, 1)
        return Phase(
            f"PPO rollout, {self.name}", lambda: self.sampler.generate(self.prompts),
            lambda: transformers_generate(self.policy, self.prompts, self.sizes.new), {}, {},
        )  # fmt: skip

    def scoring(self) -> Phase:
        """Return the phase of the forward passes, the advantages and the metrics."""

        def plain() -> Experience:
            return plain_learner.make_experience(self.responses, self.reference, self.value, random_scores, self.cfg)

        expected = plain()
        errors = {
            name: relative(getattr(self.experience, name), getattr(expected, name))
            for name in ("ref_logprobs", "values", "advantages")
        }
        return Phase(f"PPO experience, {self.name}", self.score, plain, errors, {})

    def update(self) -> Phase:
        """Return the phase of the optimizer steps of both models."""
        ours, plain = (
            update_step(side, state_of(*copy.deepcopy((self.policy, self.value)), self.cfg), self.experience, self.cfg)
            for side in (OURS, PLAIN)
        )
        stats = ("loss/policy_avg", "loss/value_avg", "grad_norm", "value/grad_norm")
        return compared(f"PPO update, {self.name}", ours, plain, stats)

    def reward(self) -> Phase:
        """Return one optimizer step of a reward model on prompts with ranked responses."""
        ours, plain = (
            reward_step(side, reward_learner(copy.deepcopy(self.value), self.cfg), self.comparisons)
            for side in (OURS, PLAIN)
        )
        counts = self.comparisons.group_offsets.diff()
        model, real = self.name.partition(",")[0], ", real lengths" if self.sizes.real else ""
        few, many = int(counts.min()), int(counts.max())
        texts = f"{len(counts)} prompts of {few if few == many else f'{few} to {many}'} responses{real}"
        exact = ", exact" * self.value.exact
        return compared(f"reward step, {model}, {texts}{exact}", ours, plain, ("loss", "grad_norm"))


def compared(name: str, ours: Step, plain: Step, stats: tuple[str, ...]) -> Phase:
    """Return a phase of optimizer steps, with the differences after the first step of both."""
    found, expected = ours(), plain()
    errors = {stat: abs(found[stat] - expected[stat]) / max(abs(expected[stat]), 0.1) for stat in stats}
    return Phase(name, ours, plain, errors, {OURS: found, PLAIN: expected})


def random_scores(responses: Responses) -> Tensor:
    """Return fixed rewards (B,), which depend on nothing."""
    return torch.randn(len(responses.lengths), generator=torch.Generator().manual_seed(1))


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of the expected."""
    return float((found.cpu() - expected.cpu()).norm() / expected.cpu().norm().clamp_min(1e-12))


def checked(errors: dict[str, float], tolerance: float) -> str:
    """Return in words whether both sides agree."""
    worst = max(errors, key=errors.__getitem__)
    verdict = "agree" if errors[worst] <= tolerance else "DIFFER"
    return f"{verdict}: {worst} by {errors[worst]:.2g}"
