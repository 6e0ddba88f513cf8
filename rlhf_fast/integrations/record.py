"""Count how often an op answered for lazy logits, and how often and by which line they were made."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path

import torch

from rlhf_fast.integrations.calls import is_strict

log = getLogger("rlhf_fast")
PASSED_OVER = tuple(f"{Path(path).parent}{os.sep}" for path in (torch.__file__, __file__))
"""Folders whose lines do not say who reads logits."""


def caller() -> str:
    """Return file:line of the innermost line that is neither torch's nor of this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PASSED_OVER):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Switch:
    """Say whether a layer gives lazy logits. Copies of the layer have the same switch: one handle turns all off."""

    def __init__(self, on: bool = True):
        self.on = on

    def __deepcopy__(self, memo: dict) -> Switch:
        return self


@dataclass
class Record:
    """Count what the logits of one model did.

    answered: calls of an op in place of logits.
    made: logits made for a reader that no op answers; `made_by` counts them by its line.
    direct: logits that the layer gave at once: decoding steps, inference mode, and tensors that the ops do not take.
    """

    model: str
    answered: int = 0
    made: int = 0
    direct: int = 0
    made_by: Counter[str] = field(default_factory=Counter)
    counts: bool = True
    switch: Switch = field(default_factory=Switch)

    def note_made(self, with_grad: bool) -> None:
        """Note that logits are made now. RuntimeError under RLHF_FAST_STRICT=1 if they are to have a gradient."""
        if not self.counts:
            return
        line = caller()
        if with_grad and is_strict():
            raise RuntimeError(f"RLHF_FAST_STRICT=1 and {line} reads logits of {self.model} that no op answers")
        if with_grad and line not in self.made_by:
            log.warning("lazy_head: %s reads logits of %s that no op answers; they were made", line, self.model)
        self.made += 1
        self.made_by[line] += 1


@dataclass
class Status:
    """Say what lazy logits did in a model; `lazy`: whether its output layer gives them now."""

    model: str
    lazy: bool
    answered: int
    made: int
    direct: int
    made_by: dict[str, int]

    def __str__(self) -> str:
        lines = [f"  {times} times by {line}" for line, times in self.made_by.items()]
        state = "lazy" if self.lazy else "not lazy"
        first = (
            f"{self.model}: {state}, answered by ops {self.answered} times, given at once {self.direct} times, made "
        )
        return "\n".join([f"{first}{self.made} times", *lines])
