"""Measures from answers: which judges the tasks need, what they say, and what people are asked to say themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.data.datasets import prompt_as_text
from rlhf_fast.eval.answers import row_key
from rlhf_fast.eval.files import Row
from rlhf_fast.eval.generation import GenerationTask, Judges
from rlhf_fast.eval.judges import PREFERENCE, Judge, JudgeSettings, PairJudge, find_answer_judge, find_pair_judge
from rlhf_fast.eval.judges.cached import CachedJudge
from rlhf_fast.eval.judges.labels import TO_LABEL, LabelJudge, LabelPairJudge, require_labels
from rlhf_fast.eval.judges.validation import choose_to_label
from rlhf_fast.eval.likelihood import LikelihoodTask
from rlhf_fast.eval.measures import Measure, result_record
from rlhf_fast.eval.model_check import Planned
from rlhf_fast.eval.preference import compare
from rlhf_fast.eval.run_task import Record, Task, read_scores
from rlhf_fast.eval.sets import DEMO_JUDGES

Answers = Mapping[tuple[str, str], Sequence[Record]]
"""(model, task) -> the records of its answers, in the order of the task's rows."""


def roles_of(tasks: Sequence[Task]) -> list[str]:
    """Return the roles of the judges that tasks need, each once."""
    return list(dict.fromkeys(role for task in tasks if isinstance(task, GenerationTask) for role in task.judges))


class FoundJudges(NamedTuple):
    """Functions that load the judges that tasks need."""

    single: dict[str, Callable[[], Judge]]
    """Role -> that of single answers."""
    pair: Callable[[], PairJudge] | None

    def load(self) -> tuple[dict[str, Judge], PairJudge | None]:
        """Return the judges of single answers by role, each asked once about an answer, and that of pairs."""
        judges = {role: load() for role, load in self.single.items()}
        cached: dict[str, Judge] = {
            role: judge if isinstance(judge, LabelJudge) else CachedJudge(judge) for role, judge in judges.items()
        }
        return cached, None if self.pair is None else self.pair()


def find_judges(cfg: EvalConfig, tasks: Sequence[Task], planned: Planned) -> FoundJudges:
    """Return the judges that the tasks need. UserError for all that can be seen to be wrong before a model is loaded.

    planned: folders of models that need not be there yet.
    """
    device = None if cfg.device == "auto" else cfg.device
    roles = roles_of(tasks)
    settings = JudgeSettings(cfg.out, cfg.judge_labels, ModelConfig(dtype=cfg.dtype), device, planned=planned)
    specs = {role: getattr(cfg.judge, role) or default_judge(cfg.data, role) for role in roles if role != PREFERENCE}
    single = {role: find_answer_judge(spec, role, settings) for role, spec in specs.items()}
    return FoundJudges(single, find_pair_judge(cfg.judge.preference, settings) if PREFERENCE in roles else None)


def default_judge(data: str, role: str) -> str:
    """Return the judge of a role where none is asked for: "", the built-in one, but for the demo's sets (no `data`) one
    that knows their words."""
    return "" if data else DEMO_JUDGES.get(role, "")


def judge_record(judge: Judge | PairJudge) -> dict[str, Any]:
    """Return a judge's entry in results.json, with null for a figure that does not exist."""
    validation: dict[str, Any] | None = None
    if judge.validation is not None:
        validation = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in judge.validation._asdict().items()
        }
    return {"name": judge.name, "threshold": getattr(judge, "threshold", None), "validation": validation}


def measures_of(task: Task, rows: Sequence[Row], records: Sequence[Record], judges: Judges) -> list[Measure]:
    """Return the measures of a task from one model's records."""
    groups = _groups_of_equal(rows)
    measures = _measures_of(task, rows, records, judges)
    return [measure if measure.groups else measure._replace(groups=groups) for measure in measures]


