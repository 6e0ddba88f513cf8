"""Sampling responses: `Rollout(model, sampling, seed).generate(prompts) -> Responses`."""

from rlhf_fast.rollout.cached import Rollout

__all__ = ["Rollout"]
