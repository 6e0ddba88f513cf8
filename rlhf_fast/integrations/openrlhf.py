"""OpenRLHF's Actor with rlhf-fast's head, and its PPO losses and GAE by the ops.

    from rlhf_fast.integrations import openrlhf

    with openrlhf.fused(actor):
        trainer.fit()

SFT, DPO and PPO take log-probabilities from the same `Actor.forward`. Its model gets lazy logits, which the two
functions that read them there answer by `ops.linear_logprobs`, one call for both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.integrations.calls import Calls
from rlhf_fast.integrations.handle import Handle
from rlhf_fast.integrations.hooks import Hook, check, check_version
from rlhf_fast.integrations.import_hook import after_import
from rlhf_fast.integrations.lazy_forward import LazyHead, lazy_head
from rlhf_fast.integrations.lazy_logits import LazyLogits
from rlhf_fast.integrations.openrlhf_losses import gae_forward, policy_loss_forward, value_loss_forward

TESTED, SERIES = "0.11.2", "0.11."
ACTOR, LOSS = "openrlhf.models.actor", "openrlhf.models.loss"
EXPERIENCE = "openrlhf.trainer.ppo_utils.experience_maker"


def _hook(module: str, name: str, arguments: str = "", contains: str = "") -> Hook:
    return Hook(
        "openrlhf", TESTED, module.replace(".", "/") + ".py", name, tuple(arguments.split()) or None, contains
    )  # fmt: skip


_TOTALS = "dp_size batch_num_tokens global_batch_size"
HEAD_HOOKS = (
    _hook(ACTOR, "Actor.forward", contains="log_probs_from_logits(output['logits'], rolled_sequences)"),
    _hook(ACTOR, "Actor.forward", contains="compute_entropy(output['logits'])"),
    _hook(ACTOR, "Actor.forward", contains="output['logits'].div_(self.temperature)"),
    _hook(ACTOR, "log_probs_from_logits"),
    _hook(ACTOR, "compute_entropy"),
    _hook("openrlhf.models.utils", "log_probs_from_logits", "logits labels temperature"),
    _hook("openrlhf.models.utils", "compute_entropy", "logits"),
)
LOSS_HOOKS = (
    _hook(LOSS, "aggregate_loss", f"loss loss_mask token_level_loss {_TOTALS}"),
    _hook(
        LOSS, "PolicyLoss.__init__",
        "self clip_eps_low clip_eps_high dual_clip token_level_loss policy_loss_type is_correction_level"
        " is_correction_mode is_correction_gating is_correction_threshold",
    ),
    _hook(
        LOSS, "PolicyLoss.forward", f"self log_probs old_log_probs advantages action_mask rollout_log_probs {_TOTALS}",
        "raw_policy_log_ratio.clamp(min=-20.0, max=20.0)",
    ),
    _hook(LOSS, "PolicyLoss.forward", contains="return (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio)"),
    _hook(LOSS, "ValueLoss.__init__", "self clip_eps token_level_loss"),
    _hook(LOSS, "ValueLoss.forward", f"self values old_values returns action_mask {_TOTALS}", "return 0.5 * loss"),
    _hook(
        EXPERIENCE, "RemoteExperienceMaker.get_advantages_and_returns",
        "self values rewards action_mask gamma lambd", "delta + gamma * lambd * lastgaelam",
    ),
)  # fmt: skip
HOOKS = HEAD_HOOKS + LOSS_HOOKS


class Fused(Handle):
    """Replace OpenRLHF's functions until `remove()` or the end of the `with` block. `status` says what they did."""

    call = "openrlhf.fused(actor)"

    def __init__(self, model: Any, losses: bool):
        self._calls = Calls("openrlhf")
        self._head: LazyHead | None = None
        self._names: list[tuple[Any, str]] = []
        actor = None if model is None else import_module(ACTOR)
        loss = import_module(LOSS) if losses else None
        try:
            if actor is not None:
                self._head = lazy_head(model)
                self._put(actor, "log_probs_from_logits", log_probs_from_logits)
                self._put(actor, "compute_entropy", compute_entropy)
            if loss is not None:
                _WITH_LOSSES.append(self)
                self._put(loss.PolicyLoss, "forward", policy_loss_forward, loss.aggregate_loss, _current_calls)
                self._put(loss.ValueLoss, "forward", value_loss_forward, loss.aggregate_loss, _current_calls)
                after_import(EXPERIENCE, _replace_gae)  # it imports ray and vllm
        except BaseException:
            self.remove()
            raise

    @property
    def status(self) -> Calls:
        """The counts so far: of the ops that lazy logits of the actor's model called, the losses and GAE."""
        parts = [self._calls] if self._head is None else [self._head.status, self._calls]
        answered = sum((part.answered for part in parts), Counter())
        return Calls("openrlhf", answered, sum((part.fallbacks for part in parts), Counter()))

    @property
    def is_open(self) -> bool:
        return bool(self._names)

    def remove(self) -> None:
        """Put back what OpenRLHF had, if no other handle needs it. A second call does nothing."""
        if self._head is not None:
            self._head.remove()
        if self in _WITH_LOSSES:
            _WITH_LOSSES.remove(self)
        while self._names:
            owner, name = self._names.pop()
            replaced = _REPLACED[owner, name]
            replaced.handles -= 1
            if not replaced.handles:
                del _REPLACED[owner, name]
                if vars(owner)[name] is replaced.ours:  # else somebody has replaced it since
                    setattr(owner, name, replaced.original)

    def _put(self, owner: Any, name: str, make: Callable, *given: Any) -> None:
        """Put `make(original, *given)` in the place of a name, unless another handle has done so."""
        if (owner, name) in self._names:
            return
        if (owner, name) not in _REPLACED:
            original = vars(owner)[name]
            ours = make(original, *given)
            setattr(owner, name, ours)
            _REPLACED[owner, name] = _Replaced(original, ours)
        _REPLACED[owner, name].handles += 1
        self._names.append((owner, name))


