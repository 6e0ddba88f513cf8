"""GELU, exact or approximated by the hyperbolic tangent."""

import torch
from torch import Tensor

from rlhf_fast.kernels._launch import dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import upcast


@op(fake=lambda x, *_rest: torch.empty(x.shape, dtype=x.dtype, device=x.device))
def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Return the GELU of x, in its shape and dtype.

        "none": x Phi(x), where Phi is the normal distribution function
        "tanh": x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, as in GPT-2

    (Hendrycks and Gimpel 2016, arXiv 1606.08415.) It is computed in float32 and rounded once.
    No gradient: for inference.

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
    return x.detach(), approximate


@gelu.compiled
def _(kernels, x, approximate):
    (code,) = dtype_codes(kernels, x)
    x = x.contiguous()
    out = torch.empty_like(x)
    kernels.gelu(x.data_ptr(), code, out.data_ptr(), x.numel(), approximate == "tanh", stream_or_threads(x))
    return out


@gelu.inputs(
    small_sizes=[
        {"shape": ()},
        {"shape": (3, 17), "spread": 6.0},
        {"shape": (2, 3, 65), "approximate": "tanh", "spread": 6.0},
        {"shape": (4, 5000)},
        {"shape": (0, 5)},
    ],
    large_sizes=[{"shape": (32, 3072)}, {"shape": (2048, 3072)}],
)
def _(shape, device, dtype, approximate="none", spread=1.0):
    return spread * torch.randn(shape, device=device, dtype=dtype), approximate
