"""report.md and the terminal's table, from the flat records of results.json; and the thresholds of --fail-under."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_fast.errors import UserError, did_you_mean, listed, shortened
from rlhf_fast.eval.gold_curve import CURVE
from rlhf_fast.eval.tables import (
    EXCLUDES_ZERO,
    Grid,
    Groups,
    Record,
    difference_tables,
    main_measure,
    models_of,
    result_tables,
    split_to_fit,
    width_of,
)
from rlhf_fast.run.terminal import aligned

TITLE = "Evaluation (95 % intervals)"
NOT_VALIDATED = "not validated"
VALIDATION = (
    ("accuracy", "accuracy"),
    ("recall", "recall"),
    ("false_alarms", "false alarms"),
    ("auc", "AUC"),
)
"""(field of a validation, its name in the report)"""
SHORT_VALIDATION = tuple(field for field in VALIDATION if field[0] != "recall")
MAX_JUDGE, MAX_NAME = 150, 60
"""Characters of a judge's line in the terminal, and of its name there."""
REWARD = "reward_model"
"""The task of a reward model's records."""
ONLY_DIFFERENCES = "toxicity: of its mean score only differences mean something"
ONLY_SHARES = "only shares and differences may be read, since its mean score depends on the mix of texts"


def markdown(results: Mapping[str, Any], groups: Groups) -> str:
    """Return report.md. `results`: what results.json holds. `groups`: group -> tasks, in the report's order."""
    tables = (f"## {grid.title}\n\n" + "\n".join(_markdown_rows(grid)) for grid in _tables(results, groups))
    lists = (f"## {title}\n\n" + "\n".join(f"- {_escaped(x)}" for x in lines) for title, lines in _lists(results))
    sections = (f"## {_escaped(title)}\n\n" + "\n".join(lines) for title, lines in _sections(results))
    return "\n\n".join([f"# {TITLE}", *tables, *sections, *lists]) + "\n"


def print_report(results: Mapping[str, Any], groups: Groups, console: Console | None = None) -> None:
    """Print the tables without details, the judges and the notes: with lines on a terminal, else as aligned text.

    A table that is wider than the terminal is printed in its short form.
    """
    console = console or Console(highlight=False, soft_wrap=False)
    for grid, short in zip(_tables(results, groups), _tables(results, groups, short=True), strict=True):
        if grid.title == "Details":
            continue
        if console.is_terminal:
            chosen = grid if width_of(grid) <= console.width else short
            for part in split_to_fit(chosen, console.width):
                console.print(_rich_table(part))
        else:
            print("\n".join([grid.title, *aligned([grid.header, *grid.rows]), ""]), file=console.file)
    for title, lines in _sections(results):
        print("\n".join([title, *_without_markup(lines), ""]), file=console.file)
    for title, lines in _lists(results, short=True):
        print("\n".join([title, *(f"  {line}" for line in lines)]), file=console.file)


def judge_lines(results: Mapping[str, Any], short: bool = False) -> list[str]:
    """Return a line on each judge: who labelled the answers that it was validated on, how many, and how it did.

    A judge that a result names and `judges` lacks gets a line too, so that no figure stands without one.
    short: without recall, in at most MAX_JUDGE characters.
    """
    judges: Mapping[str, Any] = results.get("judges") or {}
    lines = []
    for role, judge in judges.items():
        validation, threshold = judge.get("validation"), judge.get("threshold")
        if short:
            lines.append(_short_judge(_judge_name(role, shortened(judge["name"], MAX_NAME)), validation))
            lines += [ONLY_DIFFERENCES] * (role == "toxicity")
            continue
        above = "" if threshold is None else f" (yes above {threshold:g})"
        text = _validation_text(validation) if validation else NOT_VALIDATED
        line = f"{_judge_name(role, judge['name'])}{above}: {text}"
        lines.append(f"{line}; {ONLY_SHARES}" if role == "toxicity" else line)
    named = {judge["name"] for judge in judges.values()}
    used = dict.fromkeys(record["judge"] for record in results.get("results", ()) if record.get("judge"))
    others = [name for name in used if name not in named and not named.issuperset(name.split(" and "))]
    return lines + [f"{shortened(name, MAX_NAME) if short else name}: {NOT_VALIDATED}" for name in others]


