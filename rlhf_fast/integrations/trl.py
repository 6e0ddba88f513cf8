"""TRL's trainers with rlhf-fast's head: SFT, DPO, KTO, GRPO, RLOO and async GRPO, of trl 1.15 and later.

    from rlhf_fast.integrations import trl as fast_trl

    with fast_trl.fused():
        trainer.train()

All of them take log-probabilities, entropies and the top-1 metric from one autograd function of TRL's, which is
replaced by `ops.linear_logprobs`. Losses, metrics, generation and the rest stay TRL's.
"""

from __future__ import annotations

import inspect
import logging
import re
from typing import Any

from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.integrations.calls import Calls, need_grad
from rlhf_fast.integrations.handle import Handle
from rlhf_fast.integrations.head import LinearHead, multiplied_in
from rlhf_fast.integrations.hooks import Hook, check, library_version

log = logging.getLogger(__name__)

TESTED = "1.16.0"
OLDEST = (1, 15)
REPLACED = "ChunkedLogProbFunction"
ARGUMENTS = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
"""Arguments of `forward` of the function that is replaced."""
CALLED = {"contains": "fused_lm_head=True"}
OUTPUTS = {"log_probs", "entropy", "mean_logits", "is_top1"}
"""Outputs that the op answers; each but the first is made only if asked for."""
SHARED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("kernels/chunked_logprob.py", "ChunkedLogProbFunction.forward", {"arguments": ARGUMENTS}),
    ("trainer/utils.py", "_ChunkedLogProbFunction", {}),
    ("trainer/utils.py", "_use_triton", {"optional": True}),
    ("trainer/utils.py", "add_fused_lm_head", {"contains": "_ChunkedLogProbFunction.apply("}),
)
"""The function that is replaced, its names, and what calls it for all trainers."""
TRAINERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("trainer/sft_trainer.py", "SFTTrainer.compute_loss", CALLED),
    ("trainer/dpo_trainer.py", "DPOTrainer._compute_loss", CALLED),
    ("trainer/kto_trainer.py", "KTOTrainer._compute_loss", CALLED),
    ("trainer/grpo_trainer.py", "GRPOTrainer._get_per_token_logps_and_entropies", CALLED),
    ("trainer/rloo_trainer.py", "RLOOTrainer._get_per_token_logps_and_entropies", CALLED),
    ("experimental/async_grpo/async_grpo_trainer.py", "AsyncGRPOTrainer.compute_loss", CALLED),
)
HOOKS = tuple(Hook("trl", TESTED, f"trl/{file}", name, **rest) for file, name, rest in SHARED + TRAINERS)
SHARED_HOOKS = HOOKS[: len(SHARED)]


class Fused(Handle):
    """TRL's function, replaced until `remove()` or the end of the `with` block. `status` counts the calls."""

    call = "trl.fused()"

    def __init__(self, utils: Any):
        self.status = Calls("trl")
        self._utils = utils
        self._original = utils._ChunkedLogProbFunction
        self._replaced: dict[str, tuple[Any, Any]] = {}
        self._put("_ChunkedLogProbFunction", self)
        if uses_triton := getattr(utils, "_use_triton", None):  # from 1.16 on, which alone scores all rows on a CPU
            self._put("_use_triton", lambda device: device.type == "cpu" or uses_triton(device))

    def _put(self, name: str, ours: Any) -> None:
        self._replaced[name] = getattr(self._utils, name), ours
        setattr(self._utils, name, ours)

    @property
    def is_open(self) -> bool:
        return bool(self._replaced)

    def remove(self) -> None:
        """Put back what TRL had, but for names that somebody else has replaced since; warn if no call came. A second
        call does nothing."""
        if self._replaced and not (self.status.answered or self.status.fallbacks or self.failed):
            log.warning(
                "no trainer of TRL's scored tokens while trl was fused: of trl %s only trainers that call"
                " add_fused_lm_head do",
                library_version("trl"),
            )
        for name, (original, ours) in self._replaced.items():
            if getattr(self._utils, name, None) is ours:
                setattr(self._utils, name, original)
        self._replaced = {}

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (*OUTPUTS, "log_sum_sq_probs"),
    ) -> tuple[Tensor | None, ...]:
        """Return log p, entropy, None, the mean logit and whether the target is the likeliest, of each row, as
        TRL's function does: z = softcap(logit_scale x) / temperature, of raw logits x."""
        head = _head(weight, bias, logit_scale, final_logit_softcapping, temperature)
        if reason := _unsupported(head, outputs):
            self.status.note_fallback(REPLACED, reason, need_grad(hidden, weight))
            return self._original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        self.status.answered[REPLACED] += 1
        hidden, head = _multiplied_in(hidden, head)
        logprobs, entropy, _, top1 = head.logprobs(hidden, targets)
        return (
            logprobs,
            entropy if "entropy" in outputs else None,
            None,
            head.detach().mean_logit(hidden.detach()) if "mean_logits" in outputs else None,
            top1 if "is_top1" in outputs else None,
        )


