"""rms_norm and its gradients on a GPU: _norm.py and _norm_backward.py have the kernels, their floors and mappings."""

from rlhf_fast.kernels._norm import empty_gradients
from rlhf_fast.kernels.triton._norm import normalize
from rlhf_fast.kernels.triton._norm_backward import norm_backward


def rms_norm(x, weight, eps, residual, offset):
    return normalize(x, weight, None, residual, eps, offset, is_centered=False)


def rms_norm_backward(grad, residual_grad, x, weight, eps, offset, needs_weight_grad):
    grads = empty_gradients(x, (weight, needs_weight_grad))
    norm_backward(grad, residual_grad, x, weight, eps, offset, grads, is_centered=False)
    return grads
