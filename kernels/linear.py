"""A linear layer, x W' + b, with its gradients: in float32 on the CPU, and in the order of sums of the decode step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.kernels import linear_sample_tokens
from rlhf_fast.kernels._launch import Unsupported, data_ptrs, require_dtypes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._product import f32_product, has_bf16_product, has_f32_product
from rlhf_fast.kernels._tensors import as_matrix, detached, empty_float32, upcast


def _fake(x, weight, *_rest):
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


def is_transposed(weight: Tensor) -> bool:
    """Return whether weight (out, in) is the transpose of a row-major matrix."""
    return weight.stride(1) != 1 and weight.stride(0) == 1


@op(fake=_fake)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, decode_order: bool = False) -> Tensor:
    """Return x W' + b, in the shape (..., out) and the dtype of x.

        x (..., in), in the dtype of weight or in float32; a product may round it to the former
        weight (out, in), row-major, or the transpose of a row-major matrix, as GPT-2's are
        bias (out,), in the dtype of weight
        decode_order: sum in the order of the CPU's compiled decode step, for x in float32: a row then has the bits that
            it has there

    Sums are in float32. On a CPU with AVX2 a row's bits depend on that row and the weight alone, for weights in float32
    and in decode_order; else it is torch's product. Gradients: x, weight and bias, in their dtypes.

    Raises ValueError where shapes or dtypes do not fit.
    """
    if x.dtype == weight.dtype:
        return F.linear(x, weight, bias)
    out = upcast(x.to(weight.dtype)) @ upcast(weight).t()
    return (out if bias is None else out + upcast(bias)).to(x.dtype)


@linear.normalize
def _(x, weight, bias, decode_order):
    if not x.dim() or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not weight.is_floating_point():
        given = f"{list(x.shape)} and {weight.dtype} {list(weight.shape)}"
        raise ValueError(f"linear: x must be (..., in), weight (out, in) and floating point, got {given}")
    if x.dtype not in (weight.dtype, torch.float32):
        raise ValueError(f"linear: x must have weight's dtype, {weight.dtype}, or float32, got {x.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        rule = f"linear: bias must be {weight.dtype} of shape ({weight.shape[0]},)"
        raise ValueError(f"{rule}, got {bias.dtype} {list(bias.shape)}")
    return x, weight, bias, bool(decode_order)


@linear.compiled(devices=("cpu",))
def _(kernels, x, weight, bias, decode_order):
    _require_float32(kernels, x, weight, decode_order)
    out, weight = _fake(x, weight), _dense(weight)
    x, bias = as_matrix(x), None if bias is None else bias.contiguous()
    if decode_order:
        _decode_product(kernels, x, weight, bias, out)
    else:
        f32_product(kernels, x, weight.t(), out.view(-1, len(weight)), bias)
    return out


def _require_float32(kernels, x: Tensor, weight: Tensor, decode_order: bool) -> None:
    """Raise Unsupported for what torch multiplies."""
    require_dtypes(x, weight)
    if x.dtype != torch.float32:
        raise Unsupported(f"torch multiplies {str(x.dtype)[6:]}")
    if not decode_order and weight.dtype != torch.float32:
        raise Unsupported("it multiplies bfloat16 weights in decode_order alone")
    if not decode_order and not has_f32_product(kernels):
        raise Unsupported("torch's product is faster on a processor without AVX2")


def _dense(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 or is_transposed(weight) else weight.contiguous()


def _decode_product(kernels, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    mode, transposed, is_bf16 = linear_sample_tokens.BF16_DOT, is_transposed(weight), weight.dtype == torch.bfloat16
    uses_bf16 = is_bf16 and not transposed and (mode == 2 or (mode == 1 and has_bf16_product(kernels)))
    x_bf16 = x.bfloat16() if uses_bf16 else None
    threads, size = stream_or_threads(x), max(kernels.decode_product_panel, 4 * x.shape[1])
    panels = empty_float32(x, threads, size) if is_bf16 and not uses_bf16 else None
    kernels.decode_product(
        *data_ptrs(x, x_bf16), x.stride(0), *data_ptrs(weight, bias), is_bf16, weight.stride(1 if transposed else 0),
        transposed, out.data_ptr(), len(x), *weight.shape, mode == 2, 0 if panels is None else panels.data_ptr(), size,
        threads,
    )  # fmt: skip


def _fake_gradients(_grad, x, weight, needs_x, needs_weight, needs_bias):
    def empty(needed, *shape):
        return torch.empty(shape if needed else 0, dtype=weight.dtype, device=x.device)

    w_grad = empty(needs_weight, *weight.t().shape).t() if is_transposed(weight) else empty(needs_weight, *weight.shape)
    x_grad = torch.empty(x.shape if needs_x else 0, dtype=x.dtype, device=x.device)
    return x_grad, w_grad, empty(needs_bias, weight.shape[0])


@op(fake=_fake_gradients)
def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, (0,) where one is not needed, given that of the output."""
    grads = _fake_gradients(grad, x, weight, needs_x, needs_weight, needs_bias)
    grad, rows = grad.reshape(-1, len(weight)).to(weight.dtype), x.reshape(-1, weight.shape[1]).to(weight.dtype)
    if needs_x:
        grads[0].copy_((grad @ weight).view(x.shape))
    if needs_weight:
        grads[1].copy_(grad.t() @ rows)
    if needs_bias:
        grads[2].copy_(grad.sum(0))
    return grads


