"""`rlhf-fast sweep recipe.yaml --ppo.kl.coef 0.01 0.05 0.1`: one run of the swept stages for each value, in order.

The stages before the swept one are run once, in the recipe's own folders. The others, from the swept one on, go to
out/sweep/SETTING=VALUE. Several swept settings are combined, each value with each. All runs are checked before the
first starts. One that fails is said in the table, and the others go on. The same command skips what is finished.
"""

from __future__ import annotations

import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast import __version__
from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.config.recipe_flags import Combination, overrides
from rlhf_fast.config.sections import EVAL
from rlhf_fast.config.stages import PPOConfig, SFTConfig
from rlhf_fast.config.yaml_file import Setting
from rlhf_fast.errors import UserError, writing
from rlhf_fast.run.logs import read_metrics
from rlhf_fast.run.memory import free_memory
from rlhf_fast.run.outputs import check_empty_folder, read_json, take_lock
from rlhf_fast.run.terminal import aligned, format_duration
from rlhf_fast.stages.recipe import (
    SUMMARY_METRICS,
    Recipe,
    check_recipe,
    check_room,
    dependents,
    finished,
    measurement_key,
    planned_models,
    read_measurements,
    read_recipe,
    run_stages,
)

COMMAND = "sweep"
RESULTS, TABLE = "sweep.json", "sweep.md"


class Run(NamedTuple):
    """One combination: its values, its recipe, and the stages that have folders of their own in it."""

    values: dict[str, str]
    recipe: Recipe
    stages: list[str]

    @property
    def label(self) -> str:
        """The values as text, `ppo.kl.coef=0.1`."""
        return ",".join(f"{setting}={value}" for setting, value in self.values.items())


class Outcome(NamedTuple):
    """The result of a run. error: a sentence if it failed. metrics: name -> its first and last value."""

    run: Run
    seconds: float
    metrics: dict[str, tuple[float, float]]
    error: str = ""


def run_sweep(
    path: str | Path, chosen: Sequence[Combination], folder: str = "", echo: Callable[[str], None] = print
) -> tuple[list[str], list[str]]:
    """Run every combination; print the table and write it to `folder`; then evaluate all models side by side. Return a
    sentence for each run that failed, and one for each figure that is below its threshold.

    folder: "" = the folder `sweep` in that of the recipe.
    """
    runs = plan(path, chosen, folder)
    out = _folder(runs[0].recipe, folder)
    shared = _shared(runs[0])
    evaluation = _evaluation(runs, out)
    _check(runs, out)
    if evaluation is not None:
        _check_evaluation(evaluation, runs)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with take_lock(out, out):
        if not (out / RESULTS).exists():
            _write(out, [])  # signs the folder, so that the same command goes on there
        if not all(map(finished, shared.stages.values())):
            _check_room(runs, echo)
        if shared.stages:
            run_stages(shared, echo)
        outcomes = []
        for i, run in enumerate(runs, 1):
            echo(f"{COMMAND}: run {i} of {len(runs)}: {run.label}")
            outcomes.append(_run(run, echo))
            _write(out, outcomes)
        echo("\n".join([*table(outcomes), *equal_rows(outcomes)]))
        echo(f"{COMMAND}: the table is in {out / TABLE}")
    failures = [f"{outcome.run.label}: failed: {outcome.error}" for outcome in outcomes if outcome.error]
    made = [outcome.run for outcome in outcomes if not outcome.error]
    if evaluation is None or not made:
        return failures, []
    from rlhf_fast.eval.evaluate import evaluate_and_print

    return failures, evaluate_and_print(_evaluation(made, out) or evaluation)


