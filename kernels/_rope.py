"""Shared by rope and rope_store."""

import torch
from torch import Tensor

from rlhf_fast.kernels._tensors import upcast


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (N, heads, d) in at least float32, its first r dimensions rotated; cos and sin are (N, r/2)."""
    half = cos.shape[1]
    x1, x2, rest = upcast(x).split([half, half, x.shape[2] - 2 * half], dim=2)
    cos, sin = upcast(cos)[:, None], upcast(sin)[:, None]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=2)
