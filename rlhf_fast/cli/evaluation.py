"""`rlhf-fast eval`: the evaluation, the list of tasks, and the comparison of judges with people's labels."""

from __future__ import annotations

import sys

from rlhf_fast.config.evaluation import EvalConfig, EvalOptions
from rlhf_fast.eval.evaluate import evaluate_and_print
from rlhf_fast.eval.judges.check import check_judges
from rlhf_fast.eval.judges.validation_table import table
from rlhf_fast.eval.sets import DEMO_SETS
from rlhf_fast.eval.tasks import describe
from rlhf_fast.run.terminal import aligned
from rlhf_fast.stages.fit import check_device

BELOW = 1
"""Exit status where a figure is below its threshold."""


def run_eval(options: EvalOptions) -> int:
    """Run one form of the command and return the exit status."""
    if options.list:
        print("\n".join(task_list(options)))
        return 0
    if options.check_judges:
        checked, notes = check_judges(options.data or DEMO_SETS)
        print("\n".join([table(checked), *notes]))
        return 0
    check_device("eval", options.device)
    failures = evaluate_and_print(options, options.label)
    for failure in failures:
        print(f"eval: {failure}", file=sys.stderr)
    return BELOW if failures else 0


def task_list(cfg: EvalConfig) -> list[str]:
    """Return a line on each task: the file that it needs and has, what it measures, and its judge."""
    rows = [("task", "group", "file", "rows", "judge", "what it measures")]
    notes = []
    for found in describe(cfg.data or DEMO_SETS):
        count = "-" if found.rows is None else str(found.rows)
        rows.append((found.task, found.group, found.file, count, ", ".join(found.judges) or "-", found.summary))
        notes += [found.error] if found.error else []
    return [*aligned(rows), *notes]