def fused() -> Fused:
    """Let TRL's trainers score tokens by `ops.linear_logprobs`, until `remove()` of what this returns or the end of its
    `with` block; trainers that were made before do so too.

    Only rows with a label reach the head, also on a CPU, where TRL scores prompts and padding as well. As in TRL the
    products are in the dtype of autocast or of the hidden states. A tie for the largest logit counts as top-1 whichever
    token comes first; TRL's own function counts the first alone. Two outputs are left to TRL's function, and counted:
    log_sum_sq_probs (DPO with use_weighting) and the mean logit of a model with a soft cap.
    UserError: trl is not installed, is older than 1.15, has another signature, or is replaced already.
    """
    found = library_version("trl")
    if found is None:
        raise UserError(f"trl is not installed: pip install trl=={TESTED}")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST:
        raise UserError(
            f"trl {found} has no function that all its trainers share: install trl=={TESTED}, or let the model make"
            " logits only where they are read, by rlhf_fast.integrations.lazy_head(model)"
        )
    check(SHARED_HOOKS)
    from trl.trainer import utils

    original: Any = getattr(utils, "_ChunkedLogProbFunction", None)
    if isinstance(original, Fused):
        raise UserError("trl is fused already: end that `with` block, or call remove() of what fused() returned")
    arguments = tuple(inspect.signature(original.forward).parameters) if hasattr(original, "forward") else ()
    if arguments != ARGUMENTS:
        has = f"takes ({', '.join(arguments)})" if arguments else "is not there"
        raise UserError(
            f"trl {found}: trl.trainer.utils._ChunkedLogProbFunction {has}, not ({', '.join(ARGUMENTS)}) as in the"
            f" tested version: install trl=={TESTED}"
        )
    return Fused(utils)


def _head(weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float) -> LinearHead:
    """Return the head whose logits are softcap(scale x) / temperature."""
    head = LinearHead(weight, bias).scaled(scale)
    if softcap is not None:
        capped = head.soft_capped(softcap or 1.0)  # TRL reads a soft cap of 0 as 1
        assert capped is not None
        head = capped
    return head.scaled(1 / temperature)


def _unsupported(head: LinearHead, outputs: tuple[str, ...]) -> str:
    """Return the reason why the op cannot answer, or ""."""
    if others := sorted(set(outputs) - OUTPUTS):
        return f"it is asked for {', '.join(others)}, which linear_logprobs does not return"
    if "mean_logits" in outputs and head.capped:
        return "the mean logit under a soft cap is no product with the mean of the weight"
    if not head.fits_ops:
        return "the op takes a positive and finite temperature, soft cap and scale alone"
    if hasattr(head.weight, "ds_id"):
        return "DeepSpeed ZeRO-3 gathers the weight anew for the backward pass"
    return ""


def _multiplied_in(hidden: Tensor, head: LinearHead) -> tuple[Tensor, LinearHead]:
    """Return them in the dtype in which TRL multiplies them: that of the hidden states without autocast."""
    hidden, head = multiplied_in(hidden, head)
    # A 16-bit weight for wider hidden states the op itself multiplies in float32, without a copy of it.
    return hidden, head if hidden.dtype.itemsize > 2 else head.to(hidden.dtype)
