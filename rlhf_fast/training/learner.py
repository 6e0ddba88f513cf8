"""Optimizer steps. A learner knows one model and nothing of RLHF: what to minimise is passed in.

A loss is a function `(model, batch, units) -> (loss, stats)`. It returns a weighted SUM divided by `units`, the
`batch.units()` of the whole optimizer batch, so the parts that a batch is cut into add up to the same loss and gradient
however it is cut. `stats` are tensors that add up likewise: 0-d, or (2,) for a ratio of two sums, numerator first;
names that end in `_max` or `_min` are combined so instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_fast.batches import micro_batches
from rlhf_fast.config.fields import OptimConfig
from rlhf_fast.errors import BadRows, UserError

SHOWN = 8
"""Rows that an error names."""


class Trainable(Protocol):
    """What a learner needs of a model."""

    name: str

    def trainable(self) -> dict[str, torch.nn.Parameter]: ...

    def train_mode(self, dropout: float | None) -> AbstractContextManager[None]: ...


Loss = Callable[[Trainable, Any, float], tuple[Tensor, dict[str, Tensor]]]


def learning_rate(cfg: OptimConfig, step: int, total_steps: int) -> float:
    """Of step 0, 1, ...: a line from warmup_start * lr up to lr over warmup_steps, then lr, or half a cosine from lr
    down to final_ratio * lr, which the last step has."""
    if step < cfg.warmup_steps:
        return cfg.lr * (cfg.warmup_start + (1 - cfg.warmup_start) * step / cfg.warmup_steps)
    if cfg.schedule == "constant":
        return cfg.lr
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, total_steps - 1 - cfg.warmup_steps))
    return cfg.lr * (cfg.final_ratio + (1 - cfg.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


class Learner:
    """AdamW (torch's fused kernel) over what `model.trainable()` names.

    Weights in bfloat16 have float32 master copies and float32 gradients here, as in the paper; the model's own
    weights are the masters rounded. `dropout` is that of `Model.training`. `ema` > 0 keeps a moving average,
    average += (1 - ema) * (weights - average) after each step, starting at the first weights.
    """

    def __init__(
        self, model: Trainable, optim: OptimConfig, total_steps: int, *, dropout: float | None = None, ema: float = 0.0
    ):
        self.model, self.optim, self.total_steps, self.dropout, self.ema = model, optim, total_steps, dropout, ema
        self.steps = 0
        self.params = model.trainable()
        if any(p.dtype == torch.float16 for p in self.params.values()):
            raise UserError(f"{model.name}: float16 gradients underflow and loss scaling is not built; use bfloat16")
        self.masters = {name: _master(p) for name, p in self.params.items()}
        self.average = {name: p.detach().clone() for name, p in self.masters.items()} if ema else {}
        matrices = [p for p in self.masters.values() if p.dim() > 1]
        vectors = [p for p in self.masters.values() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
        )

    def step(self, loss: Loss | Sequence[tuple[Loss, object, float]], batch=None) -> dict[str, float]:
        """One optimizer step on `loss` over `batch`, or on the sum of several terms (loss, batch, coefficient), whose
        gradients meet in one buffer (PPO-ptx). Returns the stats, each term's averages under its own names, and
        `loss`, `grad_norm` before clipping, `lr`.

        A loss or gradient that is not finite is a UserError that names the rows; the weights are then as before.
        """
        terms = [(loss, batch, 1.0)] if batch is not None else list(loss)
        self.adam.zero_grad(set_to_none=True)
        losses, stats = [], {}
        with self.model.train_mode(self.dropout):
            for function, whole, coefficient in terms:
                for value, part_stats in self._backward(function, whole, coefficient):
                    losses.append(value)
                    _combine(stats, part_stats)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.masters.values() if p.grad is not None])
        total = torch.stack(losses).sum() if losses else torch.zeros(())
        result = _read({**stats, "loss": total, "grad_norm": norm})
        if not (math.isfinite(result["loss"]) and math.isfinite(result["grad_norm"])):
            self._stop(terms, result)
        result["lr"] = self._update(norm)
        return result

    def _backward(self, function: Loss, batch, coefficient: float) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Adds the gradient of coefficient * loss to the masters' gradients, part by part."""
        units = batch.units()
        if not units:
            return
        for _, part in micro_batches(batch, self.optim.micro_batch_tokens):
            value, stats = function(self.model, part, units)
            if value.requires_grad:
                (value * coefficient).backward()
            yield value.detach() * coefficient, stats

    @torch.no_grad()
    def _update(self, norm: Tensor) -> float:
        rate = learning_rate(self.optim, self.steps, self.total_steps)
        for group in self.adam.param_groups:
            group["lr"] = rate
        if self.optim.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), self.optim.grad_clip, norm)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self._round()
        if self.ema:
            torch._foreach_lerp_(list(self.average.values()), list(self.masters.values()), 1 - self.ema)
        self.steps += 1
        return rate

    @torch.no_grad()
    def _round(self) -> None:
        """The model's weights become the masters', rounded to their dtype."""
        for name, p in self.params.items():
            if p is not self.masters[name]:
                p.copy_(self.masters[name])

    def _stop(self, terms, result: dict[str, float]) -> None:
        """Looks for the rows that are to blame, one at a time, and raises."""
        rows = []
        for function, batch, coefficient in terms:
            for index, part in micro_batches(batch, 1):
                self.adam.zero_grad(set_to_none=True)
                value, _ = function(self.model, part, batch.units())
                if value.requires_grad:
                    (value * coefficient).backward()
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.masters.values() if p.grad is not None])
                if not (math.isfinite(float(value.detach())) and math.isfinite(float(norm))):
                    uids = index if batch.uids is None else batch.uids[index]
                    rows.append((type(batch).__name__, int(uids[0])))
        self.adam.zero_grad(set_to_none=True)
        shown = ", ".join(str(uid) for _, uid in sorted(rows)[:SHOWN]) + (" and others" if len(rows) > SHOWN else "")
        raise BadRows(
            f"optimizer step {self.steps + 1}: loss {result['loss']:g}, gradient norm {result['grad_norm']:g}"
            + (f", from rows {shown}" if rows else ", though from no row alone")
            + "; the weights are as before this step: look at these rows, or lower the learning rate",
            sorted(rows),
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the moving average as its weights within the block."""
        if not self.ema:
            raise ValueError("Learner.averaged: there is no average, ema is 0")
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in self.params.items()}
            for name, p in self.params.items():
                p.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.params.items():
                    p.copy_(kept[name])

    def state_dict(self) -> dict:
        """All that the next steps depend on, the trained weights too: a tree of tensors and numbers, not copied."""
        return {
            "steps": self.steps,
            "weights": {name: p.detach() for name, p in self.masters.items()},
            "adam": {name: dict(self.adam.state[p]) for name, p in self.masters.items() if p in self.adam.state},
            "ema": dict(self.average),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Puts back what `state_dict` gave, weights included. UserError if it is of another model."""
        for part, own in (("weights", self.masters), ("ema", self.average)):
            theirs = {name: tuple(value.shape) for name, value in state[part].items()}
            if theirs != {name: tuple(value.shape) for name, value in own.items()}:
                raise UserError(
                    f"{self.model.name}: the checkpoint's {part} are of another model or with other settings of LoRA or"
                    " EMA; give a new `out` folder, or the settings that the run began with"
                )
            for name, value in own.items():
                value.copy_(state[part][name])
        self._round()
        self.adam.state.clear()
        for name, moments in state["adam"].items():
            p = self.masters[name]
            self.adam.state[p] = {key: value.to(p.device) for key, value in moments.items()}
        self.steps = int(state["steps"])


def _master(p: torch.nn.Parameter) -> Tensor:
    """The float32 tensor that the optimizer moves: p itself, or a copy that takes over p's gradient, in float32."""
    if p.dtype == torch.float32:
        return p
    master = p.detach().float()

    def collect(p):
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    p.register_post_accumulate_grad_hook(collect)
    return master


def _combine(total: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    for name, value in part.items():
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
def evaluate(model: Trainable, loss: Loss, batches: Sequence, micro_batch_tokens: int) -> dict[str, float]:
    """The stats of `loss` over all `batches` together, without a step; nothing if they hold no units."""
    units, stats = sum(batch.units() for batch in batches), {}
    for batch in batches if units else ():
        for _, part in micro_batches(batch, micro_batch_tokens):
            _combine(stats, loss(model, part, units)[1])
    return _read(stats) if stats else {}


def _read(stats: dict[str, Tensor]) -> dict[str, float]:
    """The numbers, fetched from the device at once."""
    pairs = [value if value.dim() else torch.stack([value, torch.ones_like(value)]) for value in stats.values()]
    numbers = torch.stack([pair.detach().double().to(pairs[-1].device) for pair in pairs]).tolist()
    return {name: a / b if b else 0.0 for name, (a, b) in zip(stats, numbers, strict=True)}
