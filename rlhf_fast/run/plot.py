"""`rlhf-fast plot RUN`: the curves of a run's metrics.jsonl as a PNG (extra [plot]: matplotlib)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.errors import UserError
from rlhf_fast.run.logs import METRICS, read_metrics
from rlhf_fast.run.outputs import check_new_file, replacing

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("objective/scores", "objective/rlhf_reward", "valid/scores", "valid/rlhf_reward")),
    ("KL to the reference, nats a response", ("objective/kl",)),
    ("response length, tokens", ("tokens/length", "valid/length")),
    ("share of responses that end", ("tokens/eos_rate", "valid/eos_rate")),
    ("clip fraction", ("policy/clipfrac_avg", "val/clipfrac_avg")),
    ("ratio at the first minibatch", ("val/ratio_first",)),
    ("entropy, nats a token", ("objective/entropy_token", "policy/entropy_avg")),
    ("accuracy", ("reward/accuracy", "valid/accuracy", "valid/longer_wins")),
)
"""(title, metrics that share the axes). Each loss/NAME gets a panel of its own, with valid/NAME; so does each of
several rewards, and each task of eval, or each unit of its measures."""
EVAL = "eval/"
EVAL_DETAILS = ("empty", "unjudged", "words", "_bin_", "refusal_rate_", "nats")
"""Parts of the names of measures that are left out: details, and losses that a task has in bits too."""
EVAL_UNITS = {
    "perplexity": "perplexity",
    "entropy": "entropy, bits",
    "bls_correlation": "correlation",
    "bits_per_byte": "bits a byte",
    "toxicity": "score",
}
"""Measure of eval -> its unit; of the others it is a share of the rows."""

CURVES = "curves.png"
SOFTWARE = "rlhf-fast plot"
"""Signs the PNG, by which a later call knows that it may replace it."""
MIN_POINTS, POINTS_PER_SPAN = 50, 30
"""Points of a curve from which on it is smoothed by itself, and by how many of them the span is that it takes."""
MIN_RANGE = 2e-3
"""Smallest height of a panel as a share of its largest value: differences in the last bits are no curve."""
INCHES, DPI = (4.2, 2.9), 120

Curves = dict[str, tuple[list[float], list[float]]]
"""Metric -> (steps, values)."""


class Line(NamedTuple):
    """A curve as it is drawn."""

    steps: Sequence[float]
    values: Sequence[float]
    label: str
    colour: str
    style: str = "-"


def panels(rows: list[dict]) -> list[tuple[str, Curves]]:
    """Return (title, curves) of every panel that has a finite value to draw."""
    names = dict.fromkeys(name for row in rows for name in row)
    losses = [name.removeprefix("loss/") for name in names if name.startswith("loss/")]
    candidates = [*PANELS, *((f"loss: {name}", (f"loss/{name}", f"valid/{name}")) for name in losses)]
    rewards = [name for name in names if name.startswith("rewards/") and name.endswith("/mean")]
    candidates += [(name.removesuffix("/mean"), (name, f"valid/{name}")) for name in rewards]
    candidates += _eval_panels(names)
    found = []
    for title, metrics in candidates:
        curves: Curves = {}
        for metric in metrics:
            points = [(row["step"], row[metric]) for row in rows if _is_finite_number(row.get(metric))]
            if points:
                steps, values = zip(*points, strict=True)
                curves[metric] = (list(steps), list(values))
        if curves:
            found.append((title, curves))
    return found


def _eval_panels(names: Sequence[str] | dict[str, None]) -> list[tuple[str, tuple[str, ...]]]:
    """Return a panel for each task, or for each unit of its measures if they have several."""
    evaluated = [name for name in names if name.startswith(EVAL) and not any(part in name for part in EVAL_DETAILS)]
    found: dict[str, dict[str, list[str]]] = {}
    for name in evaluated:
        task, _, measure = name.partition(".")
        found.setdefault(task, {}).setdefault(EVAL_UNITS.get(measure, ""), []).append(name)
    return [
        (f"{task}: {unit}" if unit and len(units) > 1 else task, tuple(metrics))
        for task, units in found.items()
        for unit, metrics in units.items()
    ]


def plot(run: str | Path, out: str | Path = "", smooth: float | None = None) -> Path:
    """Draw a run's curves and return the path of the PNG; by default `curves.png` in the run's folder.

    smooth: weight of the running mean, from 0 (none) to below 1. None = by the number of points of a curve.
    """
    target = Path(out) if out else Path(run) / CURVES
    rows = read_metrics(run)
    if target.suffix.lower() not in (".png", ""):
        raise UserError(f"{target}: is to be a PNG; give --out a name that ends in .png")
    check_smooth("plot", smooth)
    check_new_file(target, _is_plot, ())
    shown = panels(rows)
    if not shown:
        raise UserError(f"{run}: {METRICS} has none of the metrics that can be drawn")
    pyplot = load_pyplot("plot")
    lines = [
        (title, [Line(*points, metric, f"C{i}") for i, (metric, points) in enumerate(curves.items())])
        for title, curves in shown
    ]
    figure = draw(pyplot, lines, smooth)
    figure.suptitle(str(run), fontsize=10, parse_math=False)
    figure.tight_layout()
    with replacing(target) as unfinished:
        figure.savefig(unfinished, format="png", dpi=DPI, metadata={"Software": f"{SOFTWARE}, Matplotlib"})
    pyplot.close(figure)
    return target


def check_smooth(command: str, smooth: float | None) -> None:
    """Raise UserError for a weight that no running mean can have."""
    if smooth is not None and not 0 <= smooth < 1:
        raise UserError(f"{command}: smooth must be from 0 (as logged) to below 1, got {smooth}")


def load_pyplot(command: str) -> Any:
    """Return matplotlib.pyplot, which draws into files. UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"{command}: matplotlib is not installed; run `pip install matplotlib`") from error
    choose_backend(matplotlib)
    from matplotlib import pyplot

    return pyplot


