"""The evaluation: models x tasks, judges, and the records of results.json."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_fast import __version__
from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.data.chat_template import process_start
from rlhf_fast.errors import UserError, did_you_mean, listed, shortened, writing
from rlhf_fast.eval import report, reward_report
from rlhf_fast.eval.answers import FOLDER, SECONDS, TEMPLATE
from rlhf_fast.eval.figure import draw
from rlhf_fast.eval.files import Row
from rlhf_fast.eval.generation import GenerationTask
from rlhf_fast.eval.held_out import optimized_notes
from rlhf_fast.eval.judged import (
    Answers,
    FoundJudges,
    ask_people,
    find_judges,
    judge_record,
    measures_of,
    preference_records,
    require_all_labels,
    roles_of,
)
from rlhf_fast.eval.judges import PREFERENCE, Judge, PairJudge
from rlhf_fast.eval.likelihood import LikelihoodTask
from rlhf_fast.eval.measures import difference_record, result_record
from rlhf_fast.eval.model_check import Planned, check_model, check_rewards
from rlhf_fast.eval.notes import answer_notes, constant_answers_note, date_notes, dates_of, unjudged_notes
from rlhf_fast.eval.reward_records import check_columns, find_comparisons, ppo_models, reward_records
from rlhf_fast.eval.run_task import EvaluatedModel, Task
from rlhf_fast.eval.tables import CONTRAST, Record, with_contrast
from rlhf_fast.eval.task_rows import Selection, select_rows
from rlhf_fast.eval.tasks import GROUPS
from rlhf_fast.run.checkpoint import write_json
from rlhf_fast.run.info import PACKAGES, package_version
from rlhf_fast.run.outputs import check_empty_folder, read_json, take_lock
from rlhf_fast.run.prompt_format import recorded_format

RESULTS, REPORT, FIGURE, SETTINGS = "results.json", "report.md", "report.png", "eval.json"
NO_BASELINE = "it compares models, and there is only one"
NO_JUDGE = "no judge; give judge.preference a reward model's folder, module:function, a file of labels or chat:FOLDER"
PROGRESS_SECONDS = 5.0
Echo = Callable[[str], None]


def evaluate(cfg: EvalConfig, echo: Echo | None = None, label: int = 0) -> dict[str, Any]:
    """Evaluate the models of `cfg`, write results.json, report.md and report.png to `cfg.out`, and return the results.

    What is in `out` already is not computed again. echo: gets a line on each finished task; None prints it to stderr.
    label: number of answers of each judge that people are asked to judge, in to_label.jsonl.
    """
    selection, judges = check(cfg, asks_people=label > 0)
    date = _prepare_folder(cfg, cfg.model_paths())
    with take_lock(Path(cfg.out) / FOLDER, cfg.out):
        return _evaluate(cfg, echo or _print, label, selection, judges, date)


def _evaluate(
    cfg: EvalConfig, echo: Echo, label: int, selection: Selection, found: FoundJudges, date: datetime
) -> dict[str, Any]:
    """Do what `evaluate` says in a folder that no other process uses."""
    paths = cfg.model_paths()
    baseline = cfg.baseline_of(tuple(paths))
    judges, pair_judge = found.load()
    reward, sections = reward_records(cfg, paths) if cfg.reward else ([], {})
    models = [EvaluatedModel(name, path, cfg, date) for name, path in paths.items()]
    answers = _answers(models, selection, echo)
    require_all_labels(cfg.out, selection.tasks, answers, judges, pair_judge, baseline)
    notes = list(selection.notes)
    if pair_judge is not None:
        notes += optimized_notes(pair_judge.name, paths)
    records = _records(selection, judges, pair_judge, answers, list(paths), baseline, notes)
    all_judges: dict[str, Judge | PairJudge] = dict(judges)
    if pair_judge is not None:
        all_judges[PREFERENCE] = pair_judge
    meta = _meta(cfg, models, selection, answers)
    notes += date_notes({name: entry["dates"] for name, entry in meta["models"].items()})
    results = {
        "meta": meta,
        "judges": {role: judge_record(judge) for role, judge in all_judges.items()},
        **records,
        "reward": reward,
        "sections": sections,
        "notes": notes,
    }
    if dropped := [name for name in _models_of_report(cfg) if name not in paths]:
        echo(
            f"the report in {cfg.out} had also {', '.join(dropped)}, whose answers are kept: name them again in models"
            " for a report of all, or give another out"
        )
    _write(cfg, results)
    shown = {task.name for task, _ in selection.tasks}
    kept = {path.stem for path in (Path(cfg.out) / FOLDER).glob("*/*.jsonl")} - shown
    if kept:
        echo(f"the report has the tasks of this command; there are also answers to {', '.join(sorted(kept))}")
    for note in ask_people(cfg.out, label, selection.tasks, answers, judges) if label else ():
        echo(note)
    return results


def check(cfg: EvalConfig, asks_people: bool = False, planned: Planned | None = None) -> tuple[Selection, FoundJudges]:
    """Return the tasks that will run, with their rows, and the judges that they need.

    UserError for all that can be seen to be wrong before a model is loaded. planned: folders of a recipe's models,
    which need not be there yet.
    """
    planned = planned or {}
    paths = cfg.model_paths()
    cfg.baseline_of(tuple(paths))
    missing_preference = NO_BASELINE if len(paths) < 2 else "" if cfg.judge.preference else NO_JUDGE
    selection = select_rows(cfg.tasks, cfg.data, cfg.limit, paths, missing_preference, may_be_empty=bool(cfg.reward))
    tasks = [task for task, _ in selection.tasks]
    if cfg.reward:
        find_comparisons(cfg.data)
    if asks_people and not {*roles_of(tasks)} - {PREFERENCE}:
        raise UserError("eval: label: none of the tasks has a judge of single answers, which people could label")
    _check_thresholds(cfg, paths, tasks)
    _check_folder(cfg, planned)
    judges = find_judges(cfg, tasks, planned)
    check_rewards(cfg, planned)
    check_columns(cfg)
    if cfg.gold and not planned:
        ppo_models(paths)
    for name, path in paths.items():
        check_model(path, "lm", f"models: {name}", planned)
    return selection, judges


def evaluate_and_print(cfg: EvalConfig, label: int = 0) -> list[str]:
    """Evaluate and print the report. Return a sentence for each threshold of `fail_under` that is not reached."""
    results = evaluate(cfg, label=label)
    report.print_report(results, GROUPS, Console(highlight=False, soft_wrap=False))
    written = [str(path) for name in (REPORT, FIGURE) if (path := Path(cfg.out) / name).is_file()]
    _print(f"{' and '.join(map(shortened, written))} written")
    return report.check_thresholds([*results["results"], *results["reward"]], cfg.thresholds())


def _print(line: str) -> None:
    print(f"eval: {line}", file=sys.stderr, flush=True)


def _check_thresholds(cfg: EvalConfig, models: Mapping[str, str], tasks: Sequence[Task]) -> None:
    """Raise UserError for a name of fail_under that no figure of these tasks can have."""
    measures = {task.name: [*task.measure_names] for task in tasks}
    if {"refusal", "over_refusal"} <= measures.keys():
        measures["refusal"].append(CONTRAST)
    if cfg.reward:
        nothing = reward_report.records(reward_report.report([]), cfg.reward)
        measures[report.REWARD] = [record["measure"] for record in nothing]
    for name in cfg.thresholds():
        model, separator, rest = name.partition(":")
        task, dot, measure = (rest if separator and model in models else name).partition(".")
        if task not in measures and separator and model not in models:
            raise UserError(f"eval: fail_under {name}: no model is called {model}; {_nearest(model, models)}")
        if task not in measures:
            raise UserError(f"eval: fail_under {name}: no task that runs has that name; {_nearest(task, measures)}")
        if dot and not any(fnmatchcase(measure, pattern) for pattern in measures[task]):
            hint = _nearest(measure, measures[task])
            raise UserError(f"eval: fail_under {name}: {task} has no measure {measure!r}; {hint}")


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the name that was meant, or at all that there are."""
    return did_you_mean(name, known, f"there are {listed([*known], 12)}")


