"""Optimizer steps. A Learner trains one model and knows nothing of RLHF: the loss is an argument.

A loss is a function `(model, batch, num_items) -> (loss, stats)`. It returns a weighted SUM divided by `num_items`,
which is `batch.num_items()` of the whole optimizer batch. The micro-batches of a batch therefore add up to the same
loss and gradient, however it is split. `stats` are tensors that add up in the same way: 0-d, or (2,) for a ratio of two
sums, numerator first. Stats whose name ends in `_max` or `_min` are combined by max or min instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, islice
from types import ModuleType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from rlhf_fast.batches import Batch
from rlhf_fast.config.fields import OptimConfig
from rlhf_fast.errors import BadRows, UserError, listed
from rlhf_fast.model.garbage_collection import paused_garbage_collection
from rlhf_fast.training.allocator import keep_freed_memory
from rlhf_fast.training.compiled_adamw import CompiledAdamW
from rlhf_fast.training.gradient_buffers import GradientBuffers, GradientPool
from rlhf_fast.training.micro_batches import micro_batches


class Trainable(Protocol):
    """A model that a Learner can train."""

    @property
    def name(self) -> str: ...

    @property
    def packs_rows(self) -> bool: ...

    def prepare_training(self) -> None: ...

    def trainable(self) -> dict[str, torch.nn.Parameter]: ...

    def train_mode(self, dropout: float | None) -> AbstractContextManager[None]: ...


Loss = Callable[[Any, Any, float], tuple[Tensor, dict[str, Tensor]]]
Term = tuple[Loss, Batch, float]
"""(loss, batch, coefficient)"""


def learning_rate(cfg: OptimConfig, step: int, total_steps: int) -> float:
    """Return the learning rate at `step` (0, 1, ...): a linear warm-up, then constant or a cosine.

    The warm-up rises from warmup_start * lr to lr over warmup_steps. The cosine falls to final_ratio * lr, which the
    last step has.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (cfg.warmup_start + (1 - cfg.warmup_start) * step / cfg.warmup_steps)
    if cfg.schedule == "constant":
        return cfg.lr
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, total_steps - 1 - cfg.warmup_steps))
    return cfg.lr * (cfg.final_ratio + (1 - cfg.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


class Learner:
    """AdamW over the parameters in `model.trainable()`: torch's fused kernel, or on the CPU our own, with its formula.

    A bfloat16 weight has a float32 master copy here, as in the paper, and the gradients of several micro-batches are
    added in float32; the model's own weight is the rounded master. dropout: passed to `model.train_mode`. ema: if above
    0, a moving average is kept that starts at the first weights: average += (1 - ema) * (weights - average) after each
    step. pool: holds the memory of the gradients between steps; learners that take turns can share one.

    On a CPU it sets the process's C library to keep the memory of freed tensors (training/allocator.py).
    """

    def __init__(
        self,
        model: Trainable,
        optim: OptimConfig,
        total_steps: int,
        *,
        dropout: float | None = None,
        ema: float = 0.0,
        pool: GradientPool | None = None,
    ):
        self.model, self.optim, self.total_steps = model, optim, total_steps
        self.dropout, self.ema = dropout, ema
        self.steps = 0
        model.prepare_training()
        self.params = model.trainable()
        if any(p.dtype == torch.float16 for p in self.params.values()):
            raise UserError(f"{model.name}: float16 gradients underflow and loss scaling is not built; use bfloat16")
        if any(p.is_cpu for p in self.params.values()):
            keep_freed_memory()
        self.gradients = GradientBuffers(pool or GradientPool())
        self.masters = {name: self.gradients.attach(name, p) for name, p in self.params.items()}
        self.average = {name: p.detach().clone() for name, p in self.masters.items()} if ema else {}
        matrices = [p for p in self.masters.values() if p.dim() > 1]
        vectors = [p for p in self.masters.values() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
        )
        copies = [p if p is not self.masters[name] else None for name, p in self.params.items()]
        self.compiled = CompiledAdamW(self.adam, [*self.masters.values()], copies, [*self.average.values()])

    def step(self, terms: Sequence[Term]) -> dict[str, float]:
        """Take one optimizer step on the sum of `coefficient * loss(model, batch)` over the terms.

        Returns each loss's stats under its own names, and `loss`, `grad_norm` (before clipping) and `lr`. A loss or
        gradient that is not finite is a UserError that names the rows; the weights are then as before.
        """
        with paused_garbage_collection():
            losses, stats = self._backward(terms)
        norm = self._grad_norm()
        total = torch.stack(losses).sum() if losses else torch.zeros(())
        result = to_floats({**stats, "loss": total, "grad_norm": norm})
        if not (math.isfinite(result["loss"]) and math.isfinite(result["grad_norm"])):
            self._raise_non_finite(terms, result)
        result["lr"] = self.apply_gradient(norm)
        return result

    def gradient(self, terms: Sequence[Term]) -> dict[str, Tensor]:
        """Return the float32 gradient that `step` would use, before clipping, by parameter name. Takes no step."""
        self._backward(terms)
        self.gradients.convert()
        gradients = {name: p.grad for name, p in self.masters.items() if p.grad is not None}
        self.gradients.forget()
        self._zero_grad()
        return gradients

    def rehearse(self, terms: Sequence[Term]) -> None:
        """Compute the gradient of the terms and forget it, to see how long that takes. All that steps depend on stays,
        but for torch's random state."""
        with paused_garbage_collection():
            self._backward(terms)
        self._zero_grad()

    def _backward(self, terms: Sequence[Term]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Put the gradient of the terms into `gradients`; return the micro-batches' losses and the combined stats."""
        self._zero_grad()
        losses: list[Tensor] = []
        stats: dict[str, Tensor] = {}
        with self.model.train_mode(self.dropout):
            parts = self._micro_batches(terms)
            first_two = list(islice(parts, 2))
            with self.gradients.kept(converting=len(first_two) > 1 or self.compiled.kernels() is None):
                for loss, micro_batch, coefficient, num_items in chain(first_two, parts):
                    value, new_stats = loss(self.model, micro_batch, num_items)
                    self._add_gradient(value * coefficient)
                    losses.append(value.detach() * coefficient)
                    _combine(stats, new_stats)
        return losses, stats

    def _micro_batches(self, terms: Sequence[Term]) -> Iterator[tuple[Loss, Batch, float, float]]:
        """Yield (loss, micro-batch, coefficient, number of the batch's items)."""
        for loss, batch, coefficient in terms:
            if num_items := batch.num_items():
                budget = self.optim.micro_batch_tokens
                for _, micro_batch in micro_batches(batch, budget, packed=lambda: self.model.packs_rows):
                    yield loss, micro_batch, coefficient, num_items

    def _add_gradient(self, loss: Tensor) -> None:
        """Add the gradient of a loss to `gradients`."""
        if loss.requires_grad:
            loss.backward()
            self.gradients.gather()

    def _zero_grad(self) -> None:
        for p in self.masters.values():  # zero_grad looks for a profiler first
            p.grad = None
        self.gradients.release()

    def _grad_norm(self) -> Tensor:
        if (kernels := self._kernels()) is not None:
            return self.compiled.grad_norm(kernels, self._gradients())
        gradients = [p.grad for p in self.masters.values() if p.grad is not None]
        if not gradients:
            return torch.zeros(())
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # get_total_norm's, faster

    def _kernels(self) -> ModuleType | None:
        """Return the compiled step, None if torch's runs, which reads the masters' float32 gradients."""
        kernels = self.compiled.kernels()
        if kernels is None:
            self.gradients.convert()
        return kernels

    def _gradients(self) -> list[Tensor | None]:
        return [self.gradients.of(name, p) for name, p in self.masters.items()]

    @torch.no_grad()
    def apply_gradient(self, norm: Tensor) -> float:
        """Clip the gradients of norm `norm`, update the weights by them, and return the learning rate."""
        rate = learning_rate(self.optim, self.steps, self.total_steps)
        for group in self.adam.param_groups:
            group["lr"] = rate
        if (kernels := self._kernels()) is not None:
            clip = self.optim.grad_clip
            scale = float((clip / (norm + 1e-6)).clamp(max=1.0)) if clip else 1.0  # clip_grads_with_norm_'s factor
            self.compiled.step(kernels, self._gradients(), scale, 1 - self.ema)
        else:
            if self.optim.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(self.masters.values(), self.optim.grad_clip, norm)
            self.adam.step()
            self._copy_masters_to_model()
            if self.ema:
                torch._foreach_lerp_(list(self.average.values()), list(self.masters.values()), 1 - self.ema)
        self._zero_grad()
        self.steps += 1
        return rate

    @torch.no_grad()
    def _copy_masters_to_model(self) -> None:
        """Round the masters to the dtype of the model's weights."""
        copies = [(p, self.masters[name]) for name, p in self.params.items() if p is not self.masters[name]]
        if copies:
            torch._foreach_copy_([p for p, _ in copies], [master for _, master in copies])

    def _raise_non_finite(self, terms: Sequence[Term], result: dict[str, float]) -> NoReturn:
        """Find the rows whose own loss or gradient is not finite, one row at a time, and raise."""
        bad = []
        for loss, batch, coefficient in terms:
            for index, row in micro_batches(batch, 1):
                self._zero_grad()
                value, _ = loss(self.model, row, batch.num_items())
                self._add_gradient(value * coefficient)
                if not (math.isfinite(float(value.detach())) and math.isfinite(float(self._grad_norm()))):
                    uids = index if batch.uids is None else batch.uids[index]
                    bad.append((type(batch).__name__, int(uids[0])))
        self._zero_grad()
        bad.sort()
        source = f", from rows {listed([str(uid) for _, uid in bad])}" if bad else ", though from no row alone"
        raise BadRows(
            f"optimizer step {self.steps + 1}: loss {result['loss']:g}, gradient norm {result['grad_norm']:g}{source}"
            "; the weights are as before this step: look at these rows, or lower the learning rate",
            bad,
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model the moving average as its weights within the block."""
        if not self.ema:
            raise ValueError("Learner.averaged: there is no average, ema is 0")
        with torch.no_grad():
            saved = {name: p.detach().clone() for name, p in self.params.items()}
            for name, p in self.params.items():
                p.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.params.items():
                    p.copy_(saved[name])

    def state_dict(self) -> dict[str, Any]:
        """Return all that later steps depend on, the trained weights included. The tensors are not copied."""
        return {
            "steps": self.steps,
            "weights": {name: p.detach() for name, p in self.masters.items()},
            "adam": {name: dict(self.adam.state[p]) for name, p in self.masters.items() if p in self.adam.state},
            "ema": dict(self.average),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises UserError if it is of another model."""
        for part, tensors in (("weights", self.masters), ("ema", self.average)):
            saved_shapes = {name: tuple(value.shape) for name, value in state[part].items()}
            if saved_shapes != {name: tuple(value.shape) for name, value in tensors.items()}:
                raise UserError(
                    f"{self.model.name}: the checkpoint's {part} are of another model or with other settings of LoRA or"
                    " EMA; give a new `out` folder, or the settings that the run began with"
                )
            for name, value in tensors.items():
                value.copy_(state[part][name])
        self._copy_masters_to_model()
        self.adam.state.clear()
        for name, moments in state["adam"].items():
            p = self.masters[name]
            self.adam.state[p] = {key: value.to(p.device) for key, value in moments.items()}
        self.steps = int(state["steps"])


def _combine(total: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Add `new` stats to `total`, in place."""
    for name, value in new.items():
        value = value.detach()
        if name not in total:
            total[name] = value
        elif name.endswith("_max"):
            total[name] = torch.maximum(total[name], value)
        elif name.endswith("_min"):
            total[name] = torch.minimum(total[name], value)
        else:
            total[name] = total[name] + value


@torch.no_grad()
def evaluate(model: Trainable, loss: Loss, batches: Sequence[Batch], micro_batch_tokens: int) -> dict[str, float]:
    """Return the stats of `loss` over all `batches` together; {} if they hold no items."""
    num_items = sum(batch.num_items() for batch in batches)
    stats: dict[str, Tensor] = {}
    for batch in batches if num_items else ():
        for _, micro_batch in micro_batches(batch, micro_batch_tokens, packed=lambda: model.packs_rows):
            _combine(stats, loss(model, micro_batch, num_items)[1])
    return to_floats(stats)


def to_floats(stats: dict[str, Tensor]) -> dict[str, float]:
    """Divide the ratios and move all numbers from the device in one transfer."""
    if not stats:
        return {}
    pairs = [value if value.dim() else torch.stack([value, torch.ones_like(value)]) for value in stats.values()]
    numbers = torch.stack([pair.detach().double().to(pairs[-1].device) for pair in pairs]).tolist()
    return {name: a / b if b else 0.0 for name, (a, b) in zip(stats, numbers, strict=True)}
