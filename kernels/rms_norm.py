"""RMSNorm of rows, and the residual stream that it reads, in one visit."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _norm
from rlhf_fast.kernels._launch import dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import copy_back, matrix_shape, upcast


def _fake(x, *rest):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@op(fake=_fake, mutates=("residual",))
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor:
    """x / sqrt(mean of x^2 + eps) * (weight + offset), in the shape (..., D) and dtype of x; weight (D,).

    (Zhang and Sennrich 2019, arXiv 1910.07467; offset = 1 is Gemma's.) Statistics in float32, the result rounded once.
    With `residual`, of the shape and dtype of x: residual += x in place, and the sum, as it was rounded, is what is
    normalised. ValueError where shapes differ. No gradient: for inference.
    """
    if residual is not None:
        x = residual.add_(x)
    y = upcast(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * (upcast(weight) + offset)).to(x.dtype)


@rms_norm.normalize
def _(x, weight, eps, residual, offset):
    _norm.check("rms_norm", x, {"weight": weight}, residual)
    residual = residual if residual is None else residual.detach()
    return x.detach(), weight.detach(), float(eps), residual, float(offset)


@rms_norm.compiled
def _(kernels, x, weight, eps, residual, offset):
    code, weight_code = dtype_codes(kernels, x, weight)
    x, weight, y = x.contiguous(), weight.contiguous(), _fake(x)
    stream = residual if residual is None else residual.contiguous()
    kernels.rms_norm(
        x.data_ptr(), code, weight.data_ptr(), weight_code, 0 if stream is None else stream.data_ptr(), y.data_ptr(),
        *matrix_shape(x), eps, offset, stream_or_threads(x),
    )  # fmt: skip
    copy_back(stream, residual)
    return y


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
