"""Backends that run csrc/cuda's kernels, and numbers at addresses of any alignment."""

import pytest
import torch

from rlhf_fast.kernels._op import OPS


def cuda_backends(op: str) -> list[tuple[str, str]]:
    """Return (backend, device) of an op's CUDA kernels: on a GPU, and run on the CPU by tests/simt."""
    return [(b, d) for b, d in (("simt", "cpu"), ("cuda", "cuda")) if b in OPS[op].backends]


def on_each_backend(op: str) -> pytest.MarkDecorator:
    backends = cuda_backends(op)
    return pytest.mark.parametrize("backend, device", backends, ids=[b for b, _ in backends])


def at_offset(x: torch.Tensor, offset: int) -> torch.Tensor:
    """Return a contiguous copy of x, `offset` numbers into memory that is NaN around it."""
    memory = torch.full((x.numel() + offset + 16,), torch.nan, dtype=x.dtype, device=x.device)
    view = memory[offset : offset + x.numel()].view(x.shape)
    return view.copy_(x)