@linear_backward.compiled(devices=("cpu",))
def _(kernels, grad, x, weight, needs_x, needs_weight, needs_bias):
    if weight.dtype != torch.float32 or grad.dtype != torch.float32 or not has_f32_product(kernels):
        raise Unsupported("torch multiplies bfloat16, and float32 on a processor without AVX2")
    grads = _fake_gradients(grad, x, weight, needs_x, needs_weight, needs_bias)
    weight, x, grad = _dense(weight), as_matrix(x), as_matrix(grad)
    if needs_x:
        f32_product(kernels, grad, weight, grads[0].view(-1, weight.shape[1]))
    if needs_weight and is_transposed(grads[1]):
        f32_product(kernels, x.t(), grad, grads[1].t())
    elif needs_weight:
        f32_product(kernels, grad.t(), x, grads[1])
    if needs_bias:
        torch.sum(grad, 0, out=grads[2])
    return grads


def _setup_context(ctx, inputs, _output):
    x, weight = inputs[:2]
    ctx.dtype = x.dtype
    ctx.save_for_backward(x if x.dtype == weight.dtype else x.to(weight.dtype), weight)


def _backward(ctx, grad):
    needed = ctx.needs_input_grad[:3]
    grads = linear_backward(grad, *ctx.saved_tensors, *needed)
    x_grad, *others = (g if is_needed else None for g, is_needed in zip(grads, needed, strict=True))
    return None if x_grad is None else x_grad.to(ctx.dtype), *others, None


linear.gradient(_backward, wrt=("x", "weight", "bias"), setup_context=_setup_context)


@linear.cost
def _(gradient, x, weight, bias, decode_order):
    out = x.nbytes // max(x.shape[-1], 1) * weight.shape[0]
    passes = 3 if gradient else 1
    return passes * (x.nbytes + weight.nbytes + out), passes * 2.0 * x.numel() * weight.shape[0]


SMALL = [
    {"shape": (1, 1), "out": 1},
    {"shape": (17, 65), "out": 33, "bias": True},
    {"shape": (2, 5, 200), "out": 66, "transposed": True, "bias": True},
    {"shape": (70, 130), "out": 48, "decode_order": True},
    {"shape": (3, 40), "out": 9, "decode_order": True, "bias": True, "transposed": True},
    {"shape": (0, 8), "out": 3, "bias": True},
]


@linear.inputs(
    small_sizes=SMALL,
    large_sizes=[{"shape": (640, 576), "out": 1536}, {"shape": (640, 576), "out": 1536, "decode_order": True}],
)
def _make_inputs(shape, out, device, dtype, bias=False, transposed=False, decode_order=False):
    x = torch.randn(shape, device=device, dtype=dtype)
    x = x.float() if decode_order else x
    weight = torch.randn(shape[-1], out, device=device, dtype=dtype).t() if transposed else None
    weight = torch.randn(out, shape[-1], device=device, dtype=dtype) if weight is None else weight
    b = torch.randn(out, device=device, dtype=dtype).requires_grad_() if bias else None
    return x.requires_grad_(), weight.requires_grad_(), b, decode_order


@linear_backward.inputs(small_sizes=SMALL[:4] + SMALL[5:], large_sizes=[{"shape": (640, 576), "out": 1536}])
def _(**size):
    x, weight, bias, _ = detached(_make_inputs(**size))
    x = x.to(weight.dtype)
    return torch.randn_like(x[..., :1].expand(*x.shape[:-1], len(weight))), x, weight, True, True, bias is not None
