"""`rlhf-fast compare RUN RUN ...`: runs of one stage beside one another, as an HTML file and tables on the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError, listed
from rlhf_fast.run.compare_page import FIRST_BYTES, Answer, Page, write_page
from rlhf_fast.run.identity import by_name, contents_of
from rlhf_fast.run.logs import METRICS, SAMPLES, read_metrics, read_rows
from rlhf_fast.run.outputs import RUN, check_new_file, read_run
from rlhf_fast.run.plot import Line, check_smooth, load_pyplot, panels
from rlhf_fast.run.samples import given_prompt, numbers_text, responses_of
from rlhf_fast.run.terminal import aligned, format_duration, format_speed, printable

MAX_RUNS = 10
"""As many as there are colours."""
OTHER = ("out", "resume", "resume_with_changed_reward", "log.live", "log.sinks")
"""Settings that say where and how a run is shown."""
PRETRAIN = ("ptx_", "pretrain.", "pretrain_fraction")
LAST = 10
"""Share of a metric's points, 1 / LAST, whose mean is its last value: a single step of PPO is noisy."""
CELL = 40
"""Longest value of a setting on the terminal."""
SHOWN_ON_TERMINAL = ("objective/", "tokens/", "valid/", "loss/", "reward/", "steps", "time", "speed")


@dataclass
class Compared:
    """A run: its folder as it was given, a short name, its run.json, and the rows of its two logs."""

    folder: str
    manifest: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    name: str = ""
    settings: dict[str, str] = field(default_factory=dict)


def compare(folders: Sequence[str], out: str | Path, num_samples: int, smooth: float | None = None) -> list[str]:
    """Write the page and return the lines for the terminal: values, settings that differ, and the page's name."""
    target = Path(out)
    if target.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{target}: is to be an HTML file; give --out a name that ends in .html")
    if num_samples < 0:
        raise UserError(f"compare: samples must be at least 0, got {num_samples}")
    check_smooth("compare", smooth)
    runs = _read(folders)
    check_new_file(target, _is_page, ())
    lines = _lines(runs)
    if not lines:
        raise UserError(f"compare: {METRICS} of {listed(folders, 4)} have none of the metrics that can be drawn")
    pyplot = load_pyplot("compare")
    names = tuple(run.name for run in runs)
    values, settings = value_rows(runs), setting_rows(runs)
    pairs, note = shared_samples(runs, num_samples)
    page = Page(str(runs[0].manifest["stage"]), tuple(run.folder for run in runs), names, values, settings, pairs, note)
    write_page(target, page, pyplot, lines, smooth)
    main = [row for row in values if row[0].startswith(SHOWN_ON_TERMINAL)]
    shown = [[name, *_cut(cells)] for name, *cells in settings]
    return [
        *aligned([("last values", *names), *main]),
        "",
        *(aligned([("settings that differ", *names), *shown]) if settings else ["no setting differs"]),
        "",
        f"{target}: curves, samples and all values",
    ]


def _read(folders: Sequence[str]) -> list[Compared]:
    """Return the runs. UserError if they are not two or more different folders of one stage."""
    if len(folders) < 2:
        raise UserError("compare: give two or more folders, such as runs/a runs/b")
    if len(folders) > MAX_RUNS:
        raise UserError(f"compare: shows at most {MAX_RUNS} runs, got {len(folders)}; give fewer")
    runs = []
    for folder in folders:
        metrics, manifest = read_metrics(folder), read_run(folder)
        if not manifest:
            raise UserError(f"{folder}: holds no {RUN}; give the folder that a stage wrote")
        path = Path(folder) / SAMPLES
        samples = [row for _, row in read_rows(path)] if path.is_file() else []
        runs.append(Compared(folder, manifest, metrics, samples, settings=_settings(manifest)))
    real = [Path(folder).resolve() for folder in folders]
    for i, path in enumerate(real):
        if path in real[:i]:
            raise UserError(f"compare: {folders[i]} is given twice; give different runs")
    stages = {run.manifest["stage"]: run.folder for run in reversed(runs)}
    if len(stages) > 1:
        found = " and ".join(f"{folder} of {stage}" for stage, folder in reversed(stages.items()))
        raise UserError(f"compare: the runs are of different stages, {found}; compare runs of one stage")
    for run, name in zip(runs, short_names(folders), strict=True):
        run.name = name
    return runs


def short_names(folders: Sequence[str]) -> list[str]:
    """Return the parts of the paths that tell them apart: a, b for runs/a, runs/b; a/ppo, b/ppo for a/ppo, b/ppo."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*part[-count:])) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(folders)


def _settings(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of run.json as text under their names, checksums of inputs and versions included."""
    values = dict(_flat("", manifest["config"]))
    if not values.get("pretrain.path"):  # then these have no effect
        values = {name: value for name, value in values.items() if not name.startswith(PRETRAIN)}
    found = {name: _text(value) for name, value in values.items()}
    inputs = by_name(manifest)
    for name, value in values.items():
        # Under the name of the setting, so that two files of equal contents are no difference.
        if digests := list(filter(None, contents_of(value, inputs).checksums)):
            found[f"{name} (sha256)"] = " ".join(digest[:12] for digest in digests)
    found |= {name: _text(value) for name, value in _flat("versions.", manifest["versions"])}
    machine = manifest["machine"]
    return found | {f"machine.{name}": _text(machine[name]) for name in ("threads", "gpu") if name in machine}


