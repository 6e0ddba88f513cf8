"""From hidden states to tokens: the head and the sampler."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.response_buffer import Drawn

MASK64 = 2**64 - 1


class Draw:
    """Draws for the rows of one rollout, whose noise `key` names; `ends` cannot be drawn before min_new_tokens."""

    def __init__(self, model: Model, cfg: SamplingConfig, ends: list[int], key: int):
        self.model, self.cfg, self.key = model, cfg, key
        self.banned = torch.tensor(ends, dtype=torch.int64, device=model.device)

    def __call__(self, hidden: Tensor, ids: Tensor, steps: Tensor, slots: np.ndarray) -> Drawn:
        """A token for each row of `hidden` (n, D), unscaled. `ids` and `steps` (n,) int64 key the noise; `slots` are
        the steps on the host."""
        cfg, model, ban = self.cfg, self.model, (None, None)
        if cfg.min_new_tokens and len(self.banned) and slots.min() < cfg.min_new_tokens:
            ban = self.banned, steps < cfg.min_new_tokens
        hidden = hidden if model.logit_scale == 1 else hidden * model.logit_scale
        token, logprobs, raw, kept, _, entropy = ops.linear_sample_tokens(
            hidden, model.head_weight, cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, self.key, ids, steps,
            model.head_bias, model.softcap, *ban,
        )  # fmt: skip
        return Drawn(token, logprobs, raw, kept, entropy)


def mix(seed: int, step: int) -> int:
    """One non-negative 63-bit key of a run's seed and a step, spread by splitmix64's finalizer."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return (x ^ (x >> 31)) >> 1
