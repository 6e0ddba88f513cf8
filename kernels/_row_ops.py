"""What the ops on rows (..., D) of activations check and ask alike."""

import math
from types import ModuleType

import torch
from torch import Tensor

from rlhf_fast.kernels._op import Declined

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(op: str, x: Tensor, vectors: dict[str, Tensor | None], residual: Tensor | None) -> None:
    """ValueError unless x is (..., D > 0), the vectors are (D,) or None, and the residual is like x or None."""
    if not x.dim() or not x.shape[-1] or not x.is_floating_point():
        raise ValueError(f"{op}: x must be floating point of shape (..., D > 0), got {x.dtype} {list(x.shape)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} must have shape ({x.shape[-1]},), got {list(vector.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        came = f"{residual.dtype} {list(residual.shape)}"
        raise ValueError(f"{op}: residual must have x's dtype and shape, {x.dtype} {list(x.shape)}, got {came}")


def serves(*tensors: Tensor | None) -> None:
    """Declined unless all are float32 or bfloat16: what every compiled kernel reads."""
    for x in tensors:
        if x is not None and x.dtype not in (torch.float32, torch.bfloat16):
            raise Declined(f"no compiled kernel for {str(x.dtype)[6:]}")


def codes(kernels: ModuleType, *tensors: Tensor | None) -> tuple[int, ...]:
    """How csrc/ names the dtypes of these tensors: 0 float32, 1 bfloat16, and 2 float16, which csrc/cuda alone reads.
    Declined for others. None counts as float32."""
    known = FLOATS if kernels.__name__.endswith(("cuda", "simt")) else FLOATS[:2]
    for x in tensors:
        if x is not None and x.dtype not in known:
            raise Declined(f"no compiled kernel for {str(x.dtype)[6:]}")
    return tuple(0 if x is None else known.index(x.dtype) for x in tensors)


def sizes(x: Tensor) -> tuple[int, int]:
    """Rows and columns of (..., D)."""
    return math.prod(x.shape[:-1]), x.shape[-1]


def dense(x: Tensor) -> Tensor:
    """x (..., D) as (N, D) with dense rows: as it lies where that is possible."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def write_back(dense: Tensor | None, residual: Tensor | None) -> None:
    """What a kernel wrote into the dense copy of a strided residual goes where the residual lies."""
    if dense is not residual:
        residual.copy_(dense)
