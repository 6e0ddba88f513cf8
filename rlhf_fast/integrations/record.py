"""Count how often an op answered for lazy logits, and how often and by which line they were made."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from rlhf_fast.integrations.calls import Calls
from rlhf_fast.integrations.switch import Switch

PASSED_OVER = tuple(f"{Path(path).parent}{os.sep}" for path in (torch.__file__, __file__))
"""Folders whose lines do not say who reads logits."""


def caller() -> str:
    """Return file:line of the innermost line that is neither torch's nor of this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PASSED_OVER):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@dataclass
class LogitsCalls(Calls):
    """Count what the logits of one model did. A fallback is logits that were made for a line that no op answers.

    direct: logits that the layer gave at once: decoding steps, inference mode, and tensors that the ops do not take.
    lazy: whether the output layer gives lazy logits, when the status was asked for.
    """

    direct: int = 0
    lazy: bool = False
    switch: Switch = field(default_factory=Switch, repr=False, compare=False)

    def note_made(self, with_grad: bool) -> None:
        """Note that logits are made now. RuntimeError under RLHF_FAST_STRICT=1 if they are to have a gradient."""
        reason = f"{caller()} reads its logits, which no op answers"
        self.note_fallback("output layer", reason, with_grad, warns=with_grad)

    def snapshot(self, lazy: bool) -> LogitsCalls:
        """Return a copy, which later calls do not change."""
        return replace(self, answered=Counter(self.answered), fallbacks=Counter(self.fallbacks), lazy=lazy)

    def __str__(self) -> str:
        first, *rest = super().__str__().splitlines()
        state = f"{'lazy' if self.lazy else 'not lazy'} now, logits given at once {self.direct} times"
        return "\n".join([f"{first}; {state}", *rest])
