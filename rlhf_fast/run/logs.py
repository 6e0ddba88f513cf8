"""A run's log: metrics.jsonl (one row a step), samples.jsonl, one live line, alarms, other trackers. No telemetry.

Metric names are those of TRL's PPO (`objective/kl`, `policy/clipfrac_avg`, `val/ratio`, ...), so that old dashboards
keep working. Units: nats for log-probabilities, entropies and KL; seconds for `time/*`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, SupportsFloat, TextIO

from rich.console import Console

from rlhf_fast.config.fields import LogConfig
from rlhf_fast.errors import UserError, shortened, writing
from rlhf_fast.run.alarms import Alarms
from rlhf_fast.run.samples import sample_lines
from rlhf_fast.run.terminal import LiveLine, format_duration, format_speed, has_cursor

SINKS = ("tensorboard", "trackio", "wandb")
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"

Sink = Callable[[int, Mapping[str, float]], object]
"""Forwards the metrics of a step to another tracker."""


class Log:
    """The log of one stage in `directory`.

    total: steps of the whole run. start: steps done before; later rows, from a killed process, are dropped.
    progress_metrics: the metrics that the live line shows.
    """

    def __init__(
        self,
        directory: str | Path,
        cfg: LogConfig,
        title: str,
        total: int,
        start: int = 0,
        progress_metrics: tuple[str, ...] = (),
    ) -> None:
        self.directory, self.cfg, self.title = Path(directory), cfg, title
        self.total, self.start, self.progress_metrics = total, start, progress_metrics
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens = 0
        self.alarms = Alarms()
        self.sinks = [_make_sink(name, self.directory, title) for name in cfg.sinks]
        with writing(self.directory):
            for row in _drop_rows_after(self.directory / METRICS, start):
                self.alarms(row)
            _drop_rows_after(self.directory / SAMPLES, start)
            self._metrics = _open_to_append(self.directory / METRICS)
            self._samples = _open_to_append(self.directory / SAMPLES)
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self._live: LiveLine | None = None
        if cfg.live and has_cursor(self.console):
            self._live = LiveLine(self.console, title, total, start)
        self._started = self._last_row = time.perf_counter()
        self._last_printed, self._last_shown = 0.0, -math.inf
        self._latest: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `time/<name>` of the next row. Phases do not nest."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def metrics(self, step: int, values: Mapping[str, SupportsFloat], tokens: int = 0) -> None:
        """Write one row, every `cfg.every` steps, at the last step and at a new alarm, and update the live line.

        `values` are numbers or 0-d tensors. `tokens` were generated or trained on since the last call.
        """
        row: dict[str, Any] = {"step": step, **{name: float(value) for name, value in values.items()}}
        self.tokens += tokens
        new_alarms = self.alarms(row)
        for text in new_alarms:
            self.message(f"alarm at step {step}: {text}", style="yellow")
        if step % self.cfg.every and step != self.total and not new_alarms:
            return
        now = time.perf_counter()
        elapsed = max(now - self._last_row, 1e-9)
        self._last_row = now
        row["time/step"] = elapsed
        row.update({f"time/{name}": seconds for name, seconds in self.seconds.items()})
        row["perf/tokens_per_second"] = self.tokens / elapsed
        if new_alarms:
            row["alarms"] = new_alarms
        self._append(self._metrics, row)
        for sink in self.sinks:
            sink(step, {name: value for name, value in row.items() if isinstance(value, float)})
        self._show_progress(step, row, elapsed)
        self.seconds.clear()
        self.tokens = 0

    def samples(self, step: int, rows: Iterable[Mapping[str, object]]) -> None:
        """Write up to `cfg.samples` rows (prompt, response, score, ...) of this step to samples.jsonl.

        The first is printed too, if the last one that was is `cfg.show_samples` steps ago, and at the last step.
        """
        kept = list(islice(rows, self.cfg.samples))
        for row in kept:
            self._append(self._samples, {"step": step, **row})
        every = self.cfg.show_samples
        if kept and every and self.cfg.live and (step - self._last_shown >= every or step == self.total):
            self._last_shown = step
            for line in sample_lines(step, kept[0], self.console.width, self.title):
                self.console.print(line, soft_wrap=True)

    def message(self, text: str, style: str = "") -> None:
        """Print a sentence, above the live line if there is one. On a terminal it wraps between words."""
        soft_wrap = not self.console.is_terminal
        self.console.print(f"{self.title}: {text}", style=style, markup=False, soft_wrap=soft_wrap)

    def close(self) -> None:
        """End the live line and close the files."""
        if self._live:
            self._live.stop()
        self._metrics.close()
        self._samples.close()

    def _append(self, stream: TextIO, row: Mapping[str, object]) -> None:
        with writing(stream.name):
            stream.write(json.dumps(_null_if_not_finite(row), ensure_ascii=False, allow_nan=False) + "\n")
            stream.flush()

    def _show_progress(self, step: int, row: Mapping[str, Any], elapsed: float) -> None:
        self._latest.update({name: row[name] for name in self.progress_metrics if name in row})
        # The live line keeps the last value of what only some steps measure; a plain line has what its step did.
        values = self._latest if self._live else row
        shown = [
            f"{_label(name, self.progress_metrics)} {values[name]:.4g}"
            for name in self.progress_metrics
            if name in values
        ]
        phases = [
            f"{name} {seconds / elapsed:.0%}" for name, seconds in self.seconds.items() if seconds >= 0.01 * elapsed
        ]
        parts = [*shown, format_speed(row["perf/tokens_per_second"]), *phases]
        if self._live:
            self._live.update(step, parts)
            return
        # Without a terminal one line a second is enough; metrics.jsonl has every row.
        now = time.perf_counter()
        if self.cfg.live and (now - self._last_printed >= 1 or step == self.total):
            self._last_printed = now
            remaining = (now - self._started) / max(step - self.start, 1) * (self.total - step)
            line = f"{self.title} {step}/{self.total}  ETA {format_duration(remaining)}  {'  '.join(parts)}"
            self.console.print(line, markup=False, soft_wrap=True)


def _label(metric: str, others: tuple[str, ...]) -> str:
    """Return the name of a metric on a line: `loss` of loss/sft, `valid loss` of valid/sft, `kl` of objective/kl."""
    group, _, name = metric.rpartition("/")
    if group == "loss":
        return "loss"
    if group == "valid":
        return "valid loss" if f"loss/{name}" in others else f"valid {name}"
    return name


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl; a last line that is cut short is left out."""
    path = Path(run) / METRICS
    if not os.path.isfile(path):  # noqa: PTH113  (a name that is too long is no error here)
        if not os.path.lexists(run):
            raise UserError(f"{shortened(run)}: there is no such folder; give the folder that a stage wrote")
        if not Path(run).is_dir():
            raise UserError(f"{run}: is a file; give the folder that a stage wrote")
        inside = sorted(str(found.parent) for found in Path(run).glob(f"*/{path.name}"))
        hint = f"one of {', '.join(inside)}" if inside else "the folder that a stage wrote"
        raise UserError(f"{run}: holds no {path.name}; give {hint}")
    rows = [row for _, row in _read_steps(path)]
    if not rows:
        raise UserError(f"{path}: is empty; the run has not logged a step yet")
    return rows


