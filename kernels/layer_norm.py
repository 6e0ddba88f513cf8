"""LayerNorm of rows, and the residual stream that it reads, in one visit."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _row_ops as rows
from rlhf_fast.kernels._op import lane, op, wide


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
    y = wide(x)
    y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * wide(weight)
    return (y if bias is None else y + wide(bias)).to(x.dtype)


@layer_norm.arguments
def _(x, weight, bias, eps, residual):
    rows.check("layer_norm", x, {"weight": weight, "bias": bias}, residual)
    bias, residual = (t if t is None else t.detach() for t in (bias, residual))
    return x.detach(), weight.detach(), bias, float(eps), residual


@layer_norm.compiled
def _(kernels, x, weight, bias, eps, residual):
    code, weight_code, bias_code = rows.codes(kernels, x, weight, bias)
    if bias is not None and bias_code != weight_code:
        weight, bias, weight_code = weight.float(), bias.float(), 0
    x, weight, y = x.contiguous(), weight.contiguous(), _fake(x)
    bias, stream = (t if t is None else t.contiguous() for t in (bias, residual))
    kernels.layer_norm(
        x.data_ptr(), code, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), weight_code,
        0 if stream is None else stream.data_ptr(), y.data_ptr(), *rows.sizes(x), eps, lane(x),
    )  # fmt: skip
    rows.write_back(stream, residual)
    return y


@layer_norm.inputs(
    small=[
        {"shape": (1, 1)},
        {"shape": (3, 17), "residual": True, "mean": 8.0},
        {"shape": (2, 3, 64), "bias": False, "weight_dtype": torch.float32},
        {"shape": (5, 1031), "residual": True, "weight_dtype": torch.bfloat16},
        {"shape": (0, 8), "residual": True},
    ],
    large=[{"shape": (32, 768), "residual": True}, {"shape": (2048, 4096), "residual": True}],
)
def _(shape, device, dtype, residual=False, bias=True, mean=0.0, weight_dtype=None):
    x = (mean + torch.randn(shape, device=device)).to(dtype)
    weight = torch.randn(shape[-1], device=device, dtype=weight_dtype or dtype)
    shift = torch.randn(shape[-1], device=device, dtype=dtype) if bias else None
    return x, weight, shift, 1e-5, torch.randn_like(x) if residual else None
