"""`rlhf-fast plot RUN`: the curves of a run's metrics.jsonl as a PNG (extra [plot]: matplotlib)."""

from __future__ import annotations

import math
from pathlib import Path

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
"""(title, metrics that share the axes). Each loss/NAME gets a panel of its own, with valid/NAME; each task of eval one
too."""
EVAL = "eval/"
EVAL_DETAILS = ("empty", "unjudged", "words", "_bin_", "refusal_rate_", "nats")
"""Parts of the names of measures that are left out: details, and losses that a task has in bits too."""

CURVES = "curves.png"
SOFTWARE = "rlhf-fast plot"
"""Signs the PNG, by which a later call knows that it may replace it."""

Curves = dict[str, tuple[list[float], list[float]]]
"""Metric -> (steps, values)."""


def panels(rows: list[dict]) -> list[tuple[str, Curves]]:
    """Return (title, curves) of every panel that has a finite value to draw."""
    names = dict.fromkeys(name for row in rows for name in row)
    losses = [name.removeprefix("loss/") for name in names if name.startswith("loss/")]
    candidates = [*PANELS, *((f"loss: {name}", (f"loss/{name}", f"valid/{name}")) for name in losses)]
    evaluated = [name for name in names if name.startswith(EVAL) and not any(part in name for part in EVAL_DETAILS)]
    tasks = dict.fromkeys(name.partition(".")[0] for name in evaluated)
    candidates += [(task, tuple(name for name in evaluated if name.startswith(f"{task}."))) for task in tasks]
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


def plot(run: str | Path, out: str | Path = "") -> Path:
    """Draw a run's curves and return the path of the PNG; by default `curves.png` in the run's folder."""
    target = Path(out) if out else Path(run) / CURVES
    rows = read_metrics(run)
    if target.suffix.lower() not in (".png", ""):
        raise UserError(f"{target}: is to be a PNG; give --out a name that ends in .png")
    check_new_file(target, _is_plot, {})
    shown = panels(rows)
    if not shown:
        raise UserError(f"{run}: {METRICS} has none of the metrics that can be drawn")
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plot: matplotlib is not installed; run `pip install 'rlhf-fast[plot]'`") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_columns = min(3, len(shown))
    num_rows = -(-len(shown) // num_columns)
    figure, axes = pyplot.subplots(num_rows, num_columns, figsize=(4.2 * num_columns, 2.9 * num_rows), squeeze=False)
    for axis, (title, curves) in zip(axes.flat, shown, strict=False):
        for metric, (steps, values) in curves.items():
            axis.plot(steps, values, label=metric, linewidth=1.2, marker="." if len(steps) < 3 else None)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        if len(curves) > 1:
            axis.legend(fontsize=7)
    for axis in axes.flat[max(len(shown) - num_columns, 0) : len(shown)]:
        axis.set_xlabel("step", fontsize=8)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    figure.suptitle(str(run), fontsize=10)
    figure.tight_layout()
    with replacing(target) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120, metadata={"Software": f"{SOFTWARE}, Matplotlib"})
    pyplot.close(figure)
    return target


def _is_plot(file: Path) -> bool:
    """Return whether `plot` wrote the file; curves.png may be an older version's, which signed as Matplotlib."""
    with file.open("rb") as stream:
        start = stream.read(1024)
    signature = b"Matplotlib" if file.name == CURVES else SOFTWARE.encode()
    return start.startswith(b"\x89PNG") and signature in start


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
