"""layer_norm on a GPU: kernels/triton/_rows.py has the kernel."""

from rlhf_fast.kernels.triton._norm import norm


def layer_norm(x, weight, bias, eps, residual):
    return norm(x, weight, bias, residual, eps, 0.0, centered=True)
