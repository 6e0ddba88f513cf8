"""The tasks that can be run on a folder of sets, with their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_fast.errors import UserError, listed
from rlhf_fast.eval.files import Row
from rlhf_fast.eval.generation import GenerationTask
from rlhf_fast.eval.held_out import checksum, training_notes
from rlhf_fast.eval.judges import PREFERENCE
from rlhf_fast.eval.sets import DEMO_SETS, SETS, find_set, read_set, require_set
from rlhf_fast.eval.tasks import Task, select_tasks

SMALL_SAMPLE = 100
DEMO_NOTE = (
    "The sets are of the demo's world: they show that everything works, and are no benchmark. How often the built-in"
    " judges agree with people was measured on other texts."
)


class TaskRows(NamedTuple):
    """A task and the rows of its set."""

    task: Task
    rows: list[Row]


class Selection(NamedTuple):
    """Tasks that are run."""

    tasks: list[TaskRows]
    notes: list[str]
    """Sentences on what was left out, and on the rows."""
    files: dict[str, str]
    """Set -> checksum of its files."""


def select_rows(
    names: Sequence[str],
    data: str,
    limit: int,
    models: Mapping[str, str],
    missing_preference: str = "",
    may_be_empty: bool = False,
) -> Selection:
    """Return the tasks of these names and groups whose sets are in the folder `data` ("" = the demo's sets).

    models: name -> path. missing_preference: why models cannot be compared; "" if they can.
    UserError for a task that is named and cannot be run, also by a name that its group has too, and if there is none,
    unless that may be.
    """
    folder = Path(data) if data else DEMO_SETS
    notes = [] if data else [DEMO_NOTE]
    named = {name.strip() for entry in names for name in entry.split(",")}
    rows: dict[str, list[Row]] = {}
    files: dict[str, str] = {}
    without_file: list[str] = []
    found: list[TaskRows] = []
    for task in select_tasks(names):
        if task.name in named:
            require_set(task.set, folder)
        paths = find_set(task.set, folder)
        compares = isinstance(task, GenerationTask) and PREFERENCE in task.judges
        if not paths:
            without_file.append(f"{task.name} ({SETS[task.set].stems[0]}.jsonl)")
            continue
        if compares and missing_preference:
            if task.name in named:
                raise UserError(f"{task.name} cannot be run: {missing_preference}")
            notes.append(f"{task.name} was left out: {missing_preference}.")
            continue
        if task.set not in rows:
            rows[task.set] = read_set(task.set, paths, limit, notes)
            files[task.set] = checksum(paths)
            notes += training_notes(paths, models) if task.set == "text" else ()
        same = _same_requests(task, rows[task.set], found)
        if not rows[task.set]:
            notes.append(f"{task.name} was left out: {', '.join(path.name for path in paths)} has no row for it.")
        elif same and task.name not in named:
            notes.append(f"{task.name} was left out: its rows have prompts of their own, and {same} asks the same.")
        else:
            found.append(TaskRows(task, rows[task.set]))
    if without_file:
        notes.append(f"Left out, because {folder} has no file of their set: {', '.join(without_file)}.")
    if not found and not may_be_empty:
        raise UserError(_nothing(folder, notes, len(without_file)))
    if 0 < limit < SMALL_SAMPLE:
        notes.append(f"With {limit} rows, intervals are wider than ± 10 points.")
    return Selection(found, notes, files)


def _same_requests(task: Task, rows: Sequence[Row], found: Sequence[TaskRows]) -> str:
    """Return the name of an earlier task of the same set that asks and judges the same, "" if there is none."""
    if not isinstance(task, GenerationTask):
        return ""
    others = [other for other, _ in found if isinstance(other, GenerationTask)]
    alike = (other for other in others if (other.set, other.judges) == (task.set, task.judges))
    return next((other.name for other in alike if all(task.prompt(row) == other.prompt(row) for row in rows)), "")


def _nothing(folder: Path, notes: Sequence[str], num_without_file: int) -> str:
    """Return the sentence for a folder in which no task finds what it needs."""
    if not num_without_file:
        return f"there is nothing to do. {' '.join(notes)}"
    entries = sorted(path.name for path in folder.iterdir()) or ["nothing"]
    return (
        f"{folder}: has no set that these tasks read (it holds {listed(entries, 4)}); `rlhf-fast eval --list` names"
        " their files"
    )
