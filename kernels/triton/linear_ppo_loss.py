"""linear_ppo_loss on a GPU: three products and a kernel between them, chunk by chunk. The kernel makes a row's
statistics, what PPO's loss makes of them, and the gradient of its logits; _head.py says how, and what it costs. The
loss and the metrics are summed over the rows at the end (_policy.py)."""

from rlhf_fast.kernels.triton import _head as head
from rlhf_fast.kernels.triton import _logits as rows
from rlhf_fast.kernels.triton import _ppo as policy


def _train(
    hidden, weight, targets, old_logprobs, advantages, weights, ref_logprobs, clip_low, clip_high, dual_clip, kl_coef,
    kl_estimator, entropy_coef, temperature, softcap, bias, shift, scale, log_ratio_clamp, *by,
):  # fmt: skip
    of = head.Head("linear_ppo_loss", hidden, weight, targets, bias, temperature, softcap)
    bound = log_ratio_clamp if log_ratio_clamp > 0 else float("inf")
    bounds, coefficients = (1.0 - clip_low, 1.0 + clip_high, dual_clip, bound), (kl_coef, entropy_coef)
    per_row = tuple(
        x if x is None else x.contiguous() for x in (weights, old_logprobs, advantages, ref_logprobs, shift, scale)
    )
    loss = rows.Loss(rows.POLICY, None, None, per_row[0], None, *per_row[1:], bounds, coefficients, kl_estimator)
    results, grads = head.train(of, loss, by)
    total, stats = policy.sums(
        of.targets, results.logprobs, results.entropy, per_row, bounds, coefficients, kl_estimator
    )
    return total, results.logprobs, results.entropy, stats, *grads


def linear_ppo_loss(*args):
    return _train(*args, False, False, False)[:4]


def linear_ppo_loss_with_gradients(*args):
    return _train(*args)
