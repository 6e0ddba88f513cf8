"""The gradients of an optimizer step: of one backward pass as autograd made them, of several as float32 sums.

A float32 gradient on the CPU is in memory that is kept from one optimizer step to the next, on a GPU in fresh memory.
One in fresh memory costs the system a page fault, which zeroes 4 KiB, for every 1024 numbers, at every step. A copy
from the memory that autograd has just written, and then uses again for the next parameter, costs less. A bfloat16
gradient of the only backward pass is not copied: on the CPU the compiled optimizer reads it (compiled_adamw.py).
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
CHUNK = 2**26
"""Gradients of about so many numbers are converted to float32 together."""


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
        self.unconverted: dict[str, Tensor] = {}
        """Gradients of such parameters on the CPU, in their dtype."""
        self.taken: dict[str, Tensor] = {}
        self.gathered: list[tuple[Tensor, Tensor]] = []
        """Parameters on a GPU and their masters."""
        self.keeping, self.converting = False, True

    @contextmanager
    def kept(self, converting: bool) -> Iterator[None]:
        """Move large float32 gradients to kept memory within the block. Elsewhere they are autograd's own.

        converting: make gradients of another dtype float32 as they come. Else the first of several would lie beside the
        activations of the second pass, and be converted then.
        """
        self.keeping, self.converting = True, converting
        try:
            yield
        finally:
            self.keeping, self.converting = False, True

    def attach(self, name: str, p: torch.nn.Parameter) -> Tensor:
        """Return the float32 master of a parameter: p itself, or a copy whose gradients are p's."""
        if p.dtype != torch.float32:
            master = p.detach().float()
            self.masters[name] = master
            if p.is_cpu:
                self._hook(name, p, GradientBuffers._move)
            else:
                self.gathered.append((p, master))
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

    @torch.no_grad()
    def gather(self) -> None:
        """Add the gradients of parameters on a GPU to their masters', by a few launches for a chunk of parameters. Call
        it after each backward pass."""
        chunk: list[tuple[Tensor, Tensor]] = []
        size = 0
        for p, master in self.gathered:
            if p.grad is not None:
                chunk.append((p, master))
                size += p.numel()
                if size >= CHUNK:
                    _add_gradients(chunk)
                    chunk, size = [], 0
        if chunk:
            _add_gradients(chunk)

    def of(self, name: str, master: Tensor) -> Tensor | None:
        """Return the gradient of a master: float32, or in the dtype of its parameter."""
        return self.unconverted.get(name, master.grad)

    @torch.no_grad()
    def convert(self) -> None:
        """Give all gradients to the masters, in float32."""
        while self.unconverted:
            self._add(*self.unconverted.popitem())

    def release(self) -> None:
        """Let the next gradients overwrite these."""
        self.unconverted.clear()
        for buffer in self.taken.values():
            self.pool.free[buffer.shape].append(buffer)
        self.taken.clear()
        for p, _ in self.gathered:  # of a backward pass that did not end, or that was not ours
            p.grad = None

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
        """Take a gradient from p, where autograd would add the next one to it in p's dtype."""
        assert p.grad is not None
        gradient, p.grad = p.grad, None
        if name in self.unconverted:  # a pass within the pass, as of reentrant checkpointing
            self._add(name, self.unconverted.pop(name))
        elif not self.converting and self.masters[name].grad is None:
            self.unconverted[name] = gradient
            return
        self._add(name, gradient)

    def _add(self, name: str, gradient: Tensor) -> None:
        master = self.masters[name]
        if master.grad is None:
            master.grad = self._buffer(name, gradient.shape).copy_(gradient)
        else:
            master.grad.add_(gradient)


def _add_gradients(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Move the gradients of parameters to their masters, all on one device."""
    masters = [master for _, master in pairs]
    flat = masters[0].new_empty(sum(master.numel() for master in masters))
    gradients = torch._utils._unflatten_dense_tensors(flat, masters)
    torch._foreach_copy_(gradients, [p.grad for p, _ in pairs if p.grad is not None])
    sums: list[Tensor] = []
    addends: list[Tensor] = []
    for (p, master), gradient in zip(pairs, gradients, strict=True):
        p.grad = None
        if master.grad is None:
            master.grad = gradient
        else:
            sums.append(master.grad)
            addends.append(gradient)
    if sums:
        torch._foreach_add_(sums, addends)
