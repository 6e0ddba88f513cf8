"""layer_norm and its gradients on a GPU: _norm.py and _norm_backward.py have the kernels, their floors and mappings."""

from rlhf_fast.kernels._norm import empty_gradients
from rlhf_fast.kernels.triton._norm import normalize
from rlhf_fast.kernels.triton._norm_backward import norm_backward


def layer_norm(x, weight, bias, eps, residual):
    return normalize(x, weight, bias, residual, eps, 0.0, is_centered=True)


def layer_norm_backward(grad, residual_grad, x, weight, bias, eps, needs_weight_grad, needs_bias_grad):
    bias = weight if bias is None else bias
    grads = empty_gradients(x, (weight, needs_weight_grad), (bias, needs_bias_grad))
    norm_backward(grad, residual_grad, x, weight, eps, 0.0, grads, is_centered=True)
    return grads
