"""Judges that look up people's labels in a JSONL file, and the file that asks people for the labels that are missing.

    roles of single answers   {"prompt", "answer", "label"}: true, false, "yes", "no" or a number; null = not labelled
    preference                {"prompt", "first", "second", "label"}: "first", "second" or "tie"

Rows may have "labeler", and "role" where one file serves several roles. Several labels of one answer are averaged.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.data.fields import InvalidRow, json_type
from rlhf_fast.data.json_lines import parse_object, read_lines
from rlhf_fast.errors import UserError, did_you_mean, writing
from rlhf_fast.eval.cells import show
from rlhf_fast.eval.estimates import agreement
from rlhf_fast.eval.judges.protocol import PREFERENCE, QUESTIONS, Validation, Verdict, unjudged
from rlhf_fast.run.outputs import replacing

TO_LABEL = "to_label.jsonl"
LARGEST = sys.float_info.max
WINNERS = {"first": 1.0, "second": 0.0, "tie": 0.5}
KEYS = {PREFERENCE: ("prompt", "first", "second")}
ANSWER_KEYS = ("prompt", "answer")
REFERENCES = ("question", "correct_answers", "incorrect_answers")
LOOKED_UP = "these are labels, not guesses"


class LabelledAnswer(NamedTuple):
    """One answer with the mean of its labels."""

    prompt: str
    answer: str
    label: float
    labels: tuple[float, ...]
    """Labels that the mean is of."""
    labelers: tuple[str, ...]
    weight: float | None
    row: Mapping[str, Any]
    """The first of its rows."""


class Unlabelled(NamedTuple):
    """Answers, or pairs of them, that a file of labels has no label for."""

    path: Path
    """The file of labels."""
    role: str
    rows: list[dict[str, Any]]
    """Rows that ask for them, each once."""
    total: int
    """Number of different answers or pairs that were looked up."""

    def __str__(self) -> str:
        what = "pairs" if self.role == PREFERENCE else "answers"
        return f"{len(self.rows)} of {self.total} {what} have no label of {self.role}"


class MissingLabels(UserError):
    """Answers have no label. `path` is the file that asks for them."""

    def __init__(self, message: str, path: Path):
        super().__init__(message)
        self.path = path


def read_labels(path: str | Path, role: str, has_roles: bool = False) -> Iterator[tuple[dict[str, Any], float]]:
    """Yield each labelled row of a role and its label as a number. UserError with file:line for a bad row.

    has_roles: the file serves several roles, so that a row without `role` is an error, and a file without any label.
    """
    read = _winner if role == PREFERENCE else _number
    has_row = has_label = False
    for number, line in read_lines(path):
        has_row = True
        try:
            row = parse_object(line)
            if has_roles and not isinstance(row.get("role"), str):
                raise InvalidRow(f"no role in the row; give one of {', '.join(QUESTIONS)}, so that its judge is known")
            has_label |= row.get("label") is not None
            if _role(row.get("role", role)) != role:
                continue
            for key in KEYS.get(role, ANSWER_KEYS):
                if not isinstance(row.get(key), str):
                    fault = f"must be text, found {json_type(row[key])}" if key in row else "is missing; give its text"
                    raise InvalidRow(f"{key} {fault}")
            if "label" not in row:
                raise InvalidRow("no label in the row; give one, or null if nobody has labelled it yet")
            label = read(row["label"])
        except InvalidRow as error:
            raise UserError(f"{path}:{number}: {error}") from error
        if label is not None:
            yield row, label
    if has_roles and not has_label:
        fault = "none of its rows has a label" if has_row else "has no row"
        raise UserError(f"{path}: {fault}; fill in `label`, or leave the file out")


def _role(role: object) -> str:
    """Return the role of a row. InvalidRow for what is none."""
    if isinstance(role, str) and role in QUESTIONS:
        return role
    shown = role if isinstance(role, str) else json.dumps(role)
    hint = did_you_mean(shown, QUESTIONS, "")
    raise InvalidRow(f"no role {shown}; the roles are {', '.join(QUESTIONS)}{'; ' * bool(hint)}{hint}")


def _may_begin(path: str | Path, out: str | Path) -> bool:
    """Return whether a file of labels is not there yet, in a folder that is, or will be since it is `out`."""
    folder = Path(path).parent
    return not Path(path).exists() and (folder.is_dir() or folder.absolute() == Path(out).absolute())


def _number(label: object) -> float | None:
    """Return a label as a number. InvalidRow for what is no label."""
    if label is None:
        return None
    if isinstance(label, str) and (word := label.strip().lower()) in ("yes", "no", "true", "false"):
        return float(word in ("yes", "true"))
    if isinstance(label, (bool, int, float)) and abs(label) <= LARGEST:
        return float(label)
    raise InvalidRow(f'a label is true, false, "yes", "no" or a number, not {json.dumps(label)}')


def _winner(label: object) -> float | None:
    if label is None:
        return None
    if isinstance(label, str) and label in WINNERS:
        return WINNERS[label]
    raise InvalidRow(f'a label of two answers is "first", "second" or "tie", not {json.dumps(label)}')


def read_answer_labels(path: str | Path, role: str, has_roles: bool = False) -> list[LabelledAnswer]:
    """Return the labelled answers of a file, each once."""
    found: dict[tuple[str, str], list[tuple[dict[str, Any], float]]] = {}
    for row, label in read_labels(path, role, has_roles):
        found.setdefault((row["prompt"], row["answer"]), []).append((row, label))
    answers = []
    for (prompt, answer), labels in found.items():
        people = tuple(sorted({str(row["labeler"]) for row, _ in labels if row.get("labeler")}))
        mean = sum(label for _, label in labels) / len(labels)
        weight = labels[0][0].get("weight")
        if weight is not None and not (isinstance(weight, (int, float)) and 0 < weight <= LARGEST):
            raise UserError(f"{path}: a weight must be a number above 0, not {json.dumps(weight)}")
        answers.append(LabelledAnswer(prompt, answer, mean, tuple(x for _, x in labels), people, weight, labels[0][0]))
    return answers


class LabelJudge:
    """Looks the label of an answer up by its prompt and text. out: the folder for TO_LABEL.

    A file that is not there yet, in a folder that is, has no label.
    """

    threshold = 0.5
    validation: Validation | None

    def __init__(self, path: str | Path, role: str, out: str | Path = "."):
        self.path, self.role, self.out, self.name = Path(path), role, Path(out), str(path)
        labelled = [] if _may_begin(path, out) else read_answer_labels(path, role)
        self.labels = {(each.prompt, each.answer): each.label for each in labelled}
        people = sorted({name for each in labelled for name in each.labelers})
        note = _agreement_note([each.labels for each in labelled])
        self.validation = Validation(", ".join(people) or "people", len(labelled), note=note)

    def __call__(
        self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()
    ) -> list[Verdict]:
        """Return the labels. MissingLabels if an answer has none; an empty one needs none."""
        require_labels([self.unlabelled(prompts, answers, rows)], self.out)
        keys = zip(prompts, answers, strict=True)
        return [Verdict(self.labels[key]) if key in self.labels else unjudged("empty") for key in keys]

    def unlabelled(
        self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()
    ) -> Unlabelled:
        """Return the answers that need a label and have none. rows: with the references of a task, which go along."""
        keys = list(zip(prompts, answers, strict=True))
        given = dict(zip(reversed(keys), reversed(rows), strict=True)) if rows else {}  # the first of equal ones
        missing = [key for key in dict.fromkeys(keys) if key not in self.labels and key[1].strip()]
        asked = [
            {"prompt": key[0], "answer": key[1], "label": None, **references_of(given.get(key, {}))} for key in missing
        ]
        return Unlabelled(self.path, self.role, asked, len(set(keys)))


class LabelPairJudge:
    """Looks the label of two answers up, in either order. out: the folder for TO_LABEL."""

    def __init__(self, path: str | Path, out: str | Path = "."):
        self.path, self.out, self.name = Path(path), Path(out), str(path)
        found: dict[tuple[str, str, str], list[float]] = {}
        people = set()
        for row, label in () if _may_begin(path, out) else read_labels(path, PREFERENCE):
            found.setdefault((row["prompt"], row["first"], row["second"]), []).append(label)
            found.setdefault((row["prompt"], row["second"], row["first"]), []).append(1 - label)
            people |= {str(row["labeler"])} if row.get("labeler") else set()
        self.labels = {key: sum(labels) / len(labels) for key, labels in found.items()}
        table = [labels for (_, one, other), labels in found.items() if one <= other]  # each pair in one order
        self.validation: Validation | None = Validation(
            ", ".join(sorted(people)) or "people", len(table), note=_agreement_note(table)
        )

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Return the labels. MissingLabels if a pair has none; two equal answers are a tie."""
        require_labels([self.unlabelled(prompts, first, second)], self.out)
        return [self.labels.get(key, 0.5) for key in zip(prompts, first, second, strict=True)]

    def unlabelled(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Unlabelled:
        """Return the pairs that need a label and have none, each in an order that says nothing on the models."""
        pairs = dict.fromkeys(
            (prompt, *sorted((one, other))) for prompt, one, other in zip(prompts, first, second, strict=True)
        )
        missing = [pair for pair in pairs if pair not in self.labels and pair[1] != pair[2]]
        rows = []
        for prompt, *answers in missing:
            if zlib.crc32("\0".join((prompt, *answers)).encode(errors="replace")) % 2:
                answers.reverse()
            rows.append({"prompt": prompt, "first": answers[0], "second": answers[1], "label": None})
        return Unlabelled(self.path, PREFERENCE, rows, len(pairs))


def _agreement_note(table: Sequence[Sequence[float]]) -> str:
    """Return a note on labels, and how often two labelers give the same one."""
    found = agreement(table)
    if not found.pairwise.n:
        return LOOKED_UP
    others = [("Fleiss' kappa", found.fleiss), ("Krippendorff's alpha", found.krippendorff)]
    shown = "".join(f", {name} {value:.3f}" for name, value in others if not math.isnan(value))
    return f"{LOOKED_UP}; two labelers agree on {show(found.pairwise)} (n {found.pairwise.n}{shown})"


def require_labels(found: Sequence[Unlabelled], out: str | Path) -> None:
    """Raise MissingLabels if labels are missing, and write all rows that ask for them to TO_LABEL in the folder `out`.

    The sentence has the numbers of each role.
    """
    missing = [each for each in found if each.rows]
    if not missing:
        return
    target = Path(out) / TO_LABEL
    sentences: dict[Path, list[str]] = {}
    for each in missing:
        write_to_label(target, each.rows, each.role)
        sentences.setdefault(each.path, []).append(str(each))
    files = [
        f"{path.name}{'' if path.exists() else ' (a new file)'}"
        for path in sentences
        if path.resolve() != target.resolve()
    ]
    append = f", append its rows to {' and to '.join(files)}" if files else ""
    numbers = "; ".join(f"{path}: {', '.join(parts)}" for path, parts in sentences.items())
    raise MissingLabels(
        f"{numbers}; they are in {target}: fill in `label` there{append} and start the same command again", target
    )


def references_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a task's row that the judges of truth and informativeness read, and that help a person."""
    return {key: row[key] for key in REFERENCES if key in row}


def write_to_label(path: str | Path, rows: Sequence[Mapping[str, Any]], role: str, *, redraw: bool = False) -> None:
    """Add rows for people to label to a file. Rows that it has stay, with their labels, and are not added again.

    redraw: the rows are a sample that replaces an earlier one: rows of the role with a weight and no label are removed.
    """
    path = Path(path)
    kept: list[dict[str, Any]] = []
    if path.is_file() and path.stat().st_size:
        kept = [_row_at(path, number, line) for number, line in read_lines(path)]
    if redraw:
        kept = [r for r in kept if r.get("role") != role or r.get("label") is not None or "weight" not in r]
    choices = "first, second or tie" if role == PREFERENCE else "true or false"
    known = {_identity(row, str(row.get("role", role))) for row in kept}
    for row in rows:
        if (identity := _identity(row, role)) not in known:
            known.add(identity)
            kept.append({"role": role, "question_for_people": f"{QUESTIONS[role]} ({choices})", **row})
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")


def _row_at(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return parse_object(line)
    except InvalidRow as error:
        raise UserError(f"{path}:{number}: {error}") from error


def _identity(row: Mapping[str, Any], role: str) -> Hashable:
    """Return what makes two rows ask the same question; the order of two answers does not matter."""
    if role == PREFERENCE:
        return role, row.get("prompt"), *sorted((str(row.get("first")), str(row.get("second"))))
    return role, row.get("prompt"), row.get("answer")
