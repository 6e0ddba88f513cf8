"""LayerNorm of rows, and the residual stream that it reads, in one visit."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _norm
from rlhf_fast.kernels._launch import dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import copy_back, matrix_shape, upcast


def _fake(x, *rest):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@op(fake=_fake, mutates=("residual",))
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in the shape (..., D) and dtype of x; weight and bias (D,).

    (Ba et al. 2016, arXiv 1607.06450.) Statistics in float32, the variance around the mean; the result rounded once.
    With `residual`, of the shape and dtype of x: residual += x in place, and the sum, as it was rounded, is what is
    normalised. ValueError where shapes differ. No gradient: for inference.
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
    bias, residual = (t if t is None else t.detach() for t in (bias, residual))
    return x.detach(), weight.detach(), bias, float(eps), residual


@layer_norm.compiled
def _(kernels, x, weight, bias, eps, residual):
    code, weight_code, bias_code = dtype_codes(kernels, x, weight, bias)
    if bias is not None and bias_code != weight_code:
        weight, bias, weight_code = weight.float(), bias.float(), 0
    x, weight, y = x.contiguous(), weight.contiguous(), _fake(x)
    bias, stream = (t if t is None else t.contiguous() for t in (bias, residual))
    kernels.layer_norm(
        x.data_ptr(), code, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), weight_code,
        0 if stream is None else stream.data_ptr(), y.data_ptr(), *matrix_shape(x), eps, stream_or_threads(x),
    )  # fmt: skip
    copy_back(stream, residual)
    return y


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
