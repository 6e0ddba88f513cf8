"""A linear layer, x W' + b, with its gradients; on request in the order of sums of the CPU's decode step."""

import functools
import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.kernels import _product
from rlhf_fast.kernels._launch import Unsupported, data_ptrs, require_dtypes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._product import f32_product
from rlhf_fast.kernels._tensors import as_flag, as_matrix, detached, empty_float32, matrix_shape, upcast

MAX_BF16_WEIGHT = 1 << 17
"""Elements of a weight in bfloat16. The gradients of a larger one are torch's products, which are faster there."""


def _fake(x, weight, _bias=None, transposed=False, _decode_order=False):
    return torch.empty((*x.shape[:-1], weight.shape[int(transposed)]), dtype=x.dtype, device=x.device)


@op(fake=_fake)
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False, decode_order: bool = False
) -> Tensor:
    """Return x W' + b, in the shape (..., out) and the dtype of x.

        x (..., in), in the dtype of weight, or in float32: a product may round it to the dtype of weight
        weight (out, in), or with `transposed` (in, out), as GPT-2's
        bias (out,), in the dtype of weight
        decode_order: for x in float32 on the CPU, sum in the order of the rollout's compiled decode step, so that a row
            has the bits that it has there

    Sums are in float32. On a CPU with AVX2 a row's bits depend on that row and the weight alone, if weight is
    float32 or in decode_order; all else is torch's product. Gradients: x, weight and bias, in their dtypes.

    Raises ValueError where shapes or dtypes do not fit.
    """
    if x.dtype == weight.dtype:
        return F.linear(x, weight.t() if transposed else weight, bias)
    out = upcast(x.to(weight.dtype)) @ upcast(weight if transposed else weight.t())
    return (out if bias is None else out + upcast(bias)).to(x.dtype)


@linear.normalize
def _(x, weight, bias, transposed, decode_order):
    if (
        not x.dim()
        or weight.dim() != 2
        or not weight.is_floating_point()
        or weight.shape[not transposed] != x.shape[-1]
    ):
        form = "(in, out)" if transposed else "(out, in)"
        given = f"{list(x.shape)} and {weight.dtype} {list(weight.shape)}"
        raise ValueError(f"linear: x must be (..., in), weight {form} and floating point, got {given}")
    if x.dtype not in (weight.dtype, torch.float32):
        raise ValueError(f"linear: x must have weight's dtype, {weight.dtype}, or float32, got {x.dtype}")
    if bias is not None and (bias.shape != (weight.shape[int(transposed)],) or bias.dtype != weight.dtype):
        rule = f"linear: bias must be {weight.dtype} of shape ({weight.shape[int(transposed)]},)"
        raise ValueError(f"{rule}, got {bias.dtype} {list(bias.shape)}")
    return x, weight, bias, as_flag(transposed), as_flag(decode_order)


@linear.compiled(required_symbols=("f32_product", "decode_product"), devices=("cpu",))
def _(kernels, x, weight, bias, transposed, decode_order):
    require_dtypes(x, weight)
    is_bf16 = weight.dtype == torch.bfloat16
    if x.dtype != torch.float32 or (is_bf16 and not decode_order):
        raise Unsupported("torch multiplies bfloat16, but for decode_order")
    if not (x.numel() and weight.numel()):
        return linear.reference(x, weight, bias, transposed, decode_order)
    # transposed, the decode step has the same sums of chains
    if not is_bf16 and (not decode_order or (transposed and _product.is_fast(kernels))):
        out = _fake(x, weight, bias, transposed)
        x, weight, bias = as_matrix(x), as_matrix(weight), None if bias is None else bias.contiguous()
        f32_product(kernels, x, weight if transposed else weight.t(), out.view(-1, out.shape[-1]), bias)
        return out
    in_bf16 = is_bf16 and not transposed and _product.uses_bf16_product(kernels)
    rounded = torch.empty(x.shape, dtype=weight.dtype, device=x.device) if in_bf16 else None
    return _decode_product(kernels, x, weight, bias, transposed, in_bf16, rounded)


