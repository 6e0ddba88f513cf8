"""linear_logprobs on a GPU: X W' chunk by chunk, and the statistics of its rows; _head.py says how.

Forward one product, and 4 + 4 bytes a logit. Backward the logits once more, then dX and dW.
"""

from rlhf_fast.kernels.triton import _head as head
from rlhf_fast.kernels.triton import _logits as rows


def linear_logprobs(*args):
    return head.statistics(head.Head("linear_logprobs", *args))[:2]


def linear_logprobs_with_statistics(*args):
    return head.statistics(head.Head("linear_logprobs", *args))[:3]


def linear_logprobs_backward(grad_logprobs, grad_entropy, entropy, statistics, *args):
    *args, by_hidden, by_weight, by_bias = args
    known = rows.Results(None, entropy.contiguous(), statistics.contiguous(), None, None)
    slopes = grad_logprobs.contiguous(), grad_entropy.contiguous(), None
    return head.gradients(head.Head("linear_logprobs", *args), known, slopes, (by_hidden, by_weight, by_bias))
