"""Sampling of tokens from hidden states, and the keys of the sampling noise."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.kernels._head import IGNORE_INDEX
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.response_buffer import TokenSample

MASK64 = 2**64 - 1


class Sampler:
    """Samples the tokens of one rollout with noise from `key`. `end_tokens` are banned before min_new_tokens."""

    def __init__(self, model: Model, cfg: SamplingConfig, end_tokens: list[int], key: int):
        self.model = model
        self.cfg = cfg
        self.key = key
        # A kernel loads the key: as an argument, Triton would compile other code for some keys.
        self.device_key = torch.tensor([key], device=model.device) if model.device.type == "cuda" else None
        self.end_tokens = end_tokens
        self.banned = torch.tensor(end_tokens, dtype=torch.int64, device=model.device)

    def needs_ban(self, host_steps: np.ndarray) -> bool:
        """Return whether a row at these steps must not end yet."""
        return bool(self.end_tokens and self.cfg.min_new_tokens and host_steps.min() < self.cfg.min_new_tokens)

    def __call__(self, hidden: Tensor, row_ids: Tensor, steps: Tensor, host_steps: np.ndarray) -> TokenSample:
        """Return a token for each row of `hidden` (n, D), which is not multiplied by the logit scale yet.
        `row_ids` and `steps` (n,) int64 key the noise; `host_steps` is a copy of `steps` on the host."""
        return self.sample(hidden, row_ids, steps, self.needs_ban(host_steps))

    def sample(
        self, hidden: Tensor, row_ids: Tensor, steps: Tensor, bans: bool, device_key: Tensor | None = None
    ) -> TokenSample:
        """Return a token for each row. bans: ban the end tokens in the rows whose step is below min_new_tokens.
        device_key: (1,) int64, replaces `key`."""
        cfg, model = self.cfg, self.model
        device_key = self.device_key if device_key is None else device_key
        banned, ban_rows = (self.banned, steps < cfg.min_new_tokens) if bans else (None, None)
        hidden = model.for_head(hidden)
        token, logprobs, raw_logprobs, kept_logprobs, _, entropy = ops.linear_sample_tokens(
            hidden,
            model.head_weight,
            cfg.temperature,
            cfg.top_k,
            cfg.top_p,
            cfg.min_p,
            seed=self.key if device_key is None else 0,
            row_ids=row_ids,
            steps=steps,
            bias=model.head_bias,
            softcap=model.softcap,
            banned=banned,
            ban_rows=ban_rows,
            device_seed=device_key,
        )
        if model.exact and cfg.temperature:  # the training step's own op, whose sums have another order
            targets = torch.where(token < 0, IGNORE_INDEX, token)
            logprobs, entropy, _, _ = ops.linear_logprobs(
                hidden, model.head_weight, targets, model.head_bias, cfg.temperature, model.softcap
            )
            raw_logprobs = logprobs if cfg.temperature == 1 else raw_logprobs
        # a greedy token is certain at temperature 0; what the model thinks of it is its log-probability at 1
        return TokenSample(token, logprobs if cfg.temperature else raw_logprobs, raw_logprobs, kept_logprobs, entropy)


def rollout_key(seed: int, step: int) -> int:
    """Return a non-negative 63-bit key for a run's seed and a step, mixed by splitmix64's finalizer."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return (x ^ (x >> 31)) >> 1
