"""LayerNorm of rows, with its gradients, which also adds them to the residual stream in the same pass over memory."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _norm
from rlhf_fast.kernels._launch import data_ptrs, dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import as_float, contiguous, copy_back, detached, matrix_shape, upcast


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

    Gradients: x, weight and bias, in their dtypes; of the last two summed in float32 and rounded once. With a residual
    there is none.

    Raises ValueError where shapes or dtypes differ, one is not floating point, or a gradient is asked for with a
    residual.
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
    return x, weight, bias, as_float(eps), residual


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


def _fake_gradients(_grad, _residual_grad, x, weight, bias, _eps, *needs):
    vectors = weight, weight if bias is None else bias
    return _norm.empty_gradients(x, *zip(vectors, needs, strict=True))


@op(fake=_fake_gradients)
def layer_norm_backward(
    grad: Tensor, residual_grad: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    needs_weight_grad: bool, needs_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, weight and bias, (0,) for one of the last two that is not needed, given that of the
    output. residual_grad: the gradient that x has from the residual stream, which is added before the one rounding."""
    y, scaled = upcast(x), upcast(grad) * upcast(weight)
    y = y - y.mean(-1, keepdim=True)
    inverse = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y * inverse
    x_grad = inverse * (scaled - scaled.mean(-1, keepdim=True) - y * (scaled * y).mean(-1, keepdim=True))
    x_grad = x_grad if residual_grad is None else x_grad + upcast(residual_grad)
    weight_grad = _norm.sum_rows(upcast(grad) * y, weight, needs_weight_grad)
    bias_grad = _norm.sum_rows(upcast(grad), weight if bias is None else bias, needs_bias_grad)
    return x_grad.to(x.dtype).contiguous(), weight_grad, bias_grad


@layer_norm_backward.compiled
def _(kernels, grad, residual_grad, x, weight, bias, eps, needs_weight_grad, needs_bias_grad):
    code, weight_code, bias_code = dtype_codes(kernels, x, weight, bias)
    needs = needs_weight_grad, needs_bias_grad
    x_grad, weight_grad, bias_grad = _fake_gradients(grad, residual_grad, x, weight, bias, eps, *needs)
    grad, residual_grad, x, weight = contiguous(grad, residual_grad, x, weight)
    sums = _norm.empty_sums(x, 2, kernels.layer_norm_block_rows) if any(needs) else None
    kernels.layer_norm_backward(
        *data_ptrs(x, grad, residual_grad), code, weight.data_ptr(), weight_code, x_grad.data_ptr(),
        *data_ptrs(*(g if needed else None for g, needed in zip((weight_grad, bias_grad), needs, strict=True))),
        bias_code, *data_ptrs(sums), *matrix_shape(x), eps, stream_or_threads(x),
    )  # fmt: skip
    return x_grad, weight_grad, bias_grad


def _setup_context(ctx, inputs, _output):
    x, weight, bias, ctx.eps, residual = inputs
    ctx.save_for_backward(x if residual is None else residual, weight, bias)


def _backward(ctx, grad, residual_grad=None):
    needs_x_grad, *needs = ctx.needs_input_grad[:3]
    x_grad, *sums = layer_norm_backward(grad, residual_grad, *ctx.saved_tensors, ctx.eps, *needs)
    sums = [g if needed else None for g, needed in zip(sums, needs, strict=True)]
    return x_grad if needs_x_grad else None, *sums, None, None


layer_norm.gradient(_backward, wrt=("x", "weight", "bias"), setup_context=_setup_context)


@layer_norm.cost
def _(gradient, x, weight, bias, eps, residual):
    return _norm.cost(gradient, x, residual, weight, bias)


SMALL = [
    {"shape": (1, 1)},
    {"shape": (3, 17), "mean": 8.0},
    {"shape": (2, 3, 64), "bias": False, "weight_dtype": torch.float32},
    {"shape": (70, 65), "weight_dtype": torch.bfloat16},
    {"shape": (0, 8)},
]
WITH_RESIDUAL = [
    {"shape": (3, 17), "residual": True, "mean": 8.0},
    {"shape": (5, 1031), "residual": True, "weight_dtype": torch.bfloat16},
    {"shape": (0, 8), "residual": True},
]
LARGE = [{"shape": (2048, 4096)}]


@layer_norm.inputs(
    small_sizes=SMALL[:2] + WITH_RESIDUAL[:1] + SMALL[2:] + WITH_RESIDUAL[1:],
    large_sizes=[{"shape": (32, 768), "residual": True}, {"shape": (2048, 4096), "residual": True}, *LARGE],
)
def _make_inputs(shape, device, dtype, residual=False, bias=True, mean=0.0, weight_dtype=None):
    x = (mean + torch.randn(shape, device=device)).to(dtype)
    weight = torch.randn(shape[-1], device=device, dtype=weight_dtype or dtype)
    shift = torch.randn(shape[-1], device=device, dtype=dtype) if bias else None
    if residual:
        return x, weight, shift, 1e-5, torch.randn_like(x)
    for tensor in (x, weight, shift):
        if tensor is not None:
            tensor.requires_grad_()
    return x, weight, shift, 1e-5, None


@layer_norm_backward.inputs(small_sizes=SMALL + WITH_RESIDUAL, large_sizes=LARGE)
def _(**size):
    x, weight, bias, eps, residual = detached(_make_inputs(**size))
    return torch.randn_like(x), residual, x, weight, bias, eps, True, bias is not None