@dataclass
class _Replaced:
    """Remember a function of OpenRLHF's, what stands in its place, and how many handles need that."""

    original: Any
    ours: Any
    handles: int = 0


_REPLACED: dict[tuple[Any, str], _Replaced] = {}
_WITH_LOSSES: list[Fused] = []
"""The handles that replace losses now, the newest last."""


def _current_calls() -> Calls:
    """Return the counts of the newest handle that replaces losses."""
    return _WITH_LOSSES[-1]._calls if _WITH_LOSSES else Calls("openrlhf")


def _replace_gae(module: Any) -> None:
    """Replace the GAE for each handle that replaces losses and has not done so."""
    for handle in _WITH_LOSSES:
        handle._put(module.RemoteExperienceMaker, "get_advantages_and_returns", gae_forward, _current_calls)


def fused(actor: Any = None, *, losses: bool = False) -> Fused:
    """Let an OpenRLHF Actor score tokens without making logits, until `remove()` of what this returns or the end of its
    `with` block.

    actor: an `openrlhf.models.Actor`, before or after `strategy.prepare`; None in a process without one (critic).
        Policy and reference have a handle each.
    losses: replace PolicyLoss and ValueLoss too, and the GAE of RemoteExperienceMaker, also where its module is
        imported later. Option sets that `ops.ppo_loss` does not have stay OpenRLHF's: gspo, corrections by sequence,
        with a lower bound, or by binary_kl and tv. Of several handles in a process the newest counts the calls.

    Packing, ring attention and everything else stay OpenRLHF's.
    UserError: OpenRLHF is not installed, is not of 0.11, or has another function where one is replaced; the actor's
        output layer is not a plain linear one, or is split by ZeRO-3.
    """
    if actor is None and not losses:
        raise UserError("openrlhf: nothing to replace; pass an Actor, or losses=True")
    check_version("openrlhf", TESTED, SERIES)
    check((HEAD_HOOKS if actor is not None else ()) + (LOSS_HOOKS if losses else ()))
    if actor is not None and not isinstance(actor, import_module(ACTOR).Actor):
        raise UserError(f"openrlhf: pass an Actor of openrlhf.models, not a {type(actor).__name__}")
    return Fused(None if actor is None else actor.model, losses)


def log_probs_from_logits(original: Callable) -> Callable:
    """Return the function of openrlhf.models.actor for lazy logits too. flash_attn's kernel, which OpenRLHF's calls,
    reads memory that they do not have."""

    def answer(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        if not isinstance(logits, LazyLogits):
            return original(logits, labels, temperature)
        if temperature != 1:
            logits.div_(temperature)
        return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    return answer


def compute_entropy(original: Callable) -> Callable:
    """Return the function of openrlhf.models.actor for lazy logits too, which torch.compile does not take."""

    def answer(logits: Tensor) -> Tensor:
        if not isinstance(logits, LazyLogits):
            return original(logits)
        return torch.logsumexp(logits, dim=-1) - (logits.softmax(-1) * logits).sum(-1)

    return answer
