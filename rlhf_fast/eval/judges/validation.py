"""Validate a judge against labels, and choose the answers that a person shall label."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_fast.errors import UserError, listed
from rlhf_fast.eval.judges.labels import LabelledAnswer, read_answer_labels, read_labels, references_of, write_to_label
from rlhf_fast.eval.judges.probability import area_under_curve
from rlhf_fast.eval.judges.protocol import PREFERENCE, Judge, PairJudge, Validation, Verdict


def compare_with_labels(
    yes: Sequence[bool],
    verdicts: Sequence[Verdict],
    threshold: float,
    *,
    weights: Sequence[float] | None = None,
    labels: str = "",
    date: str = "",
    note: str = "",
) -> Validation:
    """Return a judge's figures against labels. Answers without a judgement are left out, and the note counts them.

    weights: how many answers each one stands for, where they were not drawn alike; None = one each.
    """
    judged = np.array([not verdict.unjudged for verdict in verdicts], bool)
    truth = np.array(yes, bool)[judged]
    scores = np.array([verdict.score for verdict in verdicts], float)[judged]
    weight = (np.ones(len(judged)) if weights is None else np.array(weights, float))[judged]
    found = scores > threshold
    flips = [verdict.flipped for verdict in verdicts if not math.isnan(verdict.flipped)]
    missing = "" if judged.all() else f"{(~judged).sum()} of {len(judged)} answers could not be judged"
    note = "; ".join(filter(None, [note, missing, _flips_note(int(sum(flips)), len(flips))]))
    return Validation(
        labels=labels,
        n=int(judged.sum()),
        accuracy=_share(found == truth, weight),
        recall=_share(found[truth], weight[truth]),
        false_alarms=_share(found[~truth], weight[~truth]),
        auc=area_under_curve(truth.tolist(), scores.tolist(), weight.tolist()),
        date=date,
        note=note,
    )


def _share(hits: np.ndarray, weight: np.ndarray) -> float | None:
    return float((hits * weight).sum() / weight.sum()) if weight.sum() else None


def validate_on_file(judge: Judge, path: str | Path, role: str, has_roles: bool = False) -> Validation | None:
    """Return the judge's figures on a file of people's labels {prompt, answer, label[, labeler][, weight][, role]}.

    Several labels of one answer are averaged; an answer is a yes if its mean is above 0.5, and one with a mean of 0.5
    is left out. Rows with a weight count that much: `choose_to_label` writes them. None if no label is left.
    has_roles: a row without `role` is an error.
    """
    labelled = read_answer_labels(path, role, has_roles)
    decided = [answer for answer in labelled if answer.label != 0.5]
    if not decided:
        return None
    verdicts = judge(
        [answer.prompt for answer in decided],
        [answer.answer for answer in decided],
        [answer.row for answer in decided],
    )
    ties = len(labelled) - len(decided)
    return compare_with_labels(
        [answer.label > 0.5 for answer in decided],
        verdicts,
        judge.threshold,
        weights=_weights(decided, path),
        labels=_names([name for answer in decided for name in answer.labelers], path),
        note=f"{ties} answers without a majority left out" if ties else "",
    )


def validate_pairs_on_file(judge: PairJudge, path: str | Path, has_roles: bool = False) -> Validation | None:
    """Return how often a judge of pairs, asked in both orders, prefers the answer that people prefer, ties by halves.

    Rows are {prompt, first, second, label[, labeler][, role]}. Ties of people are left out, and pairs without a
    judgement. None if none is left. The note says how often the winner turns with the order.
    """
    rows = [(row, label) for row, label in read_labels(path, PREFERENCE, has_roles) if label != 0.5]
    if not rows:
        return None
    prompts, first, second = ([row[key] for row, _ in rows] for key in ("prompt", "first", "second"))
    forward, backward = judge(prompts, first, second), judge(prompts, second, first)
    hits, flips = [], []
    for (_, label), one, other in zip(rows, forward, backward, strict=True):
        mean = (one + 1 - other) / 2
        if not math.isnan(mean):
            hits.append(0.5 if mean == 0.5 else float((mean > 0.5) == (label > 0.5)))
            flips.append((one > 0.5) != (1 - other > 0.5))
    if not hits:
        return None
    people = [str(row["labeler"]) for row, _ in rows if row.get("labeler")]
    note = _flips_note(sum(flips), len(flips))
    return Validation(_names(people, path), len(hits), sum(hits) / len(hits), note=note)


def _flips_note(count: int, total: int) -> str:
    """Return a note on how often the order decides; "" where it never does."""
    return f"the order in which it reads them decides {count} of {total}" if count else ""


def check_labels(path: str | Path, role: str) -> None:
    """Raise UserError if a file of people's labels, with a role in each row, cannot validate the judge of a role."""
    if role == PREFERENCE:
        for _ in read_labels(path, role, has_roles=True):
            pass
    else:
        _weights([answer for answer in read_answer_labels(path, role, has_roles=True) if answer.label != 0.5], path)


def _names(people: Sequence[str], path: str | Path) -> str:
    return listed(sorted(set(people))) or Path(path).name


def _weights(answers: Sequence[LabelledAnswer], path: str | Path) -> list[float] | None:
    given = [answer.weight is not None for answer in answers]
    if any(given) and not all(given):
        raise UserError(
            f"{path}: {sum(given)} of {len(given)} answers have a weight; give all of them one, or none: they say how"
            " many answers each stands for"
        )
    return [float(answer.weight) for answer in answers if answer.weight is not None] if any(given) else None


def choose_to_label(
    path: str | Path,
    role: str,
    prompts: Sequence[str],
    answers: Sequence[str],
    verdicts: Sequence[Verdict],
    threshold: float,
    count: int,
    seed: int = 0,
    rows: Sequence[Mapping[str, Any]] = (),
) -> int:
    """Write `count` answers for a person to label, half of them judged yes and half no; return their number.

    A row's weight is the number of answers that it stands for, so that `validate_on_file` counts as if all answers had
    been labelled. Where one half has too few answers, the other has more. Rows that an earlier call has written and
    nobody has labelled are taken out again. rows: with the references of a task, which go along.
    """
    if count < 2:
        raise UserError(f"{count} answers to label: give at least 2, one judged yes and one judged no")
    copies: tuple[dict[int, int], dict[int, int]] = ({}, {})  # an answer's first place -> how often it was given
    first_place: dict[tuple[str, str], int] = {}
    for i, verdict in enumerate(verdicts):
        if not verdict.unjudged:
            first = first_place.setdefault((prompts[i], answers[i]), i)
            half = copies[verdict.score > threshold]
            half[first] = half.get(first, 0) + 1
    take = [min(len(copies[0]), count // 2), min(len(copies[1]), count - count // 2)]
    take = [min(len(half), count - other) for half, other in zip(copies, take[::-1], strict=True)]
    rng = random.Random(seed)
    chosen = []
    for half, number in zip(copies, take, strict=True):
        chosen += [(i, half[i] * len(half) / number) for i in rng.sample(sorted(half), number)]
    rng.shuffle(chosen)  # the order must not give the judge's opinion away
    write_to_label(
        path,
        [
            {
                "prompt": prompts[i],
                "answer": answers[i],
                "label": None,
                "weight": weight,
                **(references_of(rows[i]) if rows else {}),
            }
            for i, weight in chosen
        ],
        role,
        redraw=True,
    )
    return len(chosen)
