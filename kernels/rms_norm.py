"""RMSNorm of rows, which also adds them to the residual stream in the same pass over memory."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _norm
from rlhf_fast.kernels._launch import data_ptrs, dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import contiguous, copy_back, detached, matrix_shape, upcast


@op(fake=_norm.fake, mutates=("residual",))
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor:
    """Return the RMS norm of x, in its shape (..., D) and dtype.

        out = x / sqrt(mean(x^2) + eps) * (weight + offset)

    (Zhang and Sennrich 2019, arXiv 1910.07467.) Statistics are float32; the result is rounded once.

        weight (D,), of any floating dtype; offset: 1 for Gemma's checkpoints, whose weights are stored less 1
        residual (..., D), in x's dtype: residual += x in place, and the rounded sum is normalized instead of x

    No gradient: for inference.

    Raises ValueError where shapes or dtypes differ.
    """
    if residual is not None:
        x = residual.add_(x)
    y = upcast(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * (upcast(weight) + offset)).to(x.dtype)


@rms_norm.normalize
def _(x, weight, eps, residual, offset):
    _norm.check("rms_norm", x, {"weight": weight}, residual)
    x, weight, residual = detached((x, weight, residual))
    return x, weight, float(eps), residual, float(offset)


@rms_norm.compiled
def _(kernels, x, weight, eps, residual, offset):
    code, weight_code = dtype_codes(kernels, x, weight)
    x, weight, dense_residual = contiguous(x, weight, residual)
    out = _norm.fake(x)
    kernels.rms_norm(
        x.data_ptr(), code, weight.data_ptr(), weight_code, *data_ptrs(dense_residual, out),
        *matrix_shape(x), eps, offset, stream_or_threads(x),
    )  # fmt: skip
    copy_back(dense_residual, residual)
    return out


@rms_norm.inputs(
    small_sizes=[
        {"shape": (1, 1)},
        {"shape": (3, 17), "residual": True, "spread": 30.0},
        {"shape": (2, 3, 64), "offset": 1.0, "weight_dtype": torch.float32},
        {"shape": (5, 1031), "residual": True, "weight_dtype": torch.bfloat16},
        {"shape": (0, 8), "residual": True},
    ],
    large_sizes=[{"shape": (32, 576), "residual": True}, {"shape": (2048, 4096), "residual": True}],
)
def _(shape, device, dtype, residual=False, offset=0.0, spread=1.0, weight_dtype=None):
    x = spread * torch.randn(shape, device=device, dtype=dtype)
    weight = torch.randn(shape[-1], device=device, dtype=weight_dtype or dtype)
    return x, weight, 1e-6, torch.randn_like(x) if residual else None, offset
