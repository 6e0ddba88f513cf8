"""The evaluation: models x tasks, judges, and the records of results.json."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast import __version__
from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.data.datasets import prompt_as_text
from rlhf_fast.errors import UserError, writing
from rlhf_fast.eval import report
from rlhf_fast.eval.answers import AnswerFile
from rlhf_fast.eval.figure import draw
from rlhf_fast.eval.files import Row
from rlhf_fast.eval.generation import GenerationTask
from rlhf_fast.eval.held_out import checksum, training_notes
from rlhf_fast.eval.judges import Judge, PairJudge, load_judge
from rlhf_fast.eval.likelihood import LikelihoodTask
from rlhf_fast.eval.measures import Measure, difference_record, result_record
from rlhf_fast.eval.preference import compare
from rlhf_fast.eval.run_task import EvaluatedModel, Task, read_scores
from rlhf_fast.eval.sets import DEMO_SETS, find_set, read_set, require_set
from rlhf_fast.eval.tasks import GROUPS, TASKS, select_tasks
from rlhf_fast.run.checkpoint import write_json
from rlhf_fast.run.info import PACKAGES, package_version
from rlhf_fast.run.outputs import check_empty_folder, read_json

RESULTS, REPORT, FIGURE, SETTINGS = "results.json", "report.md", "report.png", "eval.json"
SMALL_SAMPLE = 100
PREFERENCE = "preference"
Echo = Callable[[str], None]


class TaskRows(NamedTuple):
    """A task and the rows of its set."""

    task: Task
    rows: list[Row]


def evaluate(cfg: EvalConfig, echo: Echo | None = None) -> dict[str, Any]:
    """Evaluate the models of `cfg`, write results.json, report.md and report.png to `cfg.out`, and return the results.

    What is in `out` already is not computed again. echo: gets a line on each finished task; None prints it to stderr.
    """
    echo = echo or (lambda line: print(f"eval: {line}", file=sys.stderr, flush=True))
    paths = cfg.model_paths()
    baseline = cfg.baseline_of(tuple(paths))
    _prepare_folder(cfg)
    notes: list[str] = []
    files: dict[str, str] = {}
    tasks = _read_tasks(cfg, paths, notes, files)
    judges = _load_judges(cfg, [found.task for found in tasks], len(paths))
    models = [EvaluatedModel(name, path, cfg) for name, path in paths.items()]
    answers: dict[tuple[str, str], AnswerFile] = {}
    for model in models:
        for task, rows in tasks:
            start = time.perf_counter()
            file = answers[model.name, task.name] = model.run(task, rows, _progress(echo, model.name, task, rows))
            took = time.perf_counter() - start
            echo(f"{model.name}: {task.name}: {len(rows)} rows, {took:.1f} s" if took > 0.5 else
                 f"{model.name}: {task.name}: {len(rows)} rows, done")  # fmt: skip
        model.close()
    results = {
        "meta": _meta(cfg, models, files, answers),
        "judges": {role: _judge_record(judge) for role, judge in judges.items()},
        **_records(tasks, judges, answers, list(paths), baseline, notes),
        "notes": notes,
    }
    _write(cfg, results)
    return results


def _prepare_folder(cfg: EvalConfig) -> None:
    """Create `out`, or check that an evaluation has made it."""
    out = Path(cfg.out)
    if not isinstance(read_json(out / SETTINGS), dict):
        check_empty_folder(out, "evaluation", may_hold=(f"{SETTINGS}.tmp",))
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / SETTINGS, {"made_by": f"rlhf-fast {__version__} eval"})


def _read_tasks(
    cfg: EvalConfig, models: Mapping[str, str], notes: list[str], files: dict[str, str]
) -> list[TaskRows]:
    """Return the tasks that can be run, with their rows. notes: gets what was left out. files: set -> checksum."""
    folder = Path(cfg.data) if cfg.data else DEMO_SETS
    if not cfg.data:
        notes.append("The sets are those of the demo's world: they show that everything works, and are no benchmark.")
    named = {name.strip() for entry in cfg.tasks for name in entry.split(",")} & TASKS.keys()
    rows: dict[str, list[Row]] = {}
    found = []
    for task in select_tasks(cfg.tasks):
        has_judge = isinstance(task, LikelihoodTask) or PREFERENCE not in task.judges or cfg.judge.preference
        if task.name in named:
            require_set(task.set, folder)
        paths = find_set(task.set, folder)
        if not paths or not has_judge or (task.group == PREFERENCE and len(models) < 2):
            why = (
                f"no file of the set {task.set} in {folder}" if not paths
                else "it compares models, and there is only one" if has_judge
                else "no judge: give --judge.preference a reward model's folder, module:function or a file of labels"
            )  # fmt: skip
            if task.name in named:
                raise UserError(f"eval: {task.name} cannot be run: {why}")
            notes.append(f"{task.name} was left out: {why}.")
            continue
        if task.set not in rows:
            rows[task.set] = read_set(task.set, paths, cfg.limit, notes)
            files[task.set] = checksum(paths)
            notes += training_notes(paths, models) if task.set == "text" else ()
        if not rows[task.set]:
            notes.append(f"{task.name} was left out: {', '.join(map(str, paths))} has no row for it.")
            continue
        found.append(TaskRows(task, rows[task.set]))
    if not found:
        raise UserError(f"eval: there is nothing to do: {' '.join(notes)}")
    if 0 < cfg.limit < SMALL_SAMPLE:
        notes.append(f"With {cfg.limit} rows, intervals are wider than ± 10 points.")
    return found


def _load_judges(cfg: EvalConfig, tasks: Sequence[Task], num_models: int) -> dict[str, Judge | PairJudge]:
    """Return the judges that the tasks need, by role."""
    roles = dict.fromkeys(role for task in tasks if isinstance(task, GenerationTask) for role in task.judges)
    if num_models < 2:
        roles.pop(PREFERENCE, None)
    device = None if cfg.device == "auto" else cfg.device
    return {
        role: load_judge(getattr(cfg.judge, role), role, out=cfg.out, labels=cfg.judge_labels, device=device)
        for role in roles
    }


def _records(
    tasks: Sequence[TaskRows],
    judges: Mapping[str, Any],
    answers: Mapping[tuple[str, str], AnswerFile],
    models: Sequence[str],
    baseline: str,
    notes: list[str],
) -> dict[str, list[dict[str, Any]]]:
    """Return the lists `results` and `differences`. notes: gets what the figures do not say."""
    results, differences = [], []
    for task, rows in tasks:
        measures = {name: _measures(task, rows, answers[name, task.name], judges) for name in models}
        for name in models:
            seconds = answers[name, task.name].seconds
            results += [result_record(name, task.name, measure, seconds) for measure in measures[name]]
            if overlong := answers[name, task.name].info.get("overlong"):
                notes.append(f"{task.name}: {name}: {overlong} contexts were cut on the left to fit its positions.")
            if name == baseline:
                continue
            theirs = {measure.name: measure for measure in measures[baseline]}
            differences += [
                difference_record(name, baseline, task.name, measure, theirs[measure.name])
                for measure in measures[name]
                if measure.name in theirs
            ]
        if isinstance(task, GenerationTask) and PREFERENCE in task.judges and PREFERENCE in judges:
            for name in models:
                if name != baseline:
                    pair = (answers[name, task.name], answers[baseline, task.name])
                    results += _preference_records(task, rows, name, pair, judges[PREFERENCE])
        if isinstance(task, LikelihoodTask) and (chance := task.chance(rows)):
            shown = ", ".join(f"{name} {value:.3f}" for name, value in chance.items())
            notes.append(f"{task.name}: a model that guesses has {shown}.")
    return {"results": results, "differences": differences}


def _measures(task: Task, rows: Sequence[Row], file: AnswerFile, judges: Mapping[str, Judge]) -> list[Measure]:
    """Return the measures of a task for one model."""
    records = file.records(rows)
    if isinstance(task, LikelihoodTask):
        return task.measures(rows, [read_scores(record) for record in records])
    texts = [record["answer"] for record in records]
    prompts = [prompt_as_text(task.question(row)) for row in rows]
    single = [role for role in task.judges if role != PREFERENCE]
    verdicts = {role: judges[role](prompts, texts, rows) for role in single}
    return task.measures(rows, texts, verdicts, judges)


def _preference_records(
    task: GenerationTask, rows: Sequence[Row], name: str, files: tuple[AnswerFile, AnswerFile], judge: PairJudge
) -> list[dict[str, Any]]:
    """Return the records of a model's win rate against the baseline."""
    ours, theirs = ([record["answer"] for record in file.records(rows)] for file in files)
    prompts = [prompt_as_text(task.question(row)) for row in rows]
    found = compare(judge, prompts, ours, theirs)
    records = [result_record(name, task.name, measure) for measure in found.measures()]
    controlled = found.estimates()["win_rate_length_controlled"]
    if controlled is not None:
        record = {"model": name, "task": task.name, "measure": "win_rate_length_controlled", **controlled.fields()}
        records.insert(1, {**record, "unit": "share", "judge": judge.name, "seconds": 0.0})
    return records


