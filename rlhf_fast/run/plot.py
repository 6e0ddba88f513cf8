"""`rlhf-fast plot RUN`: the curves of a run's metrics.jsonl as a PNG (extra [plot]: matplotlib)."""

from __future__ import annotations

import math
from pathlib import Path

from rlhf_fast.errors import UserError, writing
from rlhf_fast.run.logs import read_rows

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
"""Title, and the metrics that share its axes. Each loss/NAME has a panel too, with valid/NAME."""


def read_metrics(run: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; a last line that is cut short is left out."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        inside = sorted(str(found.parent) for found in Path(run).glob(f"*/{path.name}"))
        hint = f"one of {', '.join(inside)}" if inside else "the folder that a stage wrote"
        raise UserError(f"{run}: holds no {path.name}; give {hint}")
    rows = [row for _, row in read_rows(path)]
    if not rows:
        raise UserError(f"{path}: is empty; the run has not logged a step yet")
    return rows


def panels(rows: list[dict]) -> list[tuple[str, dict[str, tuple[list[float], list[float]]]]]:
    """(title, metric -> (steps, values)) of what there is to draw; missing and not finite values are left out."""
    names = dict.fromkeys(name for row in rows for name in row)
    losses = [name.removeprefix("loss/") for name in names if name.startswith("loss/")]
    wanted = [*PANELS, *((f"loss: {name}", (f"loss/{name}", f"valid/{name}")) for name in losses)]
    drawn = []
    for title, metrics in wanted:
        curves = {}
        for metric in metrics:
            points = [(row["step"], row[metric]) for row in rows if _finite(row.get(metric))]
            if points:
                steps, values = zip(*points, strict=True)
                curves[metric] = (list(steps), list(values))
        if curves:
            drawn.append((title, curves))
    return drawn


def plot(run: str | Path, out: str | Path = "") -> Path:
    """Draws a run's curves and returns the PNG's path (`curves.png` in the run's folder unless given)."""
    rows = read_metrics(run)
    shown = panels(rows)
    if not shown:
        raise UserError(f"{run}: metrics.jsonl has none of the metrics that can be drawn")
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plot: matplotlib is not installed; run `pip install 'rlhf-fast[plot]'`") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4.2 * columns, 2.9 * lines), squeeze=False)
    for axis, (title, curves) in zip(axes.flat, shown, strict=False):
        for metric, (steps, values) in curves.items():
            axis.plot(steps, values, label=metric, linewidth=1.2, marker="." if len(steps) < 3 else None)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        if len(curves) > 1:
            axis.legend(fontsize=7)
    for axis in axes.flat[max(len(shown) - columns, 0) : len(shown)]:
        axis.set_xlabel("step", fontsize=8)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    figure.suptitle(str(run), fontsize=10)
    figure.tight_layout()
    target = Path(out) if out else Path(run) / "curves.png"
    with writing(target):
        figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