def _decode_product(kernels, x, weight, bias, transposed, in_bf16, rounded):
    """Return x W' + b in the decode step's order of sums, and write x to `rounded`, unless that is None, in bfloat16.
    in_bf16: multiply that."""
    out = _fake(x, weight, bias, transposed)
    x, weight, bias = as_matrix(x).contiguous(), as_matrix(weight), None if bias is None else bias.contiguous()
    threads, panel_floats = stream_or_threads(x), _panel_floats(kernels, x.shape[1])
    panels = empty_float32(x, threads, panel_floats)
    kernels.decode_product(
        *data_ptrs(x, rounded), in_bf16, *data_ptrs(weight, bias), weight.dtype == torch.bfloat16, weight.stride(0),
        transposed, out.data_ptr(), len(x), out.shape[-1], x.shape[1], _product.BF16_DOT == 2, panels.data_ptr(),
        panel_floats, threads,
    )  # fmt: skip
    return out


def _fake_with_rounded_input(x, weight, bias, transposed, _decode_order):
    return _fake(x, weight, bias, transposed), torch.empty(x.shape, dtype=weight.dtype, device=x.device)


@linear.variant(outputs=2, fake=_fake_with_rounded_input)
def linear_with_rounded_input(x, weight, bias, transposed, decode_order):
    """Return `linear`'s output, and x in the dtype of weight, which the gradients read. x is in float32."""
    return linear.reference(x, weight, bias, transposed, decode_order), x.to(weight.dtype, copy=True)


@linear_with_rounded_input.compiled(required_symbols=("decode_product",), devices=("cpu",))
def _(kernels, x, weight, bias, transposed, decode_order):
    require_dtypes(x, weight)
    if x.dtype != torch.float32 or weight.dtype != torch.bfloat16 or not decode_order:
        raise Unsupported("only decode_order rounds float32 to bfloat16")
    if not (x.numel() and weight.numel()):
        return linear_with_rounded_input.reference(x, weight, bias, transposed, decode_order)
    in_bf16 = not transposed and _product.uses_bf16_product(kernels)
    rounded = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    return _decode_product(kernels, x, weight, bias, transposed, in_bf16, rounded), rounded


@functools.cache
def _panel_floats(kernels: ModuleType, in_features: int) -> int:
    """Return the scratch memory that each thread needs."""
    size = torch.zeros(1, dtype=torch.int64, device="cpu")
    kernels.decode_product_panel(in_features, size.data_ptr())
    return int(size)


