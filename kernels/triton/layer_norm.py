"""layer_norm on a GPU: _norm.py has the kernel, its floor and its mapping."""

from rlhf_fast.kernels.triton._norm import normalize


def layer_norm(x, weight, bias, eps, residual):
    return normalize(x, weight, bias, residual, eps, 0.0, is_centered=True)
