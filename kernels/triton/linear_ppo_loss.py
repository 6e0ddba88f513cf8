"""linear_ppo_loss on a GPU: three matrix products, chunk by chunk, with one kernel between them.

For each row that kernel makes the statistics, the gradients of PPO's loss, and the gradient of the logits. _head.py
has the products, the floor and the picture. The loss and its statistics are sums over all rows at the end (_ppo.py).
"""

from rlhf_fast.kernels._tensors import contiguous
from rlhf_fast.kernels.triton import _head as head
from rlhf_fast.kernels.triton import _ppo as ppo
from rlhf_fast.kernels.triton._logits import Loss


def linear_ppo_loss_with_gradients(
    hidden, weight, targets, old_logprobs, advantages, weights, ref_logprobs, clip_low, clip_high, dual_clip, kl_coef,
    kl_estimator, entropy_coef, temperature, softcap, bias, shift, scale, log_ratio_clamp, *needs_grad,
):  # fmt: skip
    policy = head.GpuHead("linear_ppo_loss", hidden, weight, targets, bias, temperature, softcap)
    clip = ppo.ClipBounds.of(clip_low, clip_high, dual_clip, log_ratio_clamp)
    tokens = ppo.Tokens(*contiguous(weights, old_logprobs, advantages, ref_logprobs, shift, scale))
    policy_loss = (tokens, clip, kl_coef, kl_estimator, entropy_coef)
    statistics, grads = head.train(policy, Loss.ppo(*policy_loss), needs_grad)
    total, stats = ppo.loss_and_stats(policy.targets, statistics.logprobs, statistics.entropy, *policy_loss)
    return total, statistics.logprobs, statistics.entropy, stats, *grads


def linear_ppo_loss(*args):
    return linear_ppo_loss_with_gradients(*args, False, False, False)[:4]
