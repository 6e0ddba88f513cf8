"""linear_logprobs on a GPU: X W' and the statistics of its rows, chunk by chunk. _head.py has the products, the floor
and the picture.

Floor: forward one product, and 4 + 4 bytes per logit. Backward computes the logits again, then dX and dW.
"""

import torch

from rlhf_fast.kernels._tensors import contiguous
from rlhf_fast.kernels.triton import _head as head
from rlhf_fast.kernels.triton._logits import RowGrads, Statistics


def linear_logprobs(*args):
    return linear_logprobs_with_statistics(*args)[:4]


def linear_logprobs_with_statistics(*args):
    out = head.compute_head_statistics(head.GpuHead("linear_logprobs", *args), has_log_z=True)
    return out.logprobs, out.entropy, out.log_z, out.top1.view(torch.bool), out.sums


def linear_logprobs_backward(grad_logprobs, grad_entropy, grad_log_z, logprobs, entropy, statistics, *args):
    *args, needs_hidden, needs_weight, needs_bias = args
    known = Statistics(*contiguous(logprobs, entropy, statistics), None, None)
    row_grads = RowGrads(grad_logprobs.contiguous(), grad_entropy.contiguous(), log_z=grad_log_z.contiguous())
    policy = head.GpuHead("linear_logprobs", *args)
    return head.compute_input_grads(policy, known, row_grads, (needs_hidden, needs_weight, needs_bias))
