"""`rlhf-fast eval`: the evaluation, the list of tasks, and the comparison of judges with people's labels."""

from __future__ import annotations

import shutil
import sys
import textwrap

from rlhf_fast.config.evaluation import EvalConfig, EvalOptions
from rlhf_fast.eval.evaluate import evaluate_and_print
from rlhf_fast.eval.judges.check import check_judges, stored_figures
from rlhf_fast.eval.judges.validation_table import table
from rlhf_fast.eval.sets import DEMO_SETS
from rlhf_fast.eval.tasks import describe
from rlhf_fast.run.terminal import aligned
from rlhf_fast.stages.fit import check_device


def run_eval(options: EvalOptions) -> list[str]:
    """Run one form of the command. Return a sentence for each figure on the wrong side of its threshold."""
    if options.list:
        # COLUMNS, else the terminal's width; what is piped keeps one line a task
        print("\n".join(task_list(options, shutil.get_terminal_size((sys.maxsize, 0)).columns)))
        return []
    if options.check_judges:
        if not options.data:
            print(f"{table(stored_figures())}\n--data FOLDER computes them again on the labelled files that are there")
            return []
        checked, notes = check_judges(options.data)
        print("\n".join([table(checked), *notes]))
        return []
    check_device("eval", options.device)
    return evaluate_and_print(options, options.label)


def task_list(cfg: EvalConfig, width: int = sys.maxsize) -> list[str]:
    """Return a line on each task: the file that it needs and has, what it measures, and its judge.

    Where a line is longer than `width`, the judge and what is measured stand below each task, indented.
    """
    tasks = describe(cfg.data or DEMO_SETS)
    rows = [("task", "group", "file", "rows", "judge", "what it measures")]
    for found in tasks:
        count = "-" if found.rows is None else str(found.rows)
        rows.append((found.task, found.group, found.file, count, ", ".join(found.judges) or "-", found.summary))
    notes = [found.error for found in tasks if found.error]
    lines = aligned(rows)
    if max(map(len, lines)) <= width:
        return [*lines, *notes]
    head, *lines = aligned([row[:4] for row in rows])
    narrow = [head]
    for line, (*_, judge, summary) in zip(lines, rows[1:], strict=True):
        text = summary if judge == "-" else f"{summary}; judge: {judge}"
        narrow += [line, *textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")]
    return [*narrow, *notes]