def plan(path: str | Path, chosen: Sequence[Combination], folder: str = "") -> list[Run]:
    """Return the runs, each a recipe whose swept stages have folders of their own. UserError for two of one folder."""
    runs: list[Run] = []
    for values, flags in chosen:
        settings = overrides(flags, COMMAND)
        try:
            recipe = read_recipe(path, settings)
        except UserError as error:
            if "ppo.reward" in values and getattr(error.__cause__, "name", "") == "reward_weights":
                raise UserError(
                    f"{error}; each value of a swept reward is one alone: --ppo.reward-weights without a value leaves"
                    " the recipe's weights out"
                ) from error
            raise
        for_all = any("." not in setting for setting in values)
        swept = {setting.partition(".")[0] for setting in values}
        stages = dependents(recipe.stages, [*recipe.stages] if for_all else swept)
        for stage in stages:
            if "out" in settings.get(stage, {}):
                raise UserError(
                    f"{COMMAND}: --{stage}.out names one folder for several runs; give --sweep.out, the folder of all"
                )
        own = _folder(recipe, folder) / _folder_name(values)
        for stage in stages:
            settings.setdefault(stage, {})["out"] = Setting(str(own / stage), "the sweep")
        runs.append(Run(values, read_recipe(path, settings), stages))
    places = [run.recipe.stages[run.stages[0]].out for run in runs]
    if twice := [place for place in places if places.count(place) > 1]:
        raise UserError(f"{COMMAND}: two of the values would have the folder {twice[0]}; sweep them one by one")
    return runs


def _folder(recipe: Recipe, folder: str) -> Path:
    return Path(folder).expanduser() if folder else recipe.out / COMMAND


def _folder_name(values: dict[str, str]) -> str:
    """Return the name of a combination's folder. Of a path only letters that every file system has are kept."""
    pairs = (
        f"{setting}={re.sub('[^A-Za-z0-9.+-]+', '_', value).strip('_') or '_'}" for setting, value in values.items()
    )
    return ",".join(pairs)


def _shared(run: Run) -> Recipe:
    """Return the recipe of the stages that all runs share."""
    stages = {stage: cfg for stage, cfg in run.recipe.stages.items() if stage not in run.stages}
    return Recipe(run.recipe.out, stages)


def _check_room(runs: Sequence[Run], echo: Callable[[str], None]) -> None:
    """Say which runs will not fit into memory or on the disk, before any stage trains. UserError if none will."""
    errors = list(filter(None, (_room_error(run, echo) for run in runs)))
    if len(errors) == len(runs):
        raise errors[0]


def _room_error(run: Run, echo: Callable[[str], None]) -> UserError | None:
    try:
        check_room(run.recipe, run.stages)
    except UserError as error:
        echo(f"{COMMAND}: {run.label} will fail: {error}")
        return error
    return None


def _check(runs: Sequence[Run], out: Path) -> None:
    """Raise UserError, before the first run starts, for all that can be seen to be wrong in one of them."""
    saved = read_json(out / RESULTS)
    if saved is None:
        check_empty_folder(out, COMMAND, may_hold=("lock", f"{RESULTS}.tmp"))
    elif not isinstance(saved, dict) or COMMAND not in str(saved.get("made_by")):
        raise UserError(f"{out / RESULTS}: was not written by a sweep of ours; give another --sweep.out, or move it")
    for run in runs:

        def remedy(stage: str, run: Run = run) -> str:
            if stage in run.stages:
                return "give another folder for the runs with --sweep.out"
            return f"give a new folder with --{stage}.out, or --out for all"

        try:
            check_recipe(run.recipe._replace(evaluation=None), remedy)
        except UserError as error:
            raise UserError(f"{error} (run {run.label})") from error


def _evaluation(runs: Sequence[Run], out: Path) -> EvalConfig | None:
    """Return the evaluation of the recipe's models side by side, those of each run by the name `ppo(0.1)`."""
    evaluation = runs[0].recipe.evaluation
    if evaluation is None:
        return None
    own = {cfg.out for run in runs for stage, cfg in run.recipe.stages.items() if stage in run.stages}
    models = {name: path for name, path in evaluation.model_paths().items() if path not in own}
    for run in runs:
        values = ",".join(re.sub("[^A-Za-z0-9.+-]+", "_", value) for value in run.values.values())
        for stage in run.stages:
            if isinstance(cfg := run.recipe.stages[stage], (SFTConfig, PPOConfig)):
                models[f"{stage}({values})"] = cfg.out
    entries = tuple(f"{name}={path}" for name, path in models.items())
    return replace(evaluation, models=entries, out=str(out / EVAL))