def _check_folder(cfg: EvalConfig, planned: Planned) -> None:
    """Raise UserError unless `out` can be made, or an evaluation has made it."""
    out = Path(cfg.out)
    if isinstance(read_json(out / SETTINGS), dict):
        return
    check_empty_folder(out, "evaluation", may_hold=(f"{SETTINGS}.tmp",))
    for folder in planned:
        if Path(folder).resolve().is_relative_to(out.resolve()):
            raise UserError(f"eval: out {out}: a stage will write to {folder}; choose another folder")


def _prepare_folder(cfg: EvalConfig, models: Mapping[str, str]) -> datetime:
    """Create `out`, unless an evaluation has. Return the date that chat templates take for today's in it.

    It is the first that a run of these models has recorded, else this day's. It stays the same, so that answers of
    another day, and of models that are added, are those to the same prompts.
    """
    out = Path(cfg.out)
    saved = read_json(out / SETTINGS)
    settings = saved if isinstance(saved, dict) else {"made_by": f"rlhf-fast {__version__} eval"}
    with suppress(KeyError, TypeError, ValueError):
        return datetime.fromisoformat(settings["date"])
    recorded = [date for path in models.values() if (date := recorded_format(path).get("date"))]
    date = datetime.fromisoformat(recorded[0]) if recorded else process_start()
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SETTINGS, {**settings, "date": date.isoformat()})
    return date


