"""Rotate the heads of a layer's queries or keys by their positions, with the gradient."""

import torch
from torch import Tensor

from rlhf_fast.kernels._launch import data_ptrs, dtype_codes, require_dtypes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._rope import rotate
from rlhf_fast.kernels._tensors import contiguous_float32, detached, empty_contiguous


def _fake(x, *_rest):
    return empty_contiguous(x)


@op(fake=_fake)
def rope(x: Tensor, cos: Tensor, sin: Tensor, num_rotated: int | None = None) -> Tensor:
    """Return x (N, H, d) with the first r dimensions of its heads rotated, in x's dtype, contiguous.

        x1, x2, rest = x[: r/2], x[r/2 : r], x[r :]        out = x1 cos - x2 sin, x2 cos + x1 sin, rest

    (Su et al. 2021, arXiv 2104.09864; dimensions are paired by halves, as in Llama and NeoX.)

        x (N, H, d): of any strides; heads that are contiguous are read in place, as from the rows of one projection
        cos, sin (N, r/2): of each token's position; r = 0 rotates nothing
        num_rotated: only the first so many heads are rotated, the others are copied, as the values behind the queries
            and keys of one projection; None: all

    It is computed in float32 and rounded once. Gradient: x, rotated back by the same kernel.

    Raises ValueError where shapes do not fit.
    """
    return torch.cat([rotate(x[:, :num_rotated], cos, sin).to(x.dtype), x[:, num_rotated:]], 1)


@rope.normalize
def _(x, cos, sin, num_rotated):
    fits = x.dim() == 3 and cos.dim() == 2 and cos.shape == sin.shape
    if not fits or cos.shape[0] != x.shape[0] or 2 * cos.shape[1] > x.shape[2]:
        shapes = [list(t.shape) for t in (x, cos, sin)]
        raise ValueError(f"rope: x (N, H, d), and cos and sin (N, r/2) with r <= d, must fit together, got {shapes}")
    if not all(t.is_floating_point() for t in (x, cos, sin)):
        dtypes = [str(t.dtype)[6:] for t in (x, cos, sin)]
        raise ValueError(f"rope: x, cos and sin must be floating point, got {dtypes}")
    num_rotated = x.shape[1] if num_rotated is None else num_rotated
    if not 0 <= num_rotated <= x.shape[1]:
        raise ValueError(f"rope: num_rotated must be 0 to {x.shape[1]}, the number of heads, got {num_rotated}")
    return x, *detached((cos, sin)), num_rotated


@rope.compiled
def _(kernels, x, cos, sin, num_rotated):
    require_dtypes(cos, sin)
    (code,) = dtype_codes(kernels, x)
    out = _fake(x)
    x = x if x.stride(2) == 1 else x.contiguous()
    cos, sin = contiguous_float32(cos, sin)
    kernels.rope(
        x.data_ptr(), *x.stride()[:2], code, *data_ptrs(cos, sin, out), *x.shape, cos.shape[1], num_rotated,
        stream_or_threads(x),
    )  # fmt: skip
    return out


def _setup_context(ctx, inputs, _output):
    _x, cos, sin, ctx.num_rotated = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad):
    cos, sin = ctx.saved_tensors
    return rope(grad, cos, -sin, ctx.num_rotated), None, None, None


rope.gradient(_backward, wrt=("x",), setup_context=_setup_context)


@rope.cost
def _(gradient, x, cos, sin, _num_rotated):
    return (1 + gradient) * (2 * x.nbytes + cos.nbytes + sin.nbytes), 0.0


@rope.inputs(
    small_sizes=[
        {"N": 1, "H": 1, "d": 2},
        {"N": 7, "H": 3, "d": 80, "r": 20, "parts": 3},
        {"N": 5, "H": 6, "d": 64, "num_rotated": 4},
        {"N": 3, "H": 4, "d": 33, "r": 14, "parts": 2, "num_rotated": 3},
        {"N": 6, "H": 16, "d": 8, "num_rotated": 12},
        {"N": 4, "H": 2, "d": 9, "r": 0},
        {"N": 0, "H": 2, "d": 8},
    ],
    large_sizes=[{"N": 32, "H": 9, "d": 64}, {"N": 2048, "H": 9, "d": 64, "parts": 2}],
)
def _(N, H, d, device, dtype, r=None, parts=1, num_rotated=None):
    """x is the first of so many parts of each row."""
    x = torch.randn(N, parts * H, d, device=device, dtype=dtype)[:, :H]
    angles = 6 * torch.rand(N, (d if r is None else r) // 2, device=device)
    return x.requires_grad_(), angles.cos(), angles.sin(), num_rotated
