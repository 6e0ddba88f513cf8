"""Sentences on the models' answers that the figures do not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_fast.eval.answers import DATE, FINISHED, OVERLONG, SHORTENED, UNKNOWN
from rlhf_fast.eval.encoding import WINDOW
from rlhf_fast.eval.generation import GenerationTask
from rlhf_fast.eval.run_task import Task

Records = Sequence[Mapping[str, Any]]
MAX_UNKNOWN = 0.01
MAX_TRUNCATED = 0.05


def answer_notes(task: Task, records: Mapping[str, Records]) -> list[str]:
    """Return notes on the answers to a task. records: model -> those of its answers."""
    notes = []
    for name, own in records.items():
        unknown = _mean(own, UNKNOWN)
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
    return notes + (_truncated_notes(task, records) if isinstance(task, GenerationTask) else [])


def _truncated_notes(task: GenerationTask, records: Mapping[str, Records]) -> list[str]:
    """Return a note on the models whose answers are often cut by the limit of tokens, where they should end."""
    found = []
    for name, own in records.items():
        truncated = [record["tokens"] for record in own if not record[FINISHED]]
        if len(truncated) > MAX_TRUNCATED * len(own) and not task.is_continuation:
            found.append(f"{100 * len(truncated) / len(own):.0f} % of {name}'s at {max(truncated)} tokens")
    return [f"{task.name}: answers were cut before their end: {', '.join(found)}."] if found else []


def date_notes(dates: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a note if the chat templates of some models wrote other dates. dates: model -> those in its prompts."""
    days = {name: sorted({date[:10] for date in found}) for name, found in dates.items() if found}
    if len({day for found in days.values() for day in found}) < 2:
        return []
    shown = ", ".join(f"{name} {' and '.join(found)}" for name, found in days.items())
    return [f"The chat templates write different dates, those that the models have learned: {shown}."]


def dates_of(records: Records) -> list[str]:
    """Return the dates in the prompts of answers, each once."""
    return sorted({record[DATE] for record in records if record.get(DATE)})


def _mean(records: Records, column: str) -> float:
    return sum(record[column] for record in records) / len(records)
