"""AdamW over all parameters as two calls of compiled code, csrc/cpu/adamw.cpp: the gradient's norm, and the step.

The step is that of torch.optim.AdamW (fused), whose state it uses, on gradients that are multiplied by one factor. A
gradient in bfloat16 gives the bits of the same numbers in float32. In the same pass over memory the step rounds the
weights to the model's bfloat16 ones and moves their average. Learner has the same in plain torch, which runs on other
devices and where the reference is forced.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from rlhf_fast.kernels._backends import COMPILED, forced_backend
from rlhf_fast.kernels._launch import stream_or_threads


def find_kernels() -> ModuleType | None:
    """Return the compiled module that has the step. None if none is built, or if another backend is forced."""
    forced = forced_backend()
    able = [name for name, module in COMPILED.items() if hasattr(module, "adamw_step") and forced in (None, name)]
    return COMPILED[able[-1]] if able else None


Gradients = Sequence[Tensor | None]
"""Float32 or bfloat16, one for each master; None where there is none."""


class CompiledAdamW:
    """The step of `adam` over the masters, its parameters, in any order.

    copies: the model's own weights, None where the master is that weight. averages: [] for none.
    """

    def __init__(
        self,
        adam: torch.optim.AdamW,
        masters: Sequence[Tensor],
        copies: Sequence[Tensor | None],
        averages: Sequence[Tensor],
    ):
        self.adam, self.masters, self.copies, self.averages = adam, masters, copies, averages
        self.sizes = array("q", [p.numel() for p in masters])
        of_master = {p: i for i, group in enumerate(adam.param_groups) for p in group["params"]}
        self.group_numbers = [of_master[p] for p in masters]

    def kernels(self) -> ModuleType | None:
        """Return the compiled module, None if it does not serve these tensors as they are now."""
        kernels = find_kernels()
        if kernels is None or not _all_dense(self.masters, torch.float32):
            return None
        if not _all_dense(self.averages, torch.float32) or not _all_dense(self.copies, torch.bfloat16):
            return None
        return kernels

    def grad_norm(self, kernels: ModuleType, grads: Gradients) -> Tensor:
        """Return the 2-norm () float32 of all gradients, summed in float64 in an order that the sizes fix."""
        first_chunks = self._first_chunks(kernels)
        sums = torch.empty(first_chunks[-1], dtype=torch.float64, device="cpu")
        grads = _contiguous(grads)
        addresses, are_bf16 = _pointers(grads), _are_bf16(grads)
        kernels.sum_squares(
            len(self.masters),
            _address(first_chunks),
            _address(self.sizes),
            _address(addresses),
            _address(are_bf16),
            sums.data_ptr(),
            stream_or_threads(sums),
        )
        return sums[0].sqrt().float()

    def step(self, kernels: ModuleType, grads: Gradients, grad_scale: float, average_weight: float) -> None:
        """Update the weights by their gradients, times grad_scale, and move the averages by average_weight. A master
        without gradient is left as it is, and its state too."""
        grads = _contiguous(grads)
        states = [self._state(p, grad is not None) for p, grad in zip(self.masters, grads, strict=True)]
        nothing = array("q", [0] * len(grads))
        groups = self.adam.param_groups
        arrays = [
            self._first_chunks(kernels),
            self.sizes,
            _pointers(grads),
            _are_bf16(grads),
            _pointers(self.masters),
            *(_pointers(state[name] if state else None for state in states) for name in STATE),
            _pointers(self.copies),
            _pointers(self.averages) if self.averages else nothing,
            array("d", [groups[i]["weight_decay"] for i in self.group_numbers]),
        ]
        group = groups[0]
        kernels.adamw_step(
            len(grads),
            *map(_address, arrays),
            group["lr"],
            *group["betas"],
            group["eps"],
            grad_scale,
            average_weight,
            stream_or_threads(self.masters[0]),
        )
        written = (x for x in (*self.masters, *self.copies) if x is not None)
        torch.autograd.graph.increment_version(written)  # autograd does not see a kernel's writes

    def _state(self, p: Tensor, has_grad: bool) -> dict[str, Tensor]:
        """Return a master's state, which begins at its first gradient, as in torch's optimizers."""
        if has_grad and p not in self.adam.state:
            zeros = [torch.zeros_like(p, requires_grad=False) for _ in range(2)]
            self.adam.state[p] = dict(zip(STATE, (torch.zeros((), dtype=torch.float32), *zeros), strict=True))
        return self.adam.state.get(p, {}) if has_grad else {}

    def _first_chunks(self, kernels: ModuleType) -> array[int]:
        chunks = (-(-size // kernels.adamw_chunk) for size in self.sizes)
        return array("q", accumulate(chunks, initial=0))


STATE = ("step", "exp_avg", "exp_avg_sq")
"""The names of a parameter's state in torch.optim.AdamW."""


def _all_dense(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> bool:
    return all(x is None or (x.is_cpu and x.dtype == dtype and x.is_contiguous()) for x in tensors)


def _contiguous(grads: Gradients) -> Gradients:
    return [None if grad is None else grad.contiguous() for grad in grads]


def _are_bf16(grads: Gradients) -> array[int]:
    return array("q", [grad is not None and grad.dtype == torch.bfloat16 for grad in grads])


def _pointers(tensors: Iterable[Tensor | None]) -> array[int]:
    return array("q", [0 if x is None else x.data_ptr() for x in tensors])


def _address(numbers: array) -> int:
    return numbers.buffer_info()[0]
