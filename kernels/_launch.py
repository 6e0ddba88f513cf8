"""Shared by the launchers of compiled kernels: the stream or threads, pointers, dtypes, errors."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

NOT_COMPILED_FOR_GPU = ("no kernel image", "invalid device function", "unsupported toolchain")
"""Errors of CUDA where it has no code for the GPU: of a launch, of a kernel's attributes, of PTX of a newer nvcc."""


class Unsupported(Exception):
    """A launcher raises it for inputs that its kernel does not serve, mostly a dtype. The next backend then runs."""


def stream_or_threads(x: Tensor) -> int:
    """Return a kernel's last argument: the number of threads for a CPU tensor, the current stream for a CUDA tensor."""
    return torch.get_num_threads() if x.device.type == "cpu" else torch.cuda.current_stream(x.device).cuda_stream


def data_ptrs(*tensors: Tensor | None) -> list[int]:
    """Return the tensors' data pointers, and 0 for None. The caller must hold the tensors until the kernel has them."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def dtype_codes(kernels: ModuleType, *tensors: Tensor | None) -> tuple[int, ...]:
    """Return the number of each tensor's dtype in csrc/dtypes.h. None counts as float32. Raise Unsupported for a dtype
    that has none."""
    codes = _codes_by_dtype(kernels)
    try:
        return tuple([codes[torch.float32 if x is None else x.dtype] for x in tensors])
    except KeyError as error:
        raise Unsupported(f"no compiled kernel for {str(error.args[0])[6:]}") from None


@functools.cache
def _codes_by_dtype(kernels: ModuleType) -> dict[torch.dtype, int]:
    prefix = "dtype_"
    return {
        getattr(torch, name.removeprefix(prefix)): code
        for name, code in vars(kernels).items()
        if name.startswith(prefix)
    }


def refuse_float64(*tensors: Tensor | None) -> None:
    """Raise Unsupported if one of the tensors is float64, which only references serve."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            raise Unsupported("float64 has no compiled kernel")


def require_dtypes(*tensors: Tensor | None) -> None:
    """Raise Unsupported unless all tensors are float32 or bfloat16, the dtypes that every compiled kernel reads."""
    for x in tensors:
        if x is not None and x.dtype not in (torch.float32, torch.bfloat16):
            raise Unsupported(f"no compiled kernel for {str(x.dtype)[6:]}")
