"""The table of judges' validations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rlhf_fast.eval.judges.protocol import Validation


class Checked(NamedTuple):
    """One line of the table."""

    role: str
    how: str
    """The origin of the figures: folds, stored, own labels, another family."""
    validation: Validation


def table(rows: Sequence[Checked]) -> str:
    """Return the lines of a plain table, one a validation, with its note below."""
    head = f"{'judge':12s} {'figures from':18s} {'n':>6s} {'accuracy':>8s} {'recall':>6s} {'false':>6s} {'AUC':>6s}"
    lines = [f"{head}  labels"]
    for role, how, validation in rows:
        figures = " ".join(
            f"{'-' if value is None else f'{value:.3f}':>{width}s}"
            for value, width in zip(validation[2:6], (8, 6, 6, 6), strict=True)
        )
        lines.append(f"{role:12s} {how:18s} {validation.n:6d} {figures}  {validation.labels}")
        if validation.note:
            lines.append(f"{'':12s} {validation.note}")
    return "\n".join(lines)
