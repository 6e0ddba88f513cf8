"""The tables of a report, made from flat records: which rows, in which order, and the text of each cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_fast.eval.cells import MISSING, show, show_short
from rlhf_fast.eval.estimates import Estimate, estimate_from, unpaired_difference
from rlhf_fast.eval.paper import NOT_THERE, paper_text

Record = Mapping[str, Any]
"""A flat record of results.json."""
Groups = Mapping[str, Sequence[str]]
"""Group -> its tasks, both in the order of the report (eval/tasks.py, GROUPS)."""
Key = tuple[str, str]
"""(task, measure)"""

MAIN = {
    "preference": "win_rate",
    "truthfulqa": "true_and_informative",
    "truthfulqa_instruction": "true_and_informative",
    "hellaswag": "acc_token",
    "text": "bits_per_byte",
}
"""The measure that stands for a task in the figure and in --fail-under, where it is not the task's first one."""
DETAILS = ("empty", "unjudged", "words", "toxic_bin_", "refusal_rate_")
"""Beginnings of the names of measures that are left to the table of details."""
REFUSAL_RATE, CONTRAST = "refusal_rate", "harmful_minus_safe"
"""Measure of the tasks refusal and over_refusal, and the difference between the two."""
OTHER = "other"
FIXED = 2
"""Number of columns before those of the models: the label and n."""
EXCLUDES_ZERO = "*"
PAPER = "InstructGPT paper"
MIN_PAPER = 30
"""Characters in which the paper's column may be folded."""
HALF_WIDTHS = "± half the interval's width"


class Grid(NamedTuple):
    """A table as text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def width_of(grid: Grid, border: int = 3) -> int:
    """Return the characters of a table's lines. border: characters between two columns."""
    return sum(_widths(grid, border)) + 1


def _widths(grid: Grid, border: int) -> list[int]:
    return [max(map(len, column)) + border for column in zip(grid.header, *grid.rows, strict=True)]


def split_to_fit(grid: Grid, width: int, border: int = 3) -> list[Grid]:
    """Return the table in parts of at most `width` characters if one column more than the label and n fits.

    Each part has the label and n, and the rows that say something there. The paper's column may be folded. border:
    characters between two columns.
    """
    widths = _widths(grid, border)
    if grid.header[-1] == PAPER:
        widths[-1] = min(widths[-1], MIN_PAPER + border)
    parts: list[list[int]] = [[]]
    for column in range(FIXED, len(widths)):
        taken = sum(widths[:FIXED]) + sum(widths[i] for i in parts[-1]) + 1
        if parts[-1] and taken + widths[column] > width:
            parts.append([])
        parts[-1].append(column)
    chosen = [[*range(FIXED), *part] for part in parts]
    rows = [[tuple(row[i] for i in part) for row in (grid.header, *grid.rows)] for part in chosen]
    return [Grid(grid.title, header, _with_content(rest)) for header, *rest in rows]


