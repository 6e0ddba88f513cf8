"""From hidden states to tokens: the head and the sampler."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.config import SamplingConfig
from rlhf_fast.model import Model
from rlhf_fast.rollout.record import Drawn

MASK64 = 2**64 - 1


class Draw:
    """Draws for the rows of one rollout, whose noise `key` names; `ends` cannot be drawn before min_new_tokens."""

    def __init__(self, model: Model, cfg: SamplingConfig, ends: list[int], key: int):
        self.model, self.cfg, self.key = model, cfg, key
        self.ends = torch.tensor(ends, dtype=torch.int64, device=model.device)
        weight, bias = model.head_weight, model.head_bias
        # logits are float32 from the accumulator on
        self.weight = weight if weight.dtype == torch.float32 or weight.device.type == "cuda" else weight.float()
        self.bias = None if bias is None else bias.float()

    def __call__(self, hidden: Tensor, ids: Tensor, steps: Tensor, slots: np.ndarray) -> Drawn:
        """A token for each row of `hidden` (n, D), unscaled. `ids` and `steps` (n,) int64 key the noise; `slots` are
        the steps on the host."""
        cfg, logits = self.cfg, self._logits(hidden)
        ban = slots < cfg.min_new_tokens if cfg.min_new_tokens and len(self.ends) else None
        banned = ban is not None and ban.any()
        allowed = logits
        if banned:
            rows = torch.from_numpy(ban).to(logits.device)
            allowed = torch.where(rows[:, None], logits.index_fill(1, self.ends, -torch.inf), logits)
        token, logprobs, raw, kept, _, entropy = ops.sample_tokens(
            allowed, cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, self.key, ids, steps
        )
        if banned:
            # the trainer's forward pass knows nothing of the ban: what it will say is reported
            said = token.clamp_min(0)
            raw = torch.where(rows, ops.token_logprobs(logits, said)[0], raw)
            if cfg.temperature > 0:
                free = ops.token_logprobs(logits, said, temperature=cfg.temperature)
                logprobs, entropy = (torch.where(rows, a, b) for a, b in zip(free, (logprobs, entropy), strict=True))
        return Drawn(token, logprobs, raw, kept, entropy)

    def _logits(self, hidden: Tensor) -> Tensor:
        """(n, V) float32, soft-capped."""
        model, weight = self.model, self.weight
        hidden = hidden if model.scale == 1 else hidden * model.scale
        if weight.dtype == torch.float32:
            out = F.linear(hidden.float(), weight, self.bias)
        else:
            out = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
            out = out if self.bias is None else out + self.bias
        return model.softcap * torch.tanh(out / model.softcap) if model.softcap else out


def mix(seed: int, step: int) -> int:
    """One non-negative 63-bit key of a run's seed and a step, spread by splitmix64's finalizer."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return (x ^ (x >> 31)) >> 1