def _judge_record(judge: Any) -> dict[str, Any]:
    validation = judge.validation
    return {
        "name": judge.name,
        "threshold": getattr(judge, "threshold", None),
        "validation": validation._asdict() if validation is not None else None,
    }


def _meta(
    cfg: EvalConfig,
    models: Sequence[EvaluatedModel],
    files: Mapping[str, str],
    answers: Mapping[tuple[str, str], AnswerFile],
) -> dict[str, Any]:
    """Return what the figures hang on."""
    formats: dict[str, set[str]] = {model.name: set() for model in models}
    for (name, _), file in answers.items():
        formats[name].add(file.info.get("template", ""))
    return {
        "versions": {"rlhf-fast": __version__, **{name: package_version(name) for name in PACKAGES}},
        "seed": cfg.seed,
        "limit": cfg.limit,
        "template": cfg.template,
        "dtype": cfg.dtype,
        "temperature": cfg.temperature,
        "files": dict(files),
        "models": {
            model.name: {"path": model.path, "weights": model.weights, "templates": sorted(formats[model.name])}
            for model in models
        },
    }


def _write(cfg: EvalConfig, results: Mapping[str, Any]) -> None:
    out = Path(cfg.out)
    with writing(out):
        write_json(out / RESULTS, results)
        (out / REPORT).write_text(report.markdown(results, GROUPS), encoding="utf-8")
        draw(results, GROUPS, out / FIGURE)


def _progress(echo: Echo, model: str, task: Task, rows: Sequence[Row]) -> Callable[[int], None]:
    """Return a function that says how many rows are done, while there are more."""

    def show(done: int) -> None:
        if done < len(rows):
            echo(f"{model}: {task.name}: {done} of {len(rows)} rows")

    return show