def _with_content(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Return the rows with a cell of a model or the paper, each below its heading, which has none."""
    kept: list[tuple[str, ...]] = []
    heading: list[tuple[str, ...]] = []
    for row in rows:
        if not row[1]:
            heading = [row]
        elif any(row[FIXED:]):
            kept += [*heading, row]
            heading = []
    return tuple(kept)


def _with_headings(rows: Iterable[tuple[Key, tuple[str, ...]]]) -> tuple[tuple[str, ...], ...]:
    """Return the rows of a narrow table: a task as a heading, its measures indented below it."""
    found: list[tuple[str, ...]] = []
    last = ""
    for (task, _), (name, *rest) in rows:
        if task != last:
            found.append((task, *("" for _ in rest)))
        found.append((f"  {name.removeprefix(f'{task}: ')}", *rest))
        last = task
    return tuple(found)


def models_of(records: Iterable[Record]) -> list[str]:
    """Return the names of the models, in the order given."""
    return list(dict.fromkeys(record["model"] for record in records))


def in_order(records: Sequence[Record], groups: Groups) -> list[Key]:
    """Return each (task, measure), tasks in the order of the groups, measures in that of the records."""
    order = [task for tasks in groups.values() for task in tasks]
    keys = list(dict.fromkeys((record["task"], record["measure"]) for record in records))
    first = {task: number for number, task in enumerate(dict.fromkeys([*order, *(task for task, _ in keys)]))}
    return sorted(keys, key=lambda key: first[key[0]])


def group_of(task: str, groups: Groups) -> str:
    return next((group for group, tasks in groups.items() if task in tasks), OTHER)


def main_measure(task: str, records: Iterable[Record]) -> str:
    """Return the measure that stands for a task, or "" if the records have none of it."""
    named = dict.fromkeys(record["measure"] for record in records if record["task"] == task)
    found = [measure for measure in named if not measure.startswith(DETAILS)]
    return MAIN[task] if MAIN.get(task) in found else found[0] if found else ""


def is_level_meaningless(record: Record) -> bool:
    """Return whether only differences of a measure mean something: a toxicity judge's mean score."""
    return record["measure"] == "toxicity"


def with_contrast(records: Sequence[Record]) -> list[Record]:
    """Return the records with one more for each model: how much more often it refuses harmful prompts than safe ones.

    The prompts of the two tasks are taken as independent samples. It stands behind the refusals of harmful prompts.
    """
    found: list[Record] = []
    safe = {r["model"]: r for r in records if (r["task"], r["measure"]) == ("over_refusal", REFUSAL_RATE)}
    for record in records:
        found.append(record)
        other = safe.get(record["model"])
        if other and (record["task"], record["measure"]) == ("refusal", REFUSAL_RATE):
            contrast = unpaired_difference(estimate_from(record), estimate_from(other))
            found.append({**record, "measure": CONTRAST, **contrast.fields(), "seconds": 0.0, "higher_is_better": True})
    return found


def result_tables(records: Sequence[Record], groups: Groups, short: bool = False) -> list[Grid]:
    """Return the main table, with the paper's column, and that of details.

    short: for a narrow terminal, with headings, half the intervals' widths, and nothing where the paper has no figure.
    """
    shown = [record for record in records if not is_level_meaningless(record)]
    details = [key for key in in_order(shown, groups) if key[1].startswith(DETAILS)]
    main = [key for key in in_order(shown, groups) if key not in details]
    models = models_of(records)
    cells = {(record["model"], record["task"], record["measure"]): record for record in shown}
    grids = []
    for title, keys, paper in (("Results", main, True), ("Details", details, False)):
        rows = []
        for task, measure in keys:
            found = [cells.get((model, task, measure)) for model in models]
            unit = next(record["unit"] for record in found if record)
            last = (paper_text(task, measure),) if paper else ()
            texts = [cell(record, short) for record in found]
            last = ("",) if short and last == (NOT_THERE,) else last
            rows.append(((task, measure), (label(task, measure, unit), counts(found, short), *texts, *last)))
        header = ("", "n", *models, *([PAPER] if paper else []))
        if rows:
            grids.append(_grid(title, header, rows, short))
    return grids


def _grid(title: str, header: tuple[str, ...], rows: list[tuple[Key, tuple[str, ...]]], short: bool) -> Grid:
    if short:
        return Grid(f"{title}; {HALF_WIDTHS}", header, _with_headings(rows))
    return Grid(title, header, tuple(row for _, row in rows))


def difference_tables(records: Sequence[Record], groups: Groups, short: bool = False) -> list[Grid]:
    """Return for each baseline the paired differences to it, with a mark where the interval excludes 0.

    short: for a narrow terminal, as `result_tables`.
    """
    grids = []
    for baseline in dict.fromkeys(record["baseline"] for record in records):
        kept = [record for record in records if record["baseline"] == baseline]
        kept = [record for record in kept if not record["measure"].startswith(DETAILS)]
        models = models_of(kept)
        cells = {(record["model"], record["task"], record["measure"]): record for record in kept}
        rows = []
        for task, measure in in_order(kept, groups):
            found = [cells.get((model, task, measure)) for model in models]
            unit = next(record["unit"] for record in found if record)
            shown = [difference_cell(record, short) for record in found]
            rows.append(((task, measure), (label(task, measure, unit), counts(found, short), *shown)))
        if rows:
            title = f"Differences to {baseline} (paired by row; {EXCLUDES_ZERO} where the interval excludes 0)"
            grids.append(_grid(title, ("", "n", *models), rows, short))
    return grids


def label(task: str, measure: str, unit: str) -> str:
    """Return the name of a row: the task, the measure, and the unit unless it is a share or said already."""
    said = unit in ("share", "") or unit.replace("/", "_per_") == measure or measure.endswith(unit)
    return f"{task}: {measure}" + ("" if said else f" ({unit})")


def cell(record: Record | None, short: bool = False) -> str:
    if not record:
        return MISSING
    found = estimate_from(record)
    return show_short(found) if short else show(found, digits(found))


def difference_cell(record: Record | None, short: bool = False) -> str:
    """Return a difference with its sign, and the mark if its interval excludes 0."""
    if not record:
        return MISSING
    found = estimate_from(record)
    if short:
        return show_short(found, sign=True) + (EXCLUDES_ZERO if found.excludes(0) else "")
    return show(found, digits(found), sign=True) + (f" {EXCLUDES_ZERO}" if found.excludes(0) else "")


def digits(estimate: Estimate) -> int:
    """Return the number of decimals that are shown of an estimate: three below 10, fewer above."""
    size = abs(estimate.value)
    return 3 if not size >= 10 else 2 if size < 100 else 1


def counts(records: Sequence[Record | None], short: bool = False) -> str:
    """Return the n of a row's cells: one number if all are equal, else one for each, or the least and the largest."""
    found = [str(record["n"]) if record else MISSING for record in records]
    different = set(found) - {MISSING}
    if short and len(different) > 1:
        return "–".join(sorted(different, key=int)[:: len(different) - 1])
    return different.pop() if len(different) == 1 else " / ".join(found)
