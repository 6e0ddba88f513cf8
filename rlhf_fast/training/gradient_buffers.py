"""Float32 memory for gradients on the CPU, kept from one optimizer step to the next.

A gradient in fresh memory costs the system a page fault, which zeroes 4 KiB, for every 1024 numbers, at every step. A
copy from the memory that autograd has just written, and then uses again for the next parameter, costs less.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MIN_KEPT_SIZE = 2**18
"""A smaller float32 gradient stays where autograd puts it: the C library keeps so little memory itself."""


class GradientPool:
    """Tensors that are free to hold a gradient, by shape. Learners that step one after the other can share one."""

    def __init__(self) -> None:
        self.free: dict[torch.Size, list[Tensor]] = defaultdict(list)

    def take(self, shape: torch.Size) -> Tensor:
        free = self.free[shape]
        return free.pop() if free else torch.empty(shape, dtype=torch.float32, device="cpu")


class GradientBuffers:
    """The gradients of one Learner's masters."""

    def __init__(self, pool: GradientPool):
        self.pool = pool
        self.masters: dict[str, Tensor] = {}
        """The copies in float32 of parameters in another dtype."""
        self.taken: dict[str, Tensor] = {}
        self.keeping = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Move large float32 gradients to kept memory within the block. Elsewhere they are autograd's own."""
        self.keeping = True
        try:
            yield
        finally:
            self.keeping = False

    def attach(self, name: str, p: torch.nn.Parameter) -> Tensor:
        """Return the float32 master of a parameter: p itself, or a copy that receives p's gradients, in float32."""
        if p.dtype != torch.float32:
            master = p.detach().float()
            self.masters[name] = master
            self._hook(name, p, GradientBuffers._move)
            return master
        if p.is_cpu and p.numel() >= MIN_KEPT_SIZE:
            self._hook(name, p, GradientBuffers._keep)
        return p

    def _hook(self, name: str, p: torch.nn.Parameter, act: Callable[[GradientBuffers, str, Tensor], None]) -> None:
        """Call `act(self, name, p)` after each gradient of p, as long as these buffers are in use."""
        reference = weakref.ref(self)

        def run(p: Tensor) -> None:
            buffers = reference()
            if buffers is not None:
                act(buffers, name, p)

        p.register_post_accumulate_grad_hook(run)

    def release(self) -> None:
        """Let the next gradients overwrite these."""
        for buffer in self.taken.values():
            self.pool.free[buffer.shape].append(buffer)
        self.taken.clear()

    def forget(self) -> None:
        """Leave the gradients to whoever has them."""
        self.taken.clear()

    def _buffer(self, name: str, shape: torch.Size) -> Tensor:
        if name not in self.taken:
            self.taken[name] = self.pool.take(shape)
        return self.taken[name]

    def _keep(self, name: str, p: Tensor) -> None:
        """Move a gradient that autograd has put elsewhere; it adds the next ones to it in place."""
        if self.keeping and p.is_cpu and p.grad is not self.taken.get(name):
            assert p.grad is not None
            p.grad = self._buffer(name, p.shape).copy_(p.grad)

    def _move(self, name: str, p: Tensor) -> None:
        assert p.grad is not None
        master = self.masters[name]
        if master.grad is not None:
            master.grad.add_(p.grad)
        elif master.is_cpu:
            master.grad = self._buffer(name, p.shape).copy_(p.grad)
        else:
            master.grad = p.grad.float()
        p.grad = None