def _models_of_report(cfg: EvalConfig) -> list[str]:
    """Return the names of the models in the report that is in `out`, none where there is no report."""
    with suppress(AttributeError, KeyError, TypeError, UserError):  # what is there is written over in any case
        return list(read_json(Path(cfg.out) / RESULTS)["meta"]["models"])
    return []


def _answers(models: Sequence[EvaluatedModel], selection: Selection, echo: Echo) -> Answers:
    """Return all answers, those that are missing computed, one model in memory at a time."""
    answers: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for model in models:
        for task, rows in selection.tasks:
            start = time.perf_counter()
            file = model.run(task, rows, _progress(echo, model.name, task, rows))
            answers[model.name, task.name] = file.records(rows)
            how = f"{time.perf_counter() - start:.1f} s" if file.has_new else "done before"
            if file.num_stale:
                how += f"; {file.num_stale} answers of another {model.name}, or by other settings, were replaced"
            echo(f"{model.name}: {task.name}: {len(rows)} rows, {how}")
        model.close()
    return answers


def _progress(echo: Echo, model: str, task: Task, rows: Sequence[Row]) -> Callable[[int], None]:
    """Return a function that says how many rows are done, while there are more, every PROGRESS_SECONDS."""
    said = time.monotonic()

    def show(done: int) -> None:
        nonlocal said
        if done < len(rows) and time.monotonic() >= said + PROGRESS_SECONDS:
            said = time.monotonic()
            echo(f"{model}: {task.name}: {done} of {len(rows)} rows")

    return show


def _records(
    selection: Selection,
    judges: Mapping[str, Judge],
    pair_judge: PairJudge | None,
    answers: Answers,
    models: Sequence[str],
    baseline: str,
    notes: list[str],
) -> dict[str, list[Record]]:
    """Return the lists `results` and `differences`. notes: gets what the figures do not say."""
    results: list[Record] = []
    differences: list[Record] = []
    for task, rows in selection.tasks:
        records = {name: answers[name, task.name] for name in models}
        measures = {name: measures_of(task, rows, own, judges) for name, own in records.items()}
        others = [name for name in models if name != baseline]
        notes += answer_notes(task, records)
        for name in models:
            seconds = sum(record[SECONDS] for record in records[name])
            results += [result_record(name, task.name, measure, seconds) for measure in measures[name]]
        if isinstance(task, GenerationTask) and PREFERENCE in task.judges and pair_judge is not None:
            for name in others:
                results += preference_records(task, rows, name, (records[name], records[baseline]), pair_judge)
        theirs = {measure.name: measure for measure in measures[baseline]}
        differences += [
            difference_record(name, baseline, task.name, measure, theirs[measure.name])
            for name in others
            for measure in measures[name]
            if measure.name in theirs and measure.weights == theirs[measure.name].weights  # tokens of one tokenizer
        ]
        if isinstance(task, LikelihoodTask) and (chance := task.chance(rows)):
            shown = ", ".join(f"{name} {value:.3f}" for name, value in chance.items())
            notes.append(f"{task.name}: a model that guesses has {shown}.")
        if note := constant_answers_note(task, rows, judges):
            notes.append(note)
    notes += unjudged_notes(results)
    return {"results": with_contrast(results), "differences": differences}


def _meta(cfg: EvalConfig, models: Sequence[EvaluatedModel], selection: Selection, answers: Answers) -> dict[str, Any]:
    """Return what the figures hang on."""
    records: dict[str, list[Record]] = {model.name: [] for model in models}
    for (name, _), own in answers.items():
        records[name] += own
    versions = {"rlhf-fast": __version__, **{name: package_version(name) for name in PACKAGES}}
    settings = {name: getattr(cfg, name) for name in ("seed", "limit", "template", "dtype", "temperature")}
    entries = {
        model.name: {
            "path": model.path,
            "weights": model.weights,
            "templates": sorted({record[TEMPLATE] for record in records[model.name]}),
            "dates": dates_of(records[model.name]),
        }
        for model in models
    }
    lengths = {
        task.name: min(task.max_new_tokens, cfg.max_new_tokens or task.max_new_tokens)
        for task, _ in selection.tasks
        if isinstance(task, GenerationTask)
    }
    others = {"max_new_tokens": lengths, "files": selection.files, "models": entries}
    return {"versions": versions, **settings, **others}


def _write(cfg: EvalConfig, results: Mapping[str, Any]) -> None:
    out = Path(cfg.out)
    with writing(out):
        write_json(out / RESULTS, results)
        (out / REPORT).write_text(report.markdown(results, GROUPS), encoding="utf-8")
    try:
        draw(results["results"], GROUPS, out / FIGURE)
    except UserError as error:  # matplotlib is an extra
        _print(f"no picture: {error}")
