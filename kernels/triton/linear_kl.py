"""linear_kl on a GPU: the products of both heads, chunk by chunk, and one kernel that reads the logits of both.

That kernel computes the statistics, and backward, with four numbers per row, the gradient. _head.py has the products
and the picture.

Floor: forward two products, and 8 + 8 bytes per logit. Backward computes both logits again, then dX and dW.
"""

from rlhf_fast.kernels._tensors import contiguous
from rlhf_fast.kernels.triton import _head as head
from rlhf_fast.kernels.triton._logits import RowGrads, Statistics


def policy_and_reference(hidden, weight, ref_hidden, ref_weight, targets, temperature, softcap, bias, ref_bias):
    options = (temperature, softcap)
    policy = head.GpuHead("linear_kl", hidden, weight, targets, bias, *options)
    return policy, head.GpuHead("linear_kl", ref_hidden, ref_weight, targets, ref_bias, *options)


def linear_kl(*args):
    return linear_kl_with_statistics(*args)[:4]


def linear_kl_with_statistics(*args):
    logprobs, entropy, sums, ref_logprobs, kl, _, _ = head.compute_head_statistics(*policy_and_reference(*args))
    return logprobs, ref_logprobs, entropy, kl, sums


def linear_kl_backward(
    grad_logprobs, grad_entropy, grad_kl, logprobs, ref_logprobs, entropy, kl, statistics, *args
):  # fmt: skip
    *args, needs_hidden, needs_weight, needs_bias = args
    policy, reference = policy_and_reference(*args)
    known = Statistics(*contiguous(logprobs, entropy, statistics, ref_logprobs, kl))
    row_grads = RowGrads(grad_logprobs.contiguous(), grad_entropy.contiguous(), grad_kl.contiguous())
    needs_grad = (needs_hidden, needs_weight, needs_bias)
    return head.compute_input_grads(policy, known, row_grads, needs_grad, reference)
