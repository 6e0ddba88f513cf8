"""The ops, ready to call from any trainer. What an op means is said in kernels/<op>.py, and by `help(ops.gae)`."""

from rlhf_fast.kernels.gae import gae
from rlhf_fast.kernels.gae_packed import gae_packed
from rlhf_fast.kernels.ppo_advantages import ppo_advantages
from rlhf_fast.kernels.ppo_loss import ppo_loss
from rlhf_fast.kernels.ranking_loss import ranking_loss

__all__ = [
    "gae",
    "gae_packed",
    "ppo_advantages",
    "ppo_loss",
    "ranking_loss",
]