def _groups_of_equal(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the group of each row, since equal rows are one thing that is independent; () if all rows differ."""
    keys = tuple(map(row_key, rows))
    return keys if len(set(keys)) < len(keys) else ()


def _measures_of(task: Task, rows: Sequence[Row], records: Sequence[Record], judges: Judges) -> list[Measure]:
    if isinstance(task, LikelihoodTask):
        return task.measures(rows, [read_scores(record) for record in records])
    answers = [record["answer"] for record in records]
    prompts = questions(task, rows)
    verdicts = {role: judges[role](prompts, answers, rows) for role in task.judges if role != PREFERENCE}
    return task.measures(rows, answers, verdicts, judges)


def questions(task: GenerationTask, rows: Sequence[Row]) -> list[str]:
    """Return the prompts as judges read them."""
    return [prompt_as_text(task.question(row)) for row in rows]


def preference_records(
    task: GenerationTask,
    rows: Sequence[Row],
    name: str,
    answers: tuple[Sequence[Record], Sequence[Record]],
    judge: PairJudge,
) -> list[dict[str, Any]]:
    """Return the records of a model's win rate against the baseline. answers: the model's and the baseline's."""
    ours, theirs = ([record["answer"] for record in own] for own in answers)
    found = compare(judge, questions(task, rows), ours, theirs, _groups_of_equal(rows))
    records = [result_record(name, task.name, measure) for measure in found.measures()]
    controlled = found.estimates()["lc_win_rate"]
    if controlled is not None:
        named = {"model": name, "task": task.name, "measure": "lc_win_rate"}
        others = {"unit": "share", "judge": judge.name, "seconds": 0.0, "higher_is_better": True}
        records.insert(1, {**named, **controlled.fields(), **others})
    return records


def require_all_labels(
    out: str,
    tasks: Sequence[tuple[Task, list[Row]]],
    answers: Answers,
    judges: Judges,
    pair_judge: PairJudge | None,
    baseline: str,
) -> None:
    """Raise MissingLabels if judges that are files of labels have none of some answers or pairs, of whatever task;
    to_label.jsonl then asks for all of them."""
    found = []
    for role, judge in judges.items():
        if isinstance(judge, LabelJudge):
            found.append(judge.unlabelled(*_judged_answers(role, tasks, answers)))
    if isinstance(pair_judge, LabelPairJudge):
        others = [name for name in dict.fromkeys(name for name, _ in answers) if name != baseline]
        ours = [_judged_answers(PREFERENCE, tasks, answers, [name]) for name in others]
        prompts, theirs, _ = _judged_answers(PREFERENCE, tasks, answers, [baseline])
        first = [text for _, texts, _ in ours for text in texts]
        found.append(pair_judge.unlabelled(prompts * len(others), first, theirs * len(others)))
    require_labels(found, out)


def ask_people(
    out: str, count: int, tasks: Sequence[tuple[Task, list[Row]]], answers: Answers, judges: Judges
) -> list[str]:
    """Write `count` answers of each judge to to_label.jsonl. Return a sentence on each judge."""
    notes = []
    path = Path(out) / TO_LABEL
    for role, judge in judges.items():
        prompts, texts, rows = _judged_answers(role, tasks, answers)
        verdicts = judge(prompts, texts, rows)
        asked = choose_to_label(path, role, prompts, texts, verdicts, judge.threshold, count, rows=rows)
        notes.append(
            f"{role}: {asked} of {len(texts)} answers are in {path}; fill in `label`, then --judge-labels {path}"
        )
    return notes


def _judged_answers(
    role: str, tasks: Sequence[tuple[Task, list[Row]]], answers: Answers, models: Sequence[str] = ()
) -> tuple[list[str], list[str], list[Row]]:
    """Return all answers that a role judges: their prompts, texts and rows. models: () = all."""
    prompts: list[str] = []
    texts: list[str] = []
    rows: list[Row] = []
    for task, own in tasks:
        if isinstance(task, GenerationTask) and role in task.judges:
            for (model, name), records in answers.items():
                if name == task.name and (not models or model in models):
                    prompts += questions(task, own)
                    texts += [record["answer"] for record in records]
                    rows += own
    return prompts, texts, rows
