"""gelu and its gradient on a GPU: one program per tile of BLOCK elements, about 30 instructions each, no library's erf.

Floor: one read and one write of every element; of the gradient one more read. Elements are independent, so the result
does not depend on the tiles.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._tensors import contiguous
from rlhf_fast.kernels.triton import launch

BLOCK = 1024


@triton.jit
def scaled_erfc(a):
    """Return erfc(a) e^(a^2) for a >= 0 as t p(t), t = 1 / (1 + 0.4 a). p is fitted for a <= 9.5, within 6e-8 of the
    value."""
    t = 1.0 / (a * 0.4 + 1.0)
    p = t * 0.040267765522003174 - 0.1354723870754242
    p = p * t + 0.0738447904586792
    p = p * t + 0.0997265949845314
    p = p * t + 0.07151034474372864
    p = p * t + 0.1969621777534485
    p = p * t + 0.20095880329608917
    p = p * t + 0.22657568752765656
    p = p * t + 0.22562630474567413
    return p * t


@triton.jit
def gelu_erf(x):
    """Return x Phi(x). For x < 0, where 1 + erf would cancel, the tail is computed itself. Below -13 it is 0 in
    float32."""
    a = tl.minimum(tl.abs(x), 13.2)
    tail = tl.exp(a * a * -0.5) * scaled_erfc(a * 0.70710678) * 0.5
    y = x * tl.where(x < 0, tail, 1.0 - tail)
    return tl.where(x < -13.0, 0.0, y)


@triton.jit
def gelu_tanh(x):
    """Return x (1 + tanh(u)) / 2, computed as x / (1 + e^(-2u))."""
    return x / (tl.exp(x * (x * x * 0.044715 + 1.0) * -1.5957691216) + 1.0)


@triton.jit
def gelu_kernel(x, out, N, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """Store GELU of the program's tile."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    inside = offset < N - start
    v = tl.load(x + start + offset, mask=inside, other=0.0).to(tl.float32)
    if TANH:
        y = gelu_tanh(v)
    else:
        y = gelu_erf(v)
    tl.store(out + start + offset, launch.cast(y, out.dtype.element_ty), mask=inside)


def gelu(x, approximate):
    launch.require_dtypes(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    meta = {"TANH": approximate == "tanh", "BLOCK": BLOCK, "num_warps": launch.num_warps_for(BLOCK, 8)}
    launch.run(gelu_kernel, (triton.cdiv(x.numel(), BLOCK),), x, out, x.numel(), **meta)
    return out


@triton.jit
def gelu_erf_derivative(x):
    """Return Phi(x) + x phi(x), phi the density; beyond 13.2 it is 0 or 1."""
    v = launch.clamp(x, -13.2, 13.2)
    a = tl.abs(v)
    e = tl.exp(a * a * -0.5)
    tail = e * scaled_erfc(a * 0.70710678) * 0.5
    y = tl.where(v < 0, tail, 1.0 - tail) + v * 0.39894228 * e
    return tl.where(x < -13.2, 0.0, y)


@triton.jit
def gelu_tanh_derivative(x):
    """Return s + x s (1 - s) u' with s = 1 / (1 + e^-u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3). Beyond 12 it is 0 or 1;
    s (1 - s) is computed from e^-|u|, which is at most 1."""
    v = launch.clamp(x, -12.0, 12.0)
    square = v * v
    e = tl.exp(-tl.abs(v * (square * 0.044715 + 1.0) * 1.5957691216))
    s = 1.0 / (e + 1.0)
    tail = e * s
    exponent_grad = (square * 0.134145 + 1.0) * 1.5957691216
    return tl.where(v < 0, tail, s) + v * (tail * s) * exponent_grad


@triton.jit
def gelu_backward_kernel(x, grad, out, N, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """Store the gradient of the program's tile."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    inside = offset < N - start
    v = tl.load(x + start + offset, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + start + offset, mask=inside, other=0.0).to(tl.float32)
    if TANH:
        y = g * gelu_tanh_derivative(v)
    else:
        y = g * gelu_erf_derivative(v)
    tl.store(out + start + offset, launch.cast(y, out.dtype.element_ty), mask=inside)


def gelu_backward(x, grad, approximate):
    launch.require_dtypes(x)
    x, grad = contiguous(x, grad)
    out = torch.empty_like(x)
    meta = {"TANH": approximate == "tanh", "BLOCK": BLOCK, "num_warps": launch.num_warps_for(BLOCK, 8)}
    launch.run(gelu_backward_kernel, (triton.cdiv(x.numel(), BLOCK),), x, grad, out, x.numel(), **meta)
    return out
