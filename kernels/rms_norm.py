"""RMSNorm of rows, with its gradients, which also adds them to the residual stream in the same pass over memory."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _norm
from rlhf_fast.kernels._launch import data_ptrs, dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import as_float, contiguous, copy_back, detached, matrix_shape, upcast


@op(fake=_norm.fake, mutates=("residual",))
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor:
    """Return the RMS norm of x, in its shape (..., D) and dtype.

        out = x / sqrt(mean(x^2) + eps) * (weight + offset)

    (Zhang and Sennrich 2019, arXiv 1910.07467.) Statistics are float32; the result is rounded once.

        weight (D,), of any floating dtype; offset: 1 for Gemma's checkpoints, whose weights are stored less 1
        residual (..., D), in x's dtype: residual += x in place, and the rounded sum is normalized instead of x

    Gradients: x and weight, in their dtypes; of the weight summed in float32 and rounded once. With a residual there is
    none.

    Raises ValueError where shapes or dtypes differ, one is not floating point, or a gradient is asked for with a
    residual.
    """
    if residual is not None:
        x = residual.add_(x)
    y = upcast(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * (upcast(weight) + offset)).to(x.dtype)


@rms_norm.normalize
def _(x, weight, eps, residual, offset):
    _norm.check("rms_norm", x, {"weight": weight}, residual)
    return x, weight, as_float(eps), residual, as_float(offset)


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


def _fake_gradients(_grad, _residual_grad, x, weight, _eps, _offset, needs_weight_grad):
    return _norm.empty_gradients(x, (weight, needs_weight_grad))


@op(fake=_fake_gradients)
def rms_norm_backward(
    grad: Tensor, residual_grad: Tensor | None, x: Tensor, weight: Tensor, eps: float, offset: float,
    needs_weight_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x and of weight, (0,) where that is not needed, given that of the output. residual_grad:
    the gradient that x has from the residual stream, which is added before the one rounding."""
    y, scaled = upcast(x), upcast(grad) * (upcast(weight) + offset)
    inverse = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y * inverse
    x_grad = inverse * (scaled - y * (scaled * y).mean(-1, keepdim=True))
    weight_grad = _norm.sum_rows(upcast(grad) * y, weight, needs_weight_grad)
    x_grad = x_grad if residual_grad is None else x_grad + upcast(residual_grad)
    return x_grad.to(x.dtype).contiguous(), weight_grad


@rms_norm_backward.compiled
def _(kernels, grad, residual_grad, x, weight, eps, offset, needs_weight_grad):
    code, weight_code = dtype_codes(kernels, x, weight)
    x_grad, weight_grad = _fake_gradients(grad, residual_grad, x, weight, eps, offset, needs_weight_grad)
    grad, residual_grad, x, weight = contiguous(grad, residual_grad, x, weight)
    N, D = matrix_shape(x)
    sums = _norm.empty_sums(x, 1, kernels.rms_norm_block_rows) if needs_weight_grad else None
    kernels.rms_norm_backward(
        *data_ptrs(x, grad, residual_grad), code, weight.data_ptr(), weight_code,
        *data_ptrs(x_grad, weight_grad, sums), N, D, eps, offset, stream_or_threads(x),
    )  # fmt: skip
    return x_grad, weight_grad


def _setup_context(ctx, inputs, _output):
    x, weight, ctx.eps, residual, ctx.offset = inputs
    ctx.save_for_backward(x if residual is None else residual, weight)


def _backward(ctx, grad, residual_grad=None):
    needs_weight_grad = ctx.needs_input_grad[1]
    x_grad, weight_grad = rms_norm_backward(
        grad, residual_grad, *ctx.saved_tensors, ctx.eps, ctx.offset, needs_weight_grad
    )
    return x_grad if ctx.needs_input_grad[0] else None, weight_grad if needs_weight_grad else None, None, None, None


rms_norm.gradient(_backward, wrt=("x", "weight"), setup_context=_setup_context)


@rms_norm.cost
def _(gradient, x, weight, eps, residual, offset):
    return _norm.cost(gradient, x, residual, weight)


SMALL = [
    {"shape": (1, 1), "eps": 0.1},  # with a small one the gradient of x is what rounding leaves of 1 - 1
    {"shape": (3, 17), "spread": 30.0},
    {"shape": (2, 3, 64), "offset": 1.0, "weight_dtype": torch.float32},
    {"shape": (70, 65), "weight_dtype": torch.bfloat16},
    {"shape": (0, 8)},
]
WITH_RESIDUAL = [
    {"shape": (3, 17), "residual": True, "spread": 30.0},
    {"shape": (5, 1031), "residual": True, "weight_dtype": torch.bfloat16},
    {"shape": (0, 8), "residual": True},
]
LARGE = [{"shape": (2048, 4096)}]


@rms_norm.inputs(
    small_sizes=SMALL[:2] + WITH_RESIDUAL[:1] + SMALL[2:] + WITH_RESIDUAL[1:],
    large_sizes=[{"shape": (32, 576), "residual": True}, {"shape": (2048, 4096), "residual": True}, *LARGE],
)
def _make_inputs(shape, device, dtype, residual=False, offset=0.0, spread=1.0, weight_dtype=None, eps=1e-6):
    x = spread * torch.randn(shape, device=device, dtype=dtype)
    weight = torch.randn(shape[-1], device=device, dtype=weight_dtype or dtype)
    if residual:
        return x, weight, eps, torch.randn_like(x), offset
    return x.requires_grad_(), weight.requires_grad_(), eps, None, offset


@rms_norm_backward.inputs(small_sizes=SMALL + WITH_RESIDUAL, large_sizes=LARGE)
def _(**size):
    x, weight, eps, residual, offset = detached(_make_inputs(**size))
    return torch.randn_like(x), residual, x, weight, eps, offset, True
