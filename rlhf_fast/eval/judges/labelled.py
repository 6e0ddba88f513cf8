"""The labelled files that the built-in judges are made from and checked on.

refusal_labels.jsonl     {prompt, completion, label: refuse | partial | comply}: XSTest's annotations
toxicity_prompts.jsonl   {prompt, prompt_toxicity, continuation, continuation_toxicity}: RealToxicityPrompts
truth_judge.jsonl        {question, answer, label: 1 | 0, kind: truth | info}: TruthfulQA's judge training data
truthfulqa.jsonl         {question, correct_answers, incorrect_answers}: their references
xstest_v2_completions_*.csv   {prompt, completion, final_label}: XSTest's own files, families of their own
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.data.fields import InvalidRow, json_type
from rlhf_fast.data.json_lines import parse_object, read_lines
from rlhf_fast.errors import UserError
from rlhf_fast.eval.judges.references import words_of

REFUSAL, TOXICITY, TRUTH, REFERENCES = (
    *("refusal_labels.jsonl", "toxicity_prompts.jsonl"),
    *("truth_judge.jsonl", "truthfulqa.jsonl"),
)
NEEDED = {
    "refusal": (REFUSAL,),
    "toxicity": (TOXICITY,),
    "truth": (TRUTH, REFERENCES),
    "informative": (TRUTH, REFERENCES),
}
"""The files that each role is made from."""
XSTEST_FILES = "xstest_v2_completions_*.csv"


class Labelled(NamedTuple):
    """Answers with labels. All fields have one entry an answer but the last two."""

    prompts: Sequence[str]
    answers: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    labels: Sequence[float]
    """Above 0.5 is a yes."""
    groups: Sequence[str]
    """Answers of one group are never on both sides of a fold."""
    source: str
    """The labelers."""
    note: str = ""

    def take(self, index: Iterable[int]) -> Labelled:
        index = list(index)
        return Labelled(
            prompts=[self.prompts[i] for i in index],
            answers=[self.answers[i] for i in index],
            rows=[self.rows[i] for i in index],
            labels=[self.labels[i] for i in index],
            groups=[self.groups[i] for i in index],
            source=self.source,
            note=self.note,
        )

    @property
    def yes(self) -> list[bool]:
        return [label > 0.5 for label in self.labels]


def missing_files(role: str, folder: Path) -> list[str]:
    """Return the files of a role that are not in the folder."""
    return [name for name in NEEDED[role] if not (folder / name).is_file()]


def read_labelled(role: str, folder: Path, with_references: bool = False) -> Labelled:
    """Return the labelled answers of a role. with_references: also those that are references of TruthfulQA, which are
    left out of what a judge is made from and validated on."""
    if role == "refusal":
        return _read_refusals(folder / REFUSAL)
    if role == "toxicity":
        return _read_toxicity(folder / TOXICITY)
    return _read_truth(folder, "truth" if role == "truth" else "info", with_references)


def _read(path: Path, **fields: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """Return the rows of a file. UserError with file:line if a field is missing or of another type."""
    rows = []
    for number, line in read_lines(path):
        try:
            row = parse_object(line)
            for name, kind in fields.items():
                if not isinstance(row.get(name), kind):
                    raise InvalidRow(f"{name} is {json_type(row.get(name))} or missing; see the layout of {path.name}")
        except InvalidRow as error:
            raise UserError(f"{path}:{number}: {error}") from error
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: has no row; give the whole file")
    return rows


def _read_refusals(path: Path) -> Labelled:
    rows = _read(path, prompt=str, completion=str, label=str)
    prompts = [row["prompt"] for row in rows]
    labels = [float(row["label"] == "refuse") for row in rows]
    source = "XSTest's annotators, answers of Mistral-7B-Instruct"
    return Labelled(prompts, [row["completion"] for row in rows], rows, labels, prompts, source)


def _read_toxicity(path: Path) -> Labelled:
    number = (int, float)
    rows = _read(path, prompt=str, prompt_toxicity=number, continuation=str, continuation_toxicity=number)
    return Labelled(
        [""] * (2 * len(rows)),
        [row[key] for key in ("prompt", "continuation") for row in rows],
        [*rows, *rows],
        [float(row[key]) for key in ("prompt_toxicity", "continuation_toxicity") for row in rows],
        [str(i) for i in range(len(rows))] * 2,
        "Perspective's scores of RealToxicityPrompts (a program's, not people's)",
        "read its share above 0.5 and differences, never its mean",
    )


def _read_truth(folder: Path, kind: str, with_references: bool) -> Labelled:
    references = {row["question"].strip(): row for row in read_references(folder)}
    judged = _read(folder / TRUTH, question=str, answer=str, label=int, kind=str)
    rows = [row for row in judged if row["kind"] == kind and row["question"].strip() in references]
    if not rows:
        raise UserError(f"{folder / TRUTH}: no question of kind {kind} is in {REFERENCES}; give both files of one set")
    found = [references[row["question"].strip()] for row in rows]
    questions = [row["question"].strip() for row in rows]
    everything = Labelled(
        questions,
        [row["answer"] for row in rows],
        found,
        [float(row["label"]) for row in rows],
        questions,
        "TruthfulQA's judge training data, people's labels",
        "" if with_references else "answers that are no reference",
    )
    pairs = enumerate(zip(rows, found, strict=True))
    return everything.take(i for i, (row, own) in pairs if with_references or not _is_reference(row, own))


def read_references(folder: Path) -> list[dict[str, Any]]:
    """Return the questions with their references."""
    return _read(folder / REFERENCES, question=str, correct_answers=list, incorrect_answers=list)


def with_partial_refusals(labelled: Labelled) -> Labelled:
    """Return answers of `read_labelled("refusal", ...)` with partial refusals too as a yes."""
    return labelled._replace(labels=[float(row["label"] != "comply") for row in labelled.rows])


def _is_reference(row: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
    """Return whether an answer is one of the references: similarity to them is then right by construction."""
    words = words_of(row["answer"])
    return any(words == words_of(text) for key in ("correct_answers", "incorrect_answers") for text in reference[key])


def xstest_families(folder: Path) -> dict[str, Path]:
    """Return XSTest's files of labelled answers in a folder or its model_completions: family -> file."""
    paths = [*folder.glob(XSTEST_FILES), *(folder / "model_completions").glob(XSTEST_FILES)]
    return {path.stem.removeprefix("xstest_v2_completions_"): path for path in sorted(paths)}


class Family(NamedTuple):
    """Labelled answers of one family of models."""

    labelled: Labelled
    complies: list[bool]
    """The answers that comply: neither refusals nor partial ones."""


def read_family(path: Path) -> Family:
    """Return the answers of one of XSTest's files that have a final label."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = {"prompt", "completion", "final_label"} - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"{path}: has no column {min(missing)}; give XSTest's own file")
            rows = [row for row in reader if row["final_label"] and row["completion"] is not None]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV in UTF-8: {error}") from error
    if not rows:
        raise UserError(f"{path}: no row has a final_label; give XSTest's own file")
    prompts = [row["prompt"] for row in rows]
    labels = [float(row["final_label"].startswith("2")) for row in rows]
    source = "XSTest's annotators"
    answers = [row["completion"] for row in rows]
    labelled = Labelled(prompts, answers, rows, labels, prompts, source)
    return Family(labelled, [row["final_label"].startswith("1") for row in rows])
