"""The ops, ready to call from any trainer. What an op means is said in kernels/<op>.py, and by `help(ops.gae)`."""

from rlhf_fast.kernels.decode_attention import decode_attention
from rlhf_fast.kernels.gae import gae
from rlhf_fast.kernels.gae_packed import gae_packed
from rlhf_fast.kernels.gelu import gelu
from rlhf_fast.kernels.layer_norm import layer_norm
from rlhf_fast.kernels.linear import linear
from rlhf_fast.kernels.linear_cross_entropy import linear_cross_entropy
from rlhf_fast.kernels.linear_kl import linear_kl
from rlhf_fast.kernels.linear_logprobs import linear_logprobs
from rlhf_fast.kernels.linear_ppo_loss import linear_ppo_loss
from rlhf_fast.kernels.linear_sample_tokens import linear_sample_tokens
from rlhf_fast.kernels.ppo_advantages import ppo_advantages
from rlhf_fast.kernels.ppo_loss import ppo_loss
from rlhf_fast.kernels.ranking_loss import ranking_loss
from rlhf_fast.kernels.rms_norm import rms_norm
from rlhf_fast.kernels.rope import rope
from rlhf_fast.kernels.rope_store import rope_store
from rlhf_fast.kernels.sample_tokens import sample_tokens
from rlhf_fast.kernels.swiglu import swiglu
from rlhf_fast.kernels.token_logprobs import token_logprobs
from rlhf_fast.kernels.varlen_attention import varlen_attention

__all__ = [
    "decode_attention",
    "gae",
    "gae_packed",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_kl",
    "linear_logprobs",
    "linear_ppo_loss",
    "linear_sample_tokens",
    "ppo_advantages",
    "ppo_loss",
    "ranking_loss",
    "rms_norm",
    "rope",
    "rope_store",
    "sample_tokens",
    "swiglu",
    "token_logprobs",
    "varlen_attention",
]
