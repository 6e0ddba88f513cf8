"""GELU, exact or approximated by the hyperbolic tangent, with its gradient."""

import math

import torch
from torch import Tensor

from rlhf_fast.kernels._launch import data_ptrs, dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import contiguous, detached, empty_contiguous, upcast


def _fake(x, *_rest):
    return empty_contiguous(x)


@op(fake=_fake)
def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Return the GELU of x, in its shape and dtype.

        "none": x Phi(x), where Phi is the normal distribution function
        "tanh": x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, as in GPT-2

    (Hendrycks and Gimpel 2016, arXiv 1606.08415.) It is computed in float32 and rounded once. Gradient: x.

    Raises ValueError where `approximate` is another word.
    """
    return torch.nn.functional.gelu(upcast(x), approximate=approximate).to(x.dtype)


@gelu.normalize
def _(x, approximate):
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    if not x.is_floating_point() or x.is_nested:
        kind = "a nested tensor" if x.is_nested else x.dtype
        raise ValueError(f"gelu: x must be floating point and dense, got {kind}")
    return x, approximate


@gelu.compiled
def _(kernels, x, approximate):
    (code,) = dtype_codes(kernels, x)
    x = x.contiguous()
    out = torch.empty_like(x)
    kernels.gelu(x.data_ptr(), code, out.data_ptr(), x.numel(), approximate == "tanh", stream_or_threads(x))
    return out


@op(fake=_fake)
def gelu_backward(x: Tensor, grad: Tensor, approximate: str) -> Tensor:
    """Return the gradient of x, in its dtype, given that of the output."""
    v = upcast(x)
    if approximate == "tanh":
        t = torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))
        inner_grad = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * v.square())
        derivative = 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * inner_grad
    else:
        density = torch.exp(-0.5 * v.square()) / math.sqrt(2 * math.pi)
        derivative = 0.5 * torch.special.erfc(-v / math.sqrt(2)) + v * density
    return (upcast(grad) * derivative).to(x.dtype).contiguous()


@gelu_backward.compiled
def _(kernels, x, grad, approximate):
    (code,) = dtype_codes(kernels, x)
    out = _fake(x)
    x, grad = contiguous(x, grad)
    is_tanh = approximate == "tanh"
    kernels.gelu_backward(*data_ptrs(grad, x), code, out.data_ptr(), x.numel(), is_tanh, stream_or_threads(x))
    return out


def _setup_context(ctx, inputs, _output):
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    (x,) = ctx.saved_tensors
    return gelu_backward(x, grad, ctx.approximate), None


gelu.gradient(_backward, wrt=("x",), setup_context=_setup_context)


@gelu.cost
def _(gradient, x, _approximate):
    return (5 if gradient else 2) * x.nbytes, 0.0


SMALL = [
    {"shape": ()},
    {"shape": (3, 17), "spread": 6.0},
    {"shape": (2, 3, 65), "approximate": "tanh", "spread": 6.0},
    {"shape": (4, 5000)},
    {"shape": (0, 5)},
]


@gelu.inputs(small_sizes=SMALL, large_sizes=[{"shape": (32, 3072)}, {"shape": (2048, 3072)}])
def _make_inputs(shape, device, dtype, approximate="none", spread=1.0):
    return (spread * torch.randn(shape, device=device, dtype=dtype)).requires_grad_(), approximate


@gelu_backward.inputs(
    small_sizes=SMALL, large_sizes=[{"shape": (2048, 3072)}, {"shape": (2048, 3072), "approximate": "tanh"}]
)
def _(**size):
    x, approximate = detached(_make_inputs(**size))
    return x, torch.randn_like(x), approximate
