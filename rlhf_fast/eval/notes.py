"""Sentences on the models' answers that the figures do not say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_fast.eval.answers import DATE, FINISHED, OVERLONG, SHORTENED, UNKNOWN
from rlhf_fast.eval.encoding import WINDOW
from rlhf_fast.eval.files import Row
from rlhf_fast.eval.generation import TRUE_AND_INFORMATIVE, GenerationTask, Judges
from rlhf_fast.eval.judged import measures_of
from rlhf_fast.eval.judges.cached import CachedJudge
from rlhf_fast.eval.judges.references import ReferenceJudge
from rlhf_fast.eval.run_task import Task

Records = Sequence[Mapping[str, Any]]
MAX_UNKNOWN = 0.01
MAX_TRUNCATED = MAX_UNJUDGED = 0.05
CONSTANT_ANSWERS = ("I have no comment.", "It depends.", "Nothing happens.")
MAX_SAME, MIN_ROWS, MAX_SHOWN = 0.2, 10, 60
"""Share of the rows that may have one answer, rows from which on that is counted, and characters of it in a note."""


def answer_notes(task: Task, records: Mapping[str, Records]) -> list[str]:
    """Return notes on the answers to a task. records: model -> those of its answers."""
    notes = []
    for name, own in records.items():
        unknown = sum(record[UNKNOWN] for record in own) / len(own)
        if unknown > MAX_UNKNOWN:
            notes.append(
                f"{task.name}: {100 * unknown:.0f} % of the tokens are unknown to {name}'s tokenizer, one for a"
                " word of any length: its figures cannot be compared."
            )
        if overlong := sum(record[OVERLONG] for record in own):
            notes.append(f"{task.name}: {name}: {overlong} contexts were cut on the left to fit its positions.")
        if any(record.get(SHORTENED) for record in own):
            size = max(count for record in own for count in record["num_tokens"])
            notes.append(
                f"{task.name}: {name} has {size} positions, so its windows have {size} tokens and not {WINDOW}: its"
                " figures cannot be compared with those of models that have more positions."
            )
    if not isinstance(task, GenerationTask):
        return notes
    frequent = [_frequent_answer_note(name, task, own) for name, own in records.items()]
    return notes + _truncated_notes(task, records) + [note for note in frequent if note]


def _truncated_notes(task: GenerationTask, records: Mapping[str, Records]) -> list[str]:
    """Return a note on the models whose answers are often cut by the limit of tokens, where they should end."""
    found = []
    for name, own in records.items():
        truncated = [record["tokens"] for record in own if not record[FINISHED]]
        if len(truncated) > MAX_TRUNCATED * len(own) and not task.is_continuation:
            found.append(f"{100 * len(truncated) / len(own):.0f} % of {name}'s at {max(truncated)} tokens")
    return [f"{task.name}: answers were cut before their end: {', '.join(found)}."] if found else []


def _frequent_answer_note(name: str, task: GenerationTask, records: Records) -> str:
    """Return a sentence on an answer that a model gives to more than MAX_SAME of the rows, "" if there is none."""
    if len(records) < MIN_ROWS or task.is_continuation:  # a few words of a text are often the same
        return ""
    answer, count = Counter(record["answer"] for record in records).most_common(1)[0]
    if not answer or count <= MAX_SAME * len(records):
        return ""
    shown = answer if len(answer) <= MAX_SHOWN else answer[:MAX_SHOWN] + " ..."
    return f"{task.name}: {name} gives one answer, {shown!r}, to {100 * count / len(records):.0f} % of the rows."


def unjudged_notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note on each model and task where judges have no verdict on more than MAX_UNJUDGED of the answers."""
    return [
        f"{record['task']}: there is no verdict on {100 * record['value']:.0f} % of {record['model']}'s answers; the"
        " figures are of the others."
        for record in results
        if record["measure"] == "unjudged" and (record["value"] or 0.0) > MAX_UNJUDGED
    ]


def date_notes(dates: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a note if the chat templates of some models wrote other dates. dates: model -> those in its prompts."""
    days = {name: sorted({date[:10] for date in found}) for name, found in dates.items() if found}
    if len({day for found in days.values() for day in found}) < 2:
        return []
    shown = ", ".join(f"{name} {' and '.join(found)}" for name, found in days.items())
    return [f"The chat templates write different dates, those that the models have learned: {shown}."]


def constant_answers_note(task: Task, rows: Sequence[Row], judges: Judges) -> str:
    """Return a sentence on what the built-in judges of truth say on a model that always answers the same, "" where
    others judge."""
    if not isinstance(task, GenerationTask) or "truth" not in task.judges:
        return ""
    own = {role: judges[role] for role in task.judges}
    if not all(isinstance(judge, CachedJudge) and isinstance(judge.judge, ReferenceJudge) for judge in own.values()):
        return ""
    shown = []
    for answer in CONSTANT_ANSWERS:
        records = [{"answer": answer}] * len(rows)
        measure = next(found for found in measures_of(task, rows, records, own) if found.name == TRUE_AND_INFORMATIVE)
        shown.append(f'"{answer}" has {measure.estimate().value:.3f}')
    return (
        f"{task.name}: a model that always says {', '.join(shown)} {TRUE_AND_INFORMATIVE} by these judges, which know"
        " words and not meanings: read the answers of a model that is near."
    )


def dates_of(records: Records) -> list[str]:
    """Return the dates in the prompts of answers, each once."""
    return sorted({record[DATE] for record in records if record.get(DATE)})
