"""Shared by the launchers of compiled kernels: the stream or threads, pointers, dtypes, errors."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from rlhf_fast.kernels._backends import COMPILED

log = logging.getLogger("rlhf_fast")
NOT_COMPILED_FOR_GPU = ("no kernel image", "invalid device function", "unsupported toolchain")
"""Errors of CUDA where it has no code for the GPU: of a launch, of a kernel's attributes, of PTX of a newer nvcc."""


class Unsupported(Exception):
    """A launcher raises it for inputs that its kernel does not serve, mostly a dtype. The next backend then runs."""


class _Fork:
    """Tell whether this process was forked from one with threads. OpenMP's are lost then, and it waits for them for
    ever: in kernels, and in torch's own functions."""

    had_threads = False  # of the parent, just before a fork
    has_lost_threads = False

    @classmethod
    def look_for_threads(cls) -> None:
        try:
            cls.had_threads = len(list(Path("/proc/self/task").iterdir())) > 1
        except OSError:  # not Linux
            cls.had_threads = True

    @classmethod
    def in_child(cls) -> None:
        cls.has_lost_threads = cls.has_lost_threads or cls.had_threads

    @classmethod
    def run_on_one_thread(cls) -> None:
        if torch.get_num_threads() > 1:
            torch.set_num_threads(1)
            log.warning("this process was forked from one with threads: it computes on one; start it by `spawn`")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_Fork.look_for_threads, after_in_child=_Fork.in_child)


def stream_or_threads(x: Tensor) -> int:
    """Return a kernel's last argument: the number of threads for a CPU tensor, the current stream for a CUDA tensor."""
    if not x.is_cpu:
        return torch.cuda.current_stream(x.device).cuda_stream
    if _Fork.has_lost_threads:
        _Fork.run_on_one_thread()
    return torch.get_num_threads()


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


def ptrs_and_codes(kernels: ModuleType, *tensors: Tensor | None) -> list[int]:
    """Return for each tensor its data pointer, then the number of its dtype in csrc/dtypes.h; 0 and 0 for None."""
    codes = dtype_codes(kernels, *tensors)
    return [number for pair in zip(data_ptrs(*tensors), codes, strict=True) for number in pair]


@functools.cache
def _codes_by_dtype(kernels: ModuleType) -> dict[torch.dtype, int]:
    prefix = "dtype_"
    return {
        getattr(torch, name.removeprefix(prefix)): code
        for name, code in vars(kernels).items()
        if name.startswith(prefix)
    }


def scale_in_place(tensors: list[Tensor | None], factors: list[Tensor | None], backend: str) -> None:
    """Multiply each of two dense tensors of one size by its factor (), on a GPU, in one launch, which ends at once
    where the factors are 1. None is left out. `backend` is "cuda", "simt" or "triton"."""
    first = next(x for x in tensors if x is not None)
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        if backend == "triton":
            import_module("rlhf_fast.kernels.triton._scale").scale_two_in_place(tensors, factors)
            return
        kernels = COMPILED[backend]
        (x, y), (x_factor, y_factor) = tensors, factors
        codes = ptrs_and_codes(kernels, x, x_factor, y, y_factor)
        kernels.scale_gradients(*codes, first.numel(), stream_or_threads(first))


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


NUM_TICKETS = 4096


class _Tickets:
    """Zeroed numbers on one device, one for each stream and for each launch that a graph has captured."""

    def __init__(self, device: torch.device):
        self.numbers = torch.zeros(NUM_TICKETS, dtype=torch.int32, device=device)
        self.next_index = itertools.count()
        self.of_stream: dict[int, int] = {}
        if device.type == "cuda":  # other streams must not come before the zeros
            torch.cuda.current_stream(device).synchronize()


_tickets: dict[torch.device, _Tickets] = {}


def ticket(x: Tensor) -> tuple[Tensor, int]:
    """Return an int32 tensor on x's device and an index at which it is 0: the number that a launch's blocks count up to
    find out which of them ends last. That block must set it to 0 again.

    Launches that may run at the same time never share a number: a stream has one, whose launches follow each other, and
    a launch that is captured by a graph has one that nobody else gets, since the graph may be replayed anywhere.
    """
    device = x.device
    is_capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    tickets = _tickets.get(device)
    if tickets is None and not is_capturing:
        tickets = _tickets[device] = _Tickets(device)
    if tickets is not None:
        stream = torch.cuda.current_stream(device).cuda_stream if x.is_cuda else 0
        index = None if is_capturing else tickets.of_stream.get(stream)
        if index is None:
            index = next(tickets.next_index)
            if not is_capturing:
                tickets.of_stream[stream] = index
        if index < NUM_TICKETS:
            return tickets.numbers, index
    return torch.zeros(1, dtype=torch.int32, device=device), 0


def ticket_ptr(numbers: Tensor, index: int) -> int:
    """Return the address of a `ticket`."""
    return numbers.data_ptr() + 4 * index
