"""Count what an op answered in another trainer, and what was left to the trainer's own function."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from logging import getLogger

import torch
from torch import Tensor

log = getLogger("rlhf_fast")


def is_strict() -> bool:
    """Return whether RLHF_FAST_STRICT=1 is set, under which a fallback is an error."""
    return os.environ.get("RLHF_FAST_STRICT") == "1"


@dataclass
class Calls:
    """Count the calls of a library's functions: `answered` by an op, and `fallbacks` to its own, by reason."""

    library: str
    answered: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)

    def note_fallback(self, name: str, reason: str, tensors: Iterable[Tensor] = ()) -> None:
        """Count a call that the library's own function answers, and log the first for each reason. RuntimeError under
        RLHF_FAST_STRICT=1 if a tensor has a gradient."""
        text = f"{name}: {reason}"
        if is_strict() and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            raise RuntimeError(f"RLHF_FAST_STRICT=1 and {self.library}'s own function is called, {text}")
        if text not in self.fallbacks:
            log.warning("%s's own function is called, %s", self.library, text)
        self.fallbacks[text] += 1

    def __str__(self) -> str:
        answered = [f"{name} {times}" for name, times in self.answered.items()]
        lines = [f"{self.library}: calls that an op answered: {', '.join(answered) or 'none'}"]
        lines += [f"  {self.library}'s own function, {times} times, {text}" for text, times in self.fallbacks.items()]
        return "\n".join(lines)
