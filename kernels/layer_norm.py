"""LayerNorm of rows, which also adds them to the residual stream in the same pass over memory."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _norm
from rlhf_fast.kernels._launch import data_ptrs, dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import contiguous, copy_back, detached, matrix_shape, upcast


@op(fake=_norm.fake, mutates=("residual",))
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor:
    """Return the layer norm of x, in its shape (..., D) and dtype.

        out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias

    (Ba et al. 2016, arXiv 1607.06450.) Statistics are float32, the variance from distances to the mean; the result is
    rounded once.

        weight, bias (D,), of any floating dtype
        residual (..., D), in x's dtype: residual += x in place, and the rounded sum is normalized instead of x

    No gradient: for inference.

    Raises ValueError where shapes or dtypes differ.
    """
    if residual is not None:
        x = residual.add_(x)
    y = upcast(x)
    y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * upcast(weight)
    return (y if bias is None else y + upcast(bias)).to(x.dtype)


@layer_norm.normalize
def _(x, weight, bias, eps, residual):
    _norm.check("layer_norm", x, {"weight": weight, "bias": bias}, residual)
    x, weight, bias, residual = detached((x, weight, bias, residual))
    return x, weight, bias, float(eps), residual


@layer_norm.compiled
def _(kernels, x, weight, bias, eps, residual):
    code, weight_code, bias_code = dtype_codes(kernels, x, weight, bias)
    if bias is not None and bias_code != weight_code:
        weight, bias, weight_code = weight.float(), bias.float(), 0
    x, weight, bias, dense_residual = contiguous(x, weight, bias, residual)
    out = _norm.fake(x)
    kernels.layer_norm(
        x.data_ptr(), code, *data_ptrs(weight, bias), weight_code, *data_ptrs(dense_residual, out),
        *matrix_shape(x), eps, stream_or_threads(x),
    )  # fmt: skip
    copy_back(dense_residual, residual)
    return out


@layer_norm.inputs(
    small_sizes=[
        {"shape": (1, 1)},
        {"shape": (3, 17), "residual": True, "mean": 8.0},
        {"shape": (2, 3, 64), "bias": False, "weight_dtype": torch.float32},
        {"shape": (5, 1031), "residual": True, "weight_dtype": torch.bfloat16},
        {"shape": (0, 8), "residual": True},
    ],
    large_sizes=[{"shape": (32, 768), "residual": True}, {"shape": (2048, 4096), "residual": True}],
)
def _(shape, device, dtype, residual=False, bias=True, mean=0.0, weight_dtype=None):
    x = (mean + torch.randn(shape, device=device)).to(dtype)
    weight = torch.randn(shape[-1], device=device, dtype=weight_dtype or dtype)
    shift = torch.randn(shape[-1], device=device, dtype=dtype) if bias else None
    return x, weight, shift, 1e-5, torch.randn_like(x) if residual else None