def _fake_gradients(grad, x, weight, transposed, needs_x, needs_weight, needs_bias):
    return (
        grad.new_empty(x.shape if needs_x else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(weight.shape[int(transposed)] if needs_bias else 0),
    )


@op(fake=_fake_gradients)
def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, transposed: bool, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, (0,) where one is not needed, given that of the output.

    x has the dtype of weight. grad has it too, or is in float32, and is rounded to it for the products. The gradient of
    x has the dtype of grad, the others that of weight.
    """
    g, rows = grad.reshape(matrix_shape(grad)).to(weight.dtype), x.reshape(matrix_shape(x))
    return (
        (g @ (weight.t() if transposed else weight)).view(x.shape).to(grad.dtype) if needs_x else grad.new_empty(0),
        (rows.t() @ g if transposed else g.t() @ rows) if needs_weight else weight.new_empty(0),
        g.sum(0) if needs_bias else weight.new_empty(0),
    )


@linear_backward.compiled(required_symbols=("f32_product", "bf16_linear_gradients"), devices=("cpu",))
def _(kernels, grad, x, weight, transposed, needs_x, needs_weight, needs_bias):
    require_dtypes(grad, x, weight)
    is_bf16 = weight.dtype == torch.bfloat16
    if x.dtype != weight.dtype or grad.dtype != torch.float32:
        raise Unsupported("torch multiplies bfloat16 by bfloat16")
    torchs = is_bf16 and (weight.numel() > MAX_BF16_WEIGHT or not _product.uses_bf16_product(kernels))
    if torchs or not (x.numel() and weight.numel()):
        return linear_backward.reference(grad, x, weight, transposed, needs_x, needs_weight, needs_bias)
    grads = _fake_gradients(grad, x, weight, transposed, needs_x, needs_weight, needs_bias)
    weight, x, grad = as_matrix(weight), as_matrix(x), as_matrix(grad)
    if is_bf16:
        _bf16_gradients(kernels, grad, x, weight, transposed, *(g if g.numel() else None for g in grads[:2]))
        if needs_bias:
            grads[2].copy_(grad.sum(0))
        return grads
    if needs_x:
        f32_product(kernels, grad, weight.t() if transposed else weight, grads[0].view(-1, x.shape[1]))
    if needs_weight:
        f32_product(kernels, *((x.t(), grad) if transposed else (grad.t(), x)), grads[1])
    if needs_bias:
        torch.sum(grad, 0, out=grads[2])
    return grads


def _bf16_gradients(kernels, grad, x, weight, transposed, x_grad, weight_grad):
    """Write the gradients that are not None: that of x in float32, that of weight in bfloat16."""
    N, width = len(x), len(weight)
    sizes = [0, 0, (grad.numel() + 1) // 2]
    if weight_grad is not None:
        sizes[:2] = weight.numel(), (N + 1) // 2 * width
    sums, pairs, grad_rows = empty_float32(x, sum(sizes)).split(sizes)  # the last two hold bfloat16
    kernels.bf16_linear_gradients(
        grad.data_ptr(), grad.stride(0), x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0), transposed,
        *data_ptrs(x_grad, weight_grad, grad_rows, pairs, sums), *x.shape, grad.shape[1], _product.BF16_DOT == 2,
        stream_or_threads(x),
    )  # fmt: skip


def _forward(ctx, x, weight, bias, transposed, decode_order):
    ctx.transposed = transposed
    if x.dtype == weight.dtype:
        out, rows = linear.run(x, weight, bias, transposed, decode_order), x
    else:
        out, rows = linear_with_rounded_input.run(x, weight, bias, transposed, decode_order)
    ctx.save_for_backward(rows, weight)
    return out


def _backward(ctx, grad):
    needed, (x, weight) = ctx.needs_input_grad[:3], ctx.saved_tensors
    has_kernel = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and grad.dtype == torch.float32)
    run = linear_backward if has_kernel else linear_backward.reference
    grads = run(grad, x, weight, ctx.transposed, *needed)
    return *(g if is_needed else None for g, is_needed in zip(grads, needed, strict=True)), None, None


linear.gradient(_backward, wrt=("x", "weight", "bias"), forward=_forward)


@linear.cost
def _(gradient, x, weight, bias, transposed, decode_order):
    out = weight.shape[int(transposed)] * math.prod(x.shape[:-1])
    passes = 3 if gradient else 1
    return passes * (x.nbytes + weight.nbytes + out * x.element_size()), passes * 2.0 * out * x.shape[-1]


SMALL = [
    {"shape": (1, 1), "out": 1},
    {"shape": (17, 65), "out": 33, "bias": True},
    {"shape": (2, 5, 200), "out": 66, "transposed": True, "bias": True},
    {"shape": (70, 130), "out": 48, "decode_order": True},
    {"shape": (13, 40), "out": 9, "decode_order": True, "bias": True, "transposed": True},
    {"shape": (0, 8), "out": 3, "bias": True},
    {"shape": (2, 5, 7), "out": 0},
]


@linear.inputs(
    small_sizes=SMALL,
    large_sizes=[{"shape": (640, 576), "out": 1536, "decode_order": order} for order in (False, True)],
)
def _make_inputs(shape, out, device, dtype, bias=False, transposed=False, decode_order=False):
    decode_order = decode_order or dtype == torch.bfloat16  # all else in bfloat16 is torch's product
    x = torch.randn(shape, device=device, dtype=dtype)
    x = x.float() if decode_order else x
    weight = torch.randn((shape[-1], out) if transposed else (out, shape[-1]), device=device, dtype=dtype)
    b = torch.randn(out, device=device, dtype=dtype).requires_grad_() if bias else None
    return x.requires_grad_(), weight.requires_grad_(), b, transposed, decode_order


@linear_with_rounded_input.inputs(small_sizes=SMALL, large_sizes=[])
def _(dtype, **size):
    del dtype  # x is in float32, the weight is not
    return detached(_make_inputs(dtype=torch.bfloat16, **size))


@linear_backward.inputs(small_sizes=SMALL, large_sizes=[{"shape": (640, 576), "out": 1536}])
def _(dtype, **size):
    x, weight, bias, transposed, _ = detached(_make_inputs(dtype=dtype, **size))
    grad = torch.randn(*x.shape[:-1], weight.shape[int(transposed)], device=x.device)
    return grad, x.to(weight.dtype), weight, transposed, True, True, bias is not None