def _check_evaluation(evaluation: EvalConfig, runs: Sequence[Run]) -> None:
    from rlhf_fast.eval.evaluate import check
    from rlhf_fast.stages.fit import check_device

    check_device(EVAL, evaluation.device)
    planned = {folder: head for run in runs for folder, head in planned_models(run.recipe.stages).items()}
    check(evaluation, planned=planned)


def _run(run: Run, echo: Callable[[str], None]) -> Outcome:
    """Run the stages of a combination. An error, but no signal, ends this run alone."""
    start = time.perf_counter()
    error = ""
    try:
        run_stages(run.recipe, lambda line: None if line.partition(":")[0] not in run.stages else echo(line))
    except UserError as found:
        error = str(found)
    except Exception as found:  # a reward of the user's, or out of memory: the next value may do
        traceback.print_exc()
        error = f"{type(found).__name__}: {(str(found).splitlines() or [''])[0]}"
    if error:
        print(f"{COMMAND}: {run.label}: failed: {error}", file=sys.stderr)
    free_memory()
    measured = read_measurements(run.recipe.out)
    times = [measured.get(measurement_key(stage, run.recipe), {}).get("seconds", 0.0) for stage in run.stages]
    return Outcome(run, sum(times) or time.perf_counter() - start, _end_metrics(run), error)


def _end_metrics(run: Run) -> dict[str, tuple[float, float]]:
    """Return the first and the last value of the main metrics of the run's own stages."""
    found = {}
    for stage in run.stages:
        rows: list[dict[str, Any]] = []
        with suppress(UserError):  # a run that failed early has none
            rows = read_metrics(run.recipe.stages[stage].out)
        for name in SUMMARY_METRICS[stage]:
            values = [float(row[name]) for row in rows if isinstance(row.get(name), (int, float))]
            values = [value for value in values if math.isfinite(value)]
            if values:
                found[name] = (values[0], values[-1])
    return found


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a line for each run: its values, the last value of each of its main metrics, its time and folder."""
    return aligned(_cells(outcomes))


def equal_rows(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a sentence on runs of different values whose figures are all the same."""
    made = [outcome for outcome in outcomes if outcome.metrics and not outcome.error]
    if len(made) < 2 or any(outcome.metrics != made[0].metrics for outcome in made):
        return []
    names = " and ".join(made[0].run.values)
    return [f"{COMMAND}: all figures are equal: the runs are too short to differ, or {names} has no effect in them"]


def _cells(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.metrics))
    rows = [(*outcomes[0].run.values, *names, "time", "folder")]
    for outcome in outcomes:
        cells = [f"{outcome.metrics[name][1]:.4g}" if name in outcome.metrics else "-" for name in names]
        place = str(Path(outcome.run.recipe.stages[outcome.run.stages[-1]].out).parent)
        end = f"failed: {outcome.error}" if outcome.error else place
        rows.append((*outcome.run.values.values(), *cells, format_duration(outcome.seconds), end))
    return rows


def _write(out: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the results so far as JSON and as a table in Markdown."""
    from rlhf_fast.run.checkpoint import write_json

    rows: list[dict[str, Any]] = [
        {
            "values": outcome.run.values,
            "status": "failed" if outcome.error else "finished",
            **({"error": outcome.error} if outcome.error else {}),
            "seconds": outcome.seconds,
            "metrics": {name: {"first": first, "last": last} for name, (first, last) in outcome.metrics.items()},
            "folders": {stage: outcome.run.recipe.stages[stage].out for stage in outcome.run.stages},
        }
        for outcome in outcomes
    ]
    write_json(out / RESULTS, {"made_by": f"rlhf-fast {__version__} {COMMAND}", "runs": rows})
    if not outcomes:
        return
    head, *lines = _cells(outcomes)
    cells = [head, tuple("---" for _ in head), *lines]
    text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in cells)
    with writing(out / TABLE):
        unfinished = out / f"{TABLE}.tmp"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(out / TABLE)