def _flat(prefix: str, tree: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        # A mapping that a user gives, such as data.columns, is a value of one setting; sections have names of ours.
        if isinstance(value, dict) and value and name != "columns":
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield prefix + name, value


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def setting_rows(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Return (setting, its value in each run) where two runs differ; "-" where a run does not have it."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in OTHER)
    rows = [(name, *(run.settings.get(name, "-") for run in runs)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def value_rows(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Return (metric, its last value in each run): the mean of the last tenth of its points; steps, time and speed."""
    shown = dict.fromkeys(metric for run in runs for _, curves in panels(run.metrics) for metric in curves)
    curves = [{name: points for _, panel in panels(run.metrics) for name, points in panel.items()} for run in runs]
    rows = [("steps", *(f"{run.metrics[-1]['step']:.0f}{_state(run)}" for run in runs))]
    rows += [(metric, *(_last_value(curve.get(metric)) for curve in curves)) for metric in shown]
    times = [_numbers(run, "time/step") for run in runs]
    seconds = list(map(math.fsum, times))
    speeds = [_numbers(run, "perf/tokens_per_second") for run in runs]
    tokens = [
        math.fsum(a * b for a, b in zip(time, speed, strict=True)) for time, speed in zip(times, speeds, strict=True)
    ]
    rows.append(("time", *(format_duration(each) for each in seconds)))
    rows.append(("speed", *(format_speed(t / s) if s else "-" for t, s in zip(tokens, seconds, strict=True))))
    return rows


def _state(run: Compared) -> str:
    return "" if "finished" in run.manifest else " (not finished)"


def _numbers(run: Compared, name: str) -> list[float]:
    values = (row.get(name) for row in run.metrics)
    return [float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0 for value in values]


def _last_value(points: tuple[list[float], list[float]] | None) -> str:
    if points is None:
        return "-"
    values = points[1][-max(len(points[1]) // LAST, 1) :]
    return f"{math.fsum(values) / len(values):.4g}"


def _lines(runs: Sequence[Compared]) -> list[tuple[str, list[Line]]]:
    """Return the panels that any run has, with a colour for each run and a style for each metric of a panel.

    One of more than two metrics is split by their names after the slash, so that a metric shares the axes with its
    validation only.
    """
    found = [dict(panels(run.metrics)) for run in runs]
    metrics: dict[str, dict[str, None]] = {}
    for shown in found:
        for title, curves in shown.items():
            metrics.setdefault(title, {}).update(dict.fromkeys(curves))
    titles: dict[tuple[str, str], list[str]] = {}
    for title, names in metrics.items():
        for metric in names:
            part = f"{title}: {metric.rpartition('/')[2]}" if len(names) > 2 else title
            titles.setdefault((title, part), []).append(metric)
    styles = ("-", "--", ":", "-.")
    return [
        (
            part,
            [
                Line(*shown[title][metric], metric, f"C{i}", styles[j % len(styles)])
                for i, shown in enumerate(found)
                for j, metric in enumerate(names)
                if metric in shown.get(title, {})
            ],
        )
        for (title, part), names in titles.items()
    ]


def shared_samples(runs: Sequence[Compared], count: int) -> tuple[list[tuple[str, str, list[Answer | None]]], str]:
    """Return (step, prompt, each run's answer) of at most `count` prompts, newest steps first, and a sentence on them.

    They are prompts that two or more runs answered at the same step, each at its newest; if there are none, prompts
    that they answered at any step, each with its newest answer.
    """
    if not count:
        return [], ""
    if not any(run.samples for run in runs):
        return [], f"No run has a {SAMPLES} with rows."
    by_step = [{(row["step"], given_prompt(row)): row for row in run.samples if "step" in row} for run in runs]
    keys = [key for key in dict.fromkeys(key for rows in by_step for key in rows) if _shared(key, by_step)]
    if keys:
        newest_first = sorted(keys, key=lambda key: -key[0])
        steps = {prompt: step for step, prompt in reversed(newest_first)}
        chosen = [(step, prompt) for step, prompt in newest_first if steps[prompt] == step][:count]
        return [
            (f"step {step:.0f}", prompt, [_answer(rows.get((step, prompt))) for rows in by_step])
            for step, prompt in chosen
        ], "Prompts that the runs answered at the same step, the newest first."
    newest = [{given_prompt(row): row for row in run.samples} for run in runs]
    prompts = [prompt for prompt in dict.fromkeys(p for rows in newest for p in rows) if _shared(prompt, newest)]
    if prompts:
        return [
            ("", prompt, [_answer(rows.get(prompt), with_step=True) for rows in newest]) for prompt in prompts[:count]
        ], "The runs answered no prompt at the same step: the newest answer of each."
    return [], f"The rows of {SAMPLES} have no prompt in common."


def _shared(key: object, found: Sequence[Mapping[Any, object]]) -> bool:
    return sum(key in rows for rows in found) > 1


def _answer(row: Mapping[str, Any] | None, with_step: bool = False) -> Answer | None:
    if row is None:
        return None
    step = [f"step {row.get('step')}"] if with_step else []
    return [(text, "  ".join([*step, numbers_text(numbers)]).strip()) for text, numbers in responses_of(row)]


def _is_page(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(FIRST_BYTES)) == FIRST_BYTES


def _cut(cells: Sequence[str]) -> list[str]:
    """Return values that differ for a table of the terminal: each on one line, a long one without its middle, or from
    shortly before the place where they differ if that is in the middle."""
    lines = [printable(" ".join(cell.split())) for cell in cells]
    shown = [line if len(line) <= CELL else f"{line[: CELL // 2 - 1]}…{line[-CELL // 2 :]}" for line in lines]
    if len(set(shown)) == len(set(lines)):
        return shown
    columns = zip(*lines, strict=False)
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    start = max(same - CELL // 4, 0)
    return [f"…{line[start : start + CELL - 2]}{'…' * (len(line) > start + CELL - 2)}" for line in lines]
