"""verl's fused head by `ops.linear_logprobs`, and which models it is wrong for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.integrations.calls import Calls, need_grad
from rlhf_fast.model.logit_scales import SCALES, SOFTCAPS


def fused_head(theirs: Any, calls: Calls) -> type:
    """Return a class that stands for verl's FusedLinearForPPO, `theirs`, and scores tokens by the op.

    The installed Liger kernel stays where `impl_backend` asks for it. What the op does not take is left to verl."""

    class FusedLinearForPPO(theirs):
        def forward(
            self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
        ) -> tuple[Tensor, Tensor]:
            if self.impl_backend == "liger" and _liger_is_installed(theirs):
                return super().forward(hidden_states, vocab_weights, input_ids, temperature)
            if reason := _unsupported(hidden_states, vocab_weights, temperature):
                calls.note_fallback("FusedLinearForPPO", reason, need_grad(hidden_states, vocab_weights))
                return super().forward(hidden_states, vocab_weights, input_ids, temperature)
            from rlhf_fast import ops
            from rlhf_fast.integrations.head import LinearHead, multiplied_in

            calls.answered["FusedLinearForPPO"] += 1
            hidden, head = multiplied_in(hidden_states, LinearHead(vocab_weights))
            targets = input_ids.to(torch.int64)
            logprobs, entropy, _, _ = ops.linear_logprobs(hidden, head.weight, targets, temperature=float(temperature))
            return logprobs, entropy.to(hidden_states.dtype)

    return FusedLinearForPPO


def refusing(theirs: Callable) -> Callable:
    """Return verl's patch_forward_with_backends, which refuses models whose head FusedLinearForPPO does not compute."""

    @functools.wraps(theirs)
    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        if use_fused_kernels and fused_kernels_backend in ("torch", "liger") and (fault := head_fault(model)):
            raise UserError(
                f"{type(model).__name__}: its output layer has {fault}, which verl's use_fused_kernels leaves out of"
                " the log-probabilities; set actor_rollout_ref.model.use_fused_kernels=False"
            )
        theirs(model, use_fused_kernels, fused_kernels_backend)

    return patch_forward_with_backends


def head_fault(model: Any) -> str:
    """Return "" if the logits of a model are a product with `lm_head.weight` alone, else what they have besides."""
    config = model.config.get_text_config()
    for name in SOFTCAPS:
        if softcap := getattr(config, name, None):
            return f"a soft cap ({name}={softcap})"
    for name in SCALES:
        if getattr(config, name, None) not in (None, 1):
            return f"a scale ({name}={getattr(config, name)})"
    layer = getattr(model, "lm_head", None)
    if getattr(layer, "bias", None) is not None:
        return "a bias"
    if hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save"):
        return "an adapter"
    return ""


def _liger_is_installed(theirs: Any) -> bool:
    liger = "_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY"
    return theirs.forward.__globals__.get(liger) is not None


def _unsupported(hidden: Tensor, weight: Tensor, temperature: Any) -> str:
    """Return the reason why the op cannot answer, or ""."""
    from rlhf_fast.integrations.head import is_dtensor  # which loads the ops

    if is_dtensor(hidden) or is_dtensor(weight):
        return "the head's weight is split over ranks (DTensor)"
    if hidden.device.type not in ("cpu", "cuda"):
        return f"the op runs on cpu and cuda, not on {hidden.device.type}"
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        return "the op takes one temperature for all tokens"
    return ""
