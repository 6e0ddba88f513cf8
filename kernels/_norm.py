"""Shared by rms_norm and layer_norm."""

import torch
from torch import Tensor


def fake(x: Tensor, *_rest: object) -> Tensor:
    """Return an empty output: contiguous, of the shape and dtype of x."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def check(op: str, x: Tensor, vectors: dict[str, Tensor | None], residual: Tensor | None) -> None:
    """Raise ValueError unless x is (..., D > 0), the vectors are (D,) or None, and the residual is like x or None."""
    if not x.dim() or not x.shape[-1] or not x.is_floating_point():
        raise ValueError(f"{op}: x must be floating point of shape (..., D > 0), got {x.dtype} {list(x.shape)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} must have shape ({x.shape[-1]},), got {list(vector.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        given = f"{residual.dtype} {list(residual.shape)}"
        raise ValueError(f"{op}: residual must have x's dtype and shape, {x.dtype} {list(x.shape)}, got {given}")
