"""The coefficient of the KL penalty over a run: fixed, or steered towards a target.

The penalty itself enters in kernels/ppo_advantages.py, which `experience.make_experience` calls: the reward of every
response token is -coef * KL estimate, plus the score at the last one.
"""

from __future__ import annotations

from typing import Any

from rlhf_fast.config.fields import KLConfig


class KLController:
    """Holds the current coefficient `coef`. With `controller="adaptive"` it changes after each batch:

        coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon

    (Ziegler et al. 2019, section 2.2; as in lm-human-preferences). kl and target are nats per sequence, summed over a
    response's tokens and averaged over responses (target 6), or with target_unit="token" nats per token (as in verl;
    target 0.1).
    """

    def __init__(self, cfg: KLConfig):
        self.cfg, self.coef = cfg, cfg.coef

    def update(self, kl_per_sequence: float, kl_per_token: float, episodes: int) -> None:
        """Adapt the coefficient to the KL measured on a batch of `episodes` responses."""
        if self.cfg.controller == "fixed":
            return
        kl = kl_per_sequence if self.cfg.target_unit == "sequence" else kl_per_token
        error = min(max(kl / self.cfg.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * episodes / self.cfg.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = float(state["coef"])