def _read_steps(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return what `read_rows` does; UserError for a row without a step, which no Log has written."""
    rows = read_rows(path)
    for number, (_, row) in enumerate(rows, 1):
        if not isinstance(row.get("step"), (int, float)):
            raise UserError(f"{path}: row {number} has no step, so no run of ours wrote it; move that file away")
    return rows


def read_rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return (line, row) for every line of a file that a Log has written.

    A crash may cut the last line short: it is left out. Any other line that is not JSON is a UserError. Only a newline
    ends a line: texts may contain U+2028 and other separators.
    """
    lines = path.read_bytes().split(b"\n")
    last = len(lines) if lines[-1] else len(lines) - 1
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number >= last:
                break
            raise UserError(f"{path}:{number}: not JSON: {error}; mend or remove the line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: no row of ours, which is a JSON object; mend or remove the line")
        rows.append((line, row))
    return rows


def _drop_rows_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrite the file without the rows after `step` and without a torn last line; return the rows that are kept."""
    if not path.exists():
        return []
    kept = [(line, row) for line, row in _read_steps(path) if row["step"] <= step]
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(b"".join(line + b"\n" for line, _ in kept))
    unfinished.replace(path)
    return [row for _, row in kept]


def _open_to_append(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8", newline="\n")


def _null_if_not_finite(value: object) -> object:
    """Replace NaN and infinities by None at any depth: strict JSON cannot express them."""
    if isinstance(value, Mapping):
        return {key: _null_if_not_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_null_if_not_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def check_sinks(names: Iterable[str]) -> None:
    """Raise UserError for a tracker that is not known or not installed."""
    for name in names:
        if name not in SINKS:
            raise UserError(f"log.sinks: no sink is called {name!r}; there are {', '.join(SINKS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log.sinks: {name} is not installed; run `pip install {name}`")


def _make_sink(name: str, directory: Path, title: str) -> Sink:
    """Return a function that forwards rows to the tracker `name`. The tracker is imported only if it is asked for."""
    check_sinks((name,))
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        return _tensorboard_sink(SummaryWriter(str(directory / "tensorboard")))
    tracker = importlib.import_module(name)
    tracker.init(project="rlhf-fast", name=f"{title} {directory}")
    return lambda step, values: tracker.log(values, step=step)


def _tensorboard_sink(writer: Any) -> Sink:
    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write
