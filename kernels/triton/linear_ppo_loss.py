"""linear_ppo_loss on a GPU: three matrix products, chunk by chunk, with one kernel between them.

For each row that kernel makes the statistics, the gradients of PPO's loss, and the gradient of the logits. _head.py
has the products, the floor and the picture. The loss and its statistics are sums over all rows at the end (_ppo.py).

Where a sequence has one ratio, the loss needs all rows' statistics first: four products, and plain torch between them.
"""

import torch

from rlhf_fast.kernels._head import IGNORE_INDEX
from rlhf_fast.kernels._ppo import KL, Clip, TokenInputs, Whitening, policy_loss
from rlhf_fast.kernels._tensors import contiguous
from rlhf_fast.kernels.triton import _head as head
from rlhf_fast.kernels.triton import _ppo as ppo
from rlhf_fast.kernels.triton._logits import Loss, RowGrads


def loss_of_sequences(policy: head.GpuHead, inputs: TokenInputs, *options):
    """Return what linear_ppo_loss_with_gradients returns, where the loss is not known before all rows' statistics."""
    *options, needs_grad = options
    statistics = head.compute_head_statistics(policy)
    valid = (policy.targets != IGNORE_INDEX) & (inputs.weights != 0)
    loss = policy_loss(statistics.logprobs, statistics.entropy, valid, inputs, *options)
    row_grads = RowGrads(*contiguous(loss.logprob_grad, loss.entropy_grad))
    grads = head.compute_input_grads(policy, statistics, row_grads, needs_grad, gain=policy.loss_gain)
    return loss.loss, statistics.logprobs, statistics.entropy, torch.stack(loss.stats), *grads


def linear_ppo_loss_with_gradients(
    hidden, weight, targets, old_logprobs, advantages, weights, ref_logprobs, clip_low, clip_high, dual_clip, kl_coef,
    kl_estimator, entropy_coef, temperature, softcap, bias, shift, scale, log_ratio_clamp, clip_mode, ratio_level,
    *needs_grad,
):  # fmt: skip
    policy = head.GpuHead("linear_ppo_loss", hidden, weight, targets, bias, temperature, softcap)
    if ratio_level == "sequence":
        bounds = Clip(clip_low, clip_high, dual_clip, 0.0, log_ratio_clamp, clip_mode, ratio_level)
        inputs = TokenInputs(old_logprobs, advantages, weights, ref_logprobs)
        options = (Whitening(shift, scale), bounds, KL(kl_coef, kl_estimator), entropy_coef)
        return loss_of_sequences(policy, inputs, *options, needs_grad)
    clip = ppo.ClipBounds.of(clip_low, clip_high, dual_clip, log_ratio_clamp)
    tokens = ppo.Tokens(*contiguous(weights, old_logprobs, advantages, ref_logprobs, shift, scale))
    options = (tokens, clip, kl_coef, kl_estimator, entropy_coef, clip_mode == "cispo")
    statistics, grads = head.train(policy, Loss.ppo(*options), needs_grad)
    total, stats = ppo.loss_and_stats(policy.targets, statistics.logprobs, statistics.entropy, *options)
    return total, statistics.logprobs, statistics.entropy, stats, *grads


def linear_ppo_loss(*args):
    return linear_ppo_loss_with_gradients(*args, False, False, False)[:4]
