"""Count what rlhf_fast answered in another trainer, and what was left to the trainer's own functions."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from logging import getLogger

import torch
from torch import Tensor

log = getLogger("rlhf_fast")


def is_strict() -> bool:
    """Return whether RLHF_FAST_STRICT=1 is set, under which a fallback is an error."""
    return os.environ.get("RLHF_FAST_STRICT") == "1"


def need_grad(*tensors: Tensor) -> bool:
    """Return whether a function of these tensors has a gradient now."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@dataclass
class Calls:
    """Count the calls of functions that a library or a model owns: `answered` by rlhf_fast, by function, and
    `fallbacks` to the owner's, by function and reason. Every handle has one as its `status`."""

    owner: str
    answered: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    _warned: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def note_fallback(self, name: str, reason: str, with_grad: bool = False, warns: bool = True) -> None:
        """Count a call that the owner's function `name` answers.

        with_grad: the call is one of training: RuntimeError under RLHF_FAST_STRICT=1. warns: log the first for each
        reason."""
        text = f"{name}: {reason}"
        if with_grad and is_strict():
            raise RuntimeError(f"RLHF_FAST_STRICT=1 and {self.owner} calls its own {text}")
        if warns and text not in self._warned:
            self._warned.add(text)
            log.warning("%s calls its own %s", self.owner, text)
        self.fallbacks[text] += 1

    def __str__(self) -> str:
        answered = [f"{name} {times}" for name, times in self.answered.items()]
        lines = [f"{self.owner}: answered by rlhf_fast: {', '.join(answered) or 'none'}"]
        return "\n".join(lines + [f"  {times} times its own {text}" for text, times in self.fallbacks.items()])