def choose_backend(matplotlib: Any) -> None:
    """Let pyplot draw into files, without a display.

    A notebook keeps its own backend, which draws into files too: under another the user's later figures would not be
    shown.
    """
    if "ipykernel" not in sys.modules:
        matplotlib.use("Agg")


def draw(pyplot: Any, shown: Sequence[tuple[str, Sequence[Line]]], smooth: float | None) -> Any:
    """Return a figure with a panel for each (title, lines), three in a row."""
    num_columns = min(3, len(shown))
    num_rows = -(-len(shown) // num_columns)
    size = (INCHES[0] * num_columns, INCHES[1] * num_rows)
    figure, axes = pyplot.subplots(num_rows, num_columns, figsize=size, squeeze=False)
    for axis, (title, lines) in zip(axes.flat, shown, strict=False):
        _draw_panel(axis, title, lines, smooth)
    for axis in axes.flat[max(len(shown) - num_columns, 0) : len(shown)]:
        axis.set_xlabel("step", fontsize=8)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    return figure


def _draw_panel(axis: Any, title: str, lines: Sequence[Line], smooth: float | None) -> None:
    from matplotlib.ticker import MaxNLocator

    for line in lines:
        weight = smoothing_weight(len(line.values)) if smooth is None else smooth
        marker = "." if len(line.steps) < 3 else None
        if weight:
            axis.plot(line.steps, line.values, color=line.colour, linewidth=0.8, alpha=0.25, zorder=1)
        values = running_mean(line.values, weight)
        axis.plot(line.steps, values, line.style, label=line.label, color=line.colour, linewidth=1.3, marker=marker)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    steps = [step for line in lines for step in line.steps]
    if min(steps) == max(steps):
        axis.set_xlim(steps[0] - 1, steps[0] + 1)
    values = [value for line in lines for value in line.values]
    largest = max(map(abs, values))
    if max(values) - min(values) < MIN_RANGE * largest:
        middle = (max(values) + min(values)) / 2
        axis.set_ylim(middle - MIN_RANGE * largest, middle + MIN_RANGE * largest)
    axis.ticklabel_format(axis="x", style="plain", useOffset=False)
    axis.ticklabel_format(axis="y", useOffset=False)
    if len({line.label for line in lines if line.label}) > 1:
        axis.legend(fontsize=7)


def smoothing_weight(count: int) -> float:
    """Return the weight of the running mean of a curve of `count` points: 0 for a short one."""
    return 0.0 if count < MIN_POINTS else 1 - POINTS_PER_SPAN / max(count, 2 * POINTS_PER_SPAN)


def running_mean(values: Sequence[float], weight: float) -> list[float]:
    """Return the exponential moving average, as TensorBoard draws it: each value is a mean of those up to it."""
    found, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        found.append(total / norm)
    return found


def _is_plot(file: Path) -> bool:
    """Return whether `plot` wrote the file; curves.png may be an older version's, which signed as Matplotlib."""
    with file.open("rb") as stream:
        start = stream.read(1024)
    signature = b"Matplotlib" if file.name == CURVES else SOFTWARE.encode()
    return start.startswith(b"\x89PNG") and signature in start


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
