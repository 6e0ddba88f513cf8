"""A judge whose verdicts are kept: an evaluation asks about each answer once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_fast.eval.answers import row_key
from rlhf_fast.eval.judges.protocol import Judge, Verdict


class CachedJudge:
    """Asks a judge once about an answer to a row, however many models, tasks and callers want the verdict."""

    def __init__(self, judge: Judge):
        self.judge, self.name, self.threshold, self.validation = judge, judge.name, judge.threshold, judge.validation
        self._verdicts: dict[tuple[str, str, str], Verdict] = {}

    def __call__(
        self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[Verdict]:
        parts = zip(prompts, answers, rows, strict=True)
        keys = [(prompt, answer, row_key(dict(row))) for prompt, answer, row in parts]
        new: dict[tuple[str, str, str], int] = {}
        for i, key in enumerate(keys):
            if key not in self._verdicts:
                new.setdefault(key, i)
        if new:
            index = list(new.values())
            found = self.judge([prompts[i] for i in index], [answers[i] for i in index], [rows[i] for i in index])
            self._verdicts |= dict(zip(new, found, strict=True))
        return [self._verdicts[key] for key in keys]
