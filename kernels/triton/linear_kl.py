"""linear_kl on a GPU: the products of both heads, chunk by chunk, and one kernel that reads the logits of both, for the
statistics and, backward, with four numbers a row, for the gradient; _head.py says how.

Forward two products, and 8 + 8 bytes a logit. Backward both logits once more, then dX and dW.
"""

from rlhf_fast.kernels.triton import _head as head
from rlhf_fast.kernels.triton import _logits as rows


def _heads(hidden, weight, ref_hidden, ref_weight, targets, temperature, softcap, bias, ref_bias):
    scalars = temperature, softcap
    policy = head.Head("linear_kl", hidden, weight, targets, bias, *scalars)
    return policy, head.Head("linear_kl", ref_hidden, ref_weight, targets, ref_bias, *scalars)


def linear_kl(*args):
    return linear_kl_with_statistics(*args)[:4]


def linear_kl_with_statistics(*args):
    logprobs, entropy, statistics, ref_logprobs, kl = head.statistics(*_heads(*args))
    return logprobs, ref_logprobs, entropy, kl, statistics


def linear_kl_backward(grad_logprobs, grad_entropy, grad_kl, entropy, kl, statistics, *args):
    *args, by_hidden, by_weight, by_bias = args
    of, reference = _heads(*args)
    known = rows.Results(None, entropy.contiguous(), statistics.contiguous(), None, kl.contiguous())
    slopes = grad_logprobs.contiguous(), grad_entropy.contiguous(), grad_kl.contiguous()
    return head.gradients(of, known, slopes, (by_hidden, by_weight, by_bias), reference)