def note_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the notes, and a line on the settings that the figures hang on."""
    meta: Mapping[str, Any] = results.get("meta") or {}
    limit = meta.get("limit")
    count = "n is the number of rows, or of groups of rows that belong together."
    models = [f"{name} is {shortened(entry['path'], MAX_JUDGE)}" for name, entry in (meta.get("models") or {}).items()]
    made_by = [f"rlhf-fast {version}" for version in [(meta.get("versions") or {}).get("rlhf-fast")] if version]
    settings = [f"the first {limit} rows of each set, or of its strata in turn"] if limit else []
    settings += [f"{name} {meta[name]}" for name in ("seed", "template", "dtype") if meta.get(name) not in (None, "")]
    settings += [*made_by, *models]
    lines = [f"Settings: {', '.join(settings)}."] if settings else []
    return [*results.get("notes", ()), *lines, *([count] if results.get("results") else [])]


def check_thresholds(records: Sequence[Record], thresholds: Mapping[str, float]) -> list[str]:
    """Return a sentence for each threshold of --fail-under that is not reached; [] if all are.

    A name is `task` or `task.measure`, and concerns the last model; `model:task` and `model:task.measure` another one.
    `task` alone is the task's main measure, the one in the figure. The value itself is compared, not its interval: it
    fails if it is below the threshold, or above it where lower is better (perplexity, toxic), or if there is none.
    UserError for a name that no record has.
    """
    failures = []
    for name, threshold in thresholds.items():
        record = _record_of(name, records)
        what = f"{record['model']}: {record['task']}.{record['measure']}"
        value, lower_is_better = record["value"], record.get("higher_is_better") is False
        limit, side = ("at most", "above") if lower_is_better else ("at least", "below")
        if value is None or math.isnan(value):
            failures.append(f"{what} has no value (n {record['n']}); {limit} {threshold:g} is asked for")
        elif value > threshold if lower_is_better else value < threshold:
            failures.append(f"{what} is {value:.4g} (n {record['n']}), {side} {threshold:g}")
    return failures


def _record_of(name: str, records: Sequence[Record]) -> Record:
    """Return the record that a name of --fail-under means."""
    models = models_of(records)
    model = next((model for model in models if name.startswith(f"{model}:")), None)
    wanted = name if model is None else name[len(model) + 1 :]
    task, _, measure = wanted.partition(".")
    reports = (REWARD, CURVE)  # whose models are none of those that the other tasks compare, or in another order
    others = [r for r in records if (r["task"] == task if task in reports else r["task"] not in reports)]
    chosen = [record for record in records if record["model"] == (model or (models_of(others) or [""])[-1])]
    measure = measure or main_measure(task, chosen)
    for record in chosen:
        if (record["task"], record["measure"]) == (task, measure):
            return record
    known = list(dict.fromkeys(x for r in chosen for x in (r["task"], f"{r['task']}.{r['measure']}")))
    hint = did_you_mean(wanted, known, f"there are {listed(known) or 'no results'}")
    where = f"of {chosen[0]['model']}" if chosen else "of any model"
    raise UserError(f"--fail-under {name}: no result {where} has that name; {hint}")


def _tables(results: Mapping[str, Any], groups: Groups, short: bool = False) -> list[Grid]:
    main, *details = result_tables(results.get("results", ()), groups, short) or [Grid("Results", ("", "n"), ())]
    return [main, *difference_tables(results.get("differences", ()), groups, short), *details]


def _sections(results: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the titles and lines of markdown of what is no table of tasks: a reward model's report."""
    return list((results.get("sections") or {}).items())


def _without_markup(lines: Sequence[str]) -> list[str]:
    """Return lines of markdown for the terminal, their tables as aligned text."""
    found: list[str] = []
    for is_table, part in groupby(lines, lambda line: line.startswith("|")):
        if is_table:
            rows = [[text.strip() for text in line.strip("|").split("|")] for line in part if line[:4] != "|---"]
            found += [f"  {line}" for line in aligned(rows)]
        else:
            found += part
    return found


def _lists(results: Mapping[str, Any], short: bool = False) -> list[tuple[str, list[str]]]:
    """Return the titles and lines of what stands below the tables."""
    return [pair for pair in (("Judges", judge_lines(results, short)), ("Notes", note_lines(results))) if pair[1]]


def _judge_name(role: str, name: str) -> str:
    """Return role and name of a judge, or the name alone where it says the role."""
    return name if name == role or name.startswith(f"{role},") else f"{role}: {name}"


def _short_judge(name: str, validation: Mapping[str, Any] | None) -> str:
    """Return a judge's line for the terminal. The middle of long labels is left out."""
    if not validation:
        return f"{name}: {NOT_VALIDATED}"
    start, end = f"{name}: labels by ", ", ".join(["", *_figures(validation, SHORT_VALIDATION)])
    return start + shortened(validation["labels"], MAX_JUDGE - len(start) - len(end)) + end


def _figures(validation: Mapping[str, Any], fields: Sequence[tuple[str, str]] = VALIDATION) -> list[str]:
    """Return n and the figures that a validation has."""
    figures = [
        f"{name} {validation[field]:.3f}"
        for field, name in fields
        if validation.get(field) is not None and math.isfinite(validation[field])
    ]
    return [f"n {validation['n']}", *figures]


def _validation_text(validation: Mapping[str, Any]) -> str:
    """Return who labelled, n and the figures that the validation has."""
    text = ", ".join([f"labels by {validation['labels']}", *_figures(validation)])
    return "; ".join([text, *(str(validation[field]) for field in ("date", "note") if validation.get(field))])


def _markdown_rows(grid: Grid) -> list[str]:
    rows = ["| " + " | ".join(map(_escaped, row)) + " |" for row in (grid.header, *grid.rows)]
    return [rows[0], "|---" * len(grid.header) + "|", *rows[1:]]


def _escaped(text: str) -> str:
    """Return text in which markdown sees no table, emphasis or tag."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("\n", " ")


def _rich_table(grid: Grid) -> Table:
    """Return a table for the terminal, differences that exclude 0 in bold."""
    table = Table(title=Text(grid.title), title_justify="left")
    for number, name in enumerate(grid.header):
        table.add_column(Text(name), overflow="fold", no_wrap=0 < number < len(grid.header) - 1)
    for row in grid.rows:
        table.add_row(*(Text(cell, "bold" if cell.endswith(EXCLUDES_ZERO) else "") for cell in row))
    return table
