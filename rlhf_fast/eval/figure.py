"""report.png: a panel for each group of tasks, models from left to right, points with bars of 95 % (extra [plot])."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.errors import UserError
from rlhf_fast.eval.estimates import Estimate, estimate_from
from rlhf_fast.eval.tables import Groups, Record, group_of, in_order, is_level_meaningless, main_measure, models_of
from rlhf_fast.run.outputs import check_new_file, replacing
from rlhf_fast.run.plot import choose_backend

SOFTWARE = "rlhf-fast eval"
"""Signs the PNG, by which a later call knows that it may replace it."""
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#000000", "x"))
"""Colours of Okabe and Ito, which the colour-blind can tell apart, each with a marker of its own."""
WIDTHS = {1: 5.0, 2: 8.0, 3: 10.0}
"""Panels side by side -> inches of the picture."""
PANEL_HEIGHT, LINE_HEIGHT, DPI = 2.4, 0.15, 120
"""Inches, and dots an inch. A panel grows by a line for each entry of its legend."""
MANY = 6
"""Models; of more, two panels stand side by side instead of three."""
MAX_NAME = 22
"""Characters of a model's name that are shown."""
CHARACTERS = 26
"""Characters that all models' names may have together to stand side by side; longer ones are turned."""
TITLES = {"tax": "alignment tax"}


class Panel(NamedTuple):
    """The main measures of a group's tasks that have one unit."""

    title: str
    label: str
    """Measure and unit."""
    series: dict[str, list[Estimate | None]]
    """Task, and measure if the tasks have different ones -> its estimate for each model, None where there is none."""


def panels(records: Sequence[Record], groups: Groups) -> list[Panel]:
    """Return the panels that have something to draw, in the order of the groups."""
    models = models_of(records)
    cells = {(record["model"], record["task"], record["measure"]): record for record in records}
    found: dict[tuple[str, str], dict[tuple[str, str], list[Estimate | None]]] = {}
    for task, measure in in_order(records, groups):
        chosen = [cells.get((model, task, measure)) for model in models]
        first = next(record for record in chosen if record)
        if measure != main_measure(task, records) or is_level_meaningless(first):
            continue
        estimates = [estimate_from(record) if record and record["value"] is not None else None for record in chosen]
        if any(estimates):
            found.setdefault((group_of(task, groups), first["unit"]), {})[task, measure] = estimates
    shown: list[Panel] = []
    for (group, unit), series in found.items():
        title = TITLES.get(group, group)
        if any(panel.title == title for panel in shown):
            title += f" ({unit})"
        shown.append(_panel(title, unit, series))
    return shown


def _panel(title: str, unit: str, series: dict[tuple[str, str], list[Estimate | None]]) -> Panel:
    """Return a panel, its one measure named on the axis or several ones in the legend."""
    measures = {measure for _, measure in series}
    if len(measures) > 1:
        named = {f"{task}: {measure}, {_n(found)}": found for (task, measure), found in series.items()}
        return Panel(title, unit, named)
    name, (task, _) = measures.pop(), next(iter(series))
    label = unit if unit.replace("/", "_per_") == name else f"{name} ({unit})"
    if len(series) == 1:
        label = f"{label}, {_n(series[task, name])}"
        label = label if task == title else f"{task}: {label}"
    return Panel(title, label, {f"{task}, {_n(found)}": found for (task, _), found in series.items()})


def _n(estimates: Sequence[Estimate | None]) -> str:
    """Return the n of a measure's points."""
    found = [estimate.n for estimate in estimates if estimate]
    return f"n {min(found)}" + (f" to {max(found)}" if max(found) > min(found) else "")


def draw(records: Sequence[Record], groups: Groups, path: str | Path) -> Path:
    """Draw the results and return the path of the PNG. UserError without matplotlib, or if there is nothing to draw."""
    target = Path(path)
    shown = panels(records, groups)
    if not shown:
        raise UserError(f"{target}: there is no result to draw")
    check_new_file(target, _is_ours, ())
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("matplotlib is not installed; run `pip install matplotlib`") from error
    choose_backend(matplotlib)
    from matplotlib import pyplot

    labels = [_shortened(name) for name in models_of(records)]
    num_columns = min(3 if len(labels) <= MANY else 2, len(shown))
    rows = [shown[start : start + num_columns] for start in range(0, len(shown), num_columns)]
    turned = 0.04 * max(map(len, labels)) if _are_turned(labels) else 0.0
    heights = [PANEL_HEIGHT + turned + LINE_HEIGHT * max(len(panel.series) for panel in row) for row in rows]
    size = (WIDTHS[num_columns], sum(heights))
    figure, axes = pyplot.subplots(len(rows), num_columns, figsize=size, squeeze=False)
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.08)
    for axis, panel in zip(axes.flat, shown, strict=False):
        _draw_panel(axis, panel, labels)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    with replacing(target) as unfinished:
        figure.savefig(unfinished, format="png", dpi=DPI, metadata={"Software": f"{SOFTWARE}, Matplotlib"})
    pyplot.close(figure)
    return target


def _draw_panel(axis: Any, panel: Panel, labels: Sequence[str]) -> None:
    """Draw each measure's points side by side around the model's place on the x axis."""
    count = len(panel.series)
    for number, (name, estimates) in enumerate(panel.series.items()):
        colour, marker = STYLES[number % len(STYLES)]
        shift = (number - (count - 1) / 2) * min(0.18, 0.75 / count)
        points = [(i + shift, e) for i, e in enumerate(estimates) if e]
        x, y = [place for place, _ in points], [e.value for _, e in points]
        bars = [[_length(e.value - e.low) for _, e in points], [_length(e.high - e.value) for _, e in points]]
        axis.errorbar(
            x, y, bars, color=colour, marker=marker, markersize=4.5, linestyle="none", elinewidth=1.3, label=name
        )
    if panel.title == "preference":
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axis.set_ylabel(panel.label, fontsize=8)
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    if _are_turned(labels):
        axis.tick_params("x", rotation=30)
        for label in axis.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")
    axis.set_xlim(-0.5, len(labels) - 0.5)
    axis.tick_params("y", labelsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        title=panel.title,
        title_fontproperties={"size": 11, "weight": "bold"},
        alignment="left",
        handles=None if count > 1 else [],
        fontsize=7,
        handletextpad=0.4,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        borderpad=0.2,
        frameon=False,
    )


def _are_turned(labels: Sequence[str]) -> bool:
    return sum(map(len, labels)) > CHARACTERS


def _length(distance: float) -> float:
    """Return the length of a bar; 0 where there is no interval."""
    return max(distance, 0.0) if math.isfinite(distance) else 0.0


def _shortened(name: str) -> str:
    """Return a model's name without its middle if it is long, and without a meaning for matplotlib."""
    half = MAX_NAME // 2
    shown = name if len(name) <= MAX_NAME else f"{name[:half]}…{name[-half + 1 :]}"
    return shown.replace("$", r"\$")


def _is_ours(file: Path) -> bool:
    """Return whether `draw` wrote the file."""
    with file.open("rb") as stream:
        start = stream.read(1024)
    return start.startswith(b"\x89PNG") and SOFTWARE.encode() in start
