"""Conversions and checks of tensors that op bodies, normalizers and launchers share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Return x in float32, or as it is if it is float64: on float64 inputs a reference computes in float64."""
    return x if x.dtype == torch.float64 else x.float()


def upcast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of upcast(x)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def promote_to_float64(*args: Any) -> tuple:
    """Convert all tensors among args to float64 if one of them is. Kernels do not serve float64, so the reference then
    runs."""
    for x in args:
        if getattr(x, "dtype", None) == torch.float64:  # isinstance takes seven times as long for what is no tensor
            return tuple(x.double() if isinstance(x, Tensor) else x for x in args)
    return args


def detached(args: Iterable) -> tuple:
    """Return args with every tensor detached, without a call of torch for those that are."""
    return tuple(x.detach() if isinstance(x, Tensor) and x.requires_grad else x for x in args)


def as_bool(op: str, mask: Tensor) -> Tensor:
    """Return mask in bool. Raise ValueError where its dtype holds weights: 0.5 would count as a whole token."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point():
        dtype = str(mask.dtype).removeprefix("torch.")
        raise ValueError(f"{op}: mask must be bool or integers, got {dtype}; pass mask.bool()")
    return mask.bool()


def as_float(x: object) -> float:
    """Return x as a float. TypeError for text, which float() would read; `Op` makes a sentence of it."""
    if type(x) is float:
        return x
    if isinstance(x, (str, bytes)):
        raise TypeError(x)
    return float(x)  # type: ignore[arg-type]


def as_flag(x: object) -> bool:
    """Return x as a bool. TypeError for what bool() would only look for being empty."""
    if x is None or isinstance(x, (str, bytes, list, tuple, dict)):
        raise TypeError(x)
    return bool(x)


def has_full_weights(weights: object) -> bool:
    """Return whether `token_weights` would leave them as they are."""
    return isinstance(weights, Tensor) and weights.dtype != torch.bool and weights.dim() > 0


def token_weights(weights: Tensor | float, like: Tensor, shape: torch.Size) -> Tensor:
    """Return weights of `shape`, which a number or a tensor () stands for, float64 only if `like` is. Bools become 0
    and 1. A number's are on the device of `like`."""
    if not isinstance(weights, Tensor):
        return torch.full(shape, as_float(weights), dtype=upcast_dtype(like), device=like.device)
    weights = weights.float() if weights.dtype == torch.bool else weights
    return weights if weights.dim() else weights.to(upcast_dtype(like)).expand(shape)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return dense tensors, and None for None."""
    return [x if x is None else x.contiguous() for x in tensors]


def contiguous_float32(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return dense float32 tensors, and None for None."""
    return [
        x if x is None or (x.dtype is torch.float32 and x.is_contiguous()) else x.float().contiguous() for x in tensors
    ]


def contiguous_floats(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return dense tensors of the dtypes that csrc/cuda reads, and None for None. Others become float32."""
    return [
        x if x is None else (x if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x.float()).contiguous()
        for x in tensors
    ]


def empty_float32(like: Tensor, *shape: int) -> Tensor:
    """Return new float32 memory on the device of `like`, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def empty_contiguous(x: Tensor) -> Tensor:
    """Return new contiguous memory of the shape and dtype of x. It takes less than half the time of torch.empty."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """Return (N, D), the numbers of rows and columns of x (..., D)."""
    return math.prod(x.shape[:-1]), x.shape[-1]


def as_matrix(x: Tensor) -> Tensor:
    """Return x (..., D) as (N, D) with contiguous rows. It is a view of x where strides allow."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def copy_back(copy: Tensor | None, original: Tensor | None) -> None:
    """Copy into `original` what a kernel wrote to `copy`, a contiguous copy of it or the same tensor."""
    if copy is not None and original is not None and copy is not original:
        original.copy_(copy)


def check_offsets(op: str, name: str, offsets: Tensor, N: int) -> None:
    """Raise ValueError unless `offsets` rise from 0 to N. On a GPU nothing is checked: it would wait for the device."""
    if offsets.device.type != "cpu":
        return
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != N or any(b < a for a, b in pairwise(ends)):
        shown = ends if len(ends) < 10 else f"[{', '.join(map(str, ends[:4]))}, ..., {ends[-1]}]"
        raise ValueError(f"{op}: {name} must rise from 0 to {N}, the number of rows, got {shown}")
