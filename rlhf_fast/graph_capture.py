"""Capture work for a GPU as CUDA graphs: for the decode step, and for the training forward and its backward pass.

A graph holds the addresses of all tensors that it reads and writes. RLHF_FAST_CUDA_GRAPHS=0 turns graphs off. Where a
capture fails, the same work runs op by op, with one warning; under RLHF_FAST_STRICT=1 it raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from logging import getLogger
from typing import Protocol

import torch
from torch import Tensor

from rlhf_fast.errors import UserError

log = getLogger("rlhf_fast")
_warned: set[str] = set()


class Recorder(Protocol):
    """Turns a function without arguments into one call to the device."""

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        """Run the function as it will be captured, and return its result."""
        ...

    def capture(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a function that runs the recorded work again. Its result is overwritten by the next call."""
        ...


class CudaRecorder:
    """Captures CUDA graphs that share one pool of memory. They are replayed one after the other on one stream."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        """Run the function on the stream of the captures; see Recorder."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        result.record_stream(current)
        return result

    def capture(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return the replay of a graph; see Recorder."""
        # Not `torch.cuda.graph`: it returns all cached memory to the driver, which training would allocate again. Other
        # threads may allocate during the capture ("thread_local").
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            try:
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    result = function()
                except BaseException:
                    with suppress(RuntimeError):  # it says that the capture failed, and would hide why
                        graph.capture_end()
                    raise
                graph.capture_end()
            except BaseException:
                self._recover()
                raise

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _recover(self) -> None:
        """Undo what torch leaves after a capture that failed: its allocator still records to the pool, and its random
        generator refuses all draws until the end of another capture, which is of one launch in a pool of its own."""
        with suppress(RuntimeError, AttributeError):  # the first is only needed where torch has not done it itself
            torch._C._cuda_endAllocateToPool(self.device.index or 0, self.pool)
        with suppress(RuntimeError):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
            torch.zeros((), device=self.device)
            graph.capture_end()


def captures_on(device: torch.device) -> bool:
    """Return whether work on `device` is captured."""
    return device.type == "cuda" and os.environ.get("RLHF_FAST_CUDA_GRAPHS") != "0"


def recorder_for(device: torch.device) -> Recorder | None:
    """Return what captures work on `device`, or None."""
    return CudaRecorder(device) if captures_on(device) else None


def report_failure(work: str, error: RuntimeError) -> None:
    """Warn, once, that `work` is not captured. UserError under RLHF_FAST_STRICT=1."""
    text = f"{work} cannot be captured as a CUDA graph ({error})"
    if os.environ.get("RLHF_FAST_STRICT") == "1":
        raise UserError(f"RLHF_FAST_STRICT=1 and {text}; RLHF_FAST_CUDA_GRAPHS=0 turns graphs off") from error
    if text not in _warned:
        _warned.add(text)
        log.warning("%s; it runs op by op, slower", text)
