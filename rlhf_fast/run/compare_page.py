"""The HTML file of `rlhf-fast compare`: tables, curves as an embedded PNG, samples. It refers to no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.run.outputs import replacing
from rlhf_fast.run.plot import DPI, Line, draw
from rlhf_fast.run.terminal import printable

FIRST_BYTES = b"<!DOCTYPE html>\n<!-- rlhf-fast compare -->\n"
"""Start of every page, by which a later call knows that it may replace it."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 24px auto; padding: 0 16px; color: #1a1a1a; }
h1 { font-size: 22px; } h2 { font-size: 18px; margin-top: 32px; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
td, th { border: 1px solid #ddd; padding: 4px 10px; text-align: left; vertical-align: top; }
th { background: #f5f5f5; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.setting { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere; }
.samples { table-layout: fixed; width: 100%; } .samples td { overflow-wrap: anywhere; }
.text, .numbers { white-space: pre-wrap; }
.prompt { background: #fafafa; } .note, .numbers { color: #666; font-size: 13px; }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px; }
img { max-width: 100%; }
"""
LEGEND_COLUMNS = 5
COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
"""Colours C0 to C9 of matplotlib."""

Answer = list[tuple[str, str]]
"""(response, its numbers), of one prompt in one run."""


class Page(NamedTuple):
    """The contents of a page but for the curves. A row of a table starts with its name and has a cell for each run."""

    stage: str
    folders: tuple[str, ...]
    names: tuple[str, ...]
    values: list[tuple[str, ...]]
    settings: list[tuple[str, ...]]
    samples: list[tuple[str, str, list[Answer | None]]]
    """(step, prompt, the answer of each run)"""
    note: str
    """A sentence on the samples."""


def write_page(target: Path, page: Page, pyplot: Any, lines: Sequence[tuple[str, Sequence[Line]]],
               smooth: float | None) -> None:  # fmt: skip
    """Draw the curves and write the page."""
    picture = io.BytesIO()
    figure = draw(pyplot, [(title, _one_label_each(part)) for title, part in lines], smooth)
    for legend in filter(None, (axis.get_legend() for axis in figure.axes)):
        for handle in legend.legend_handles:  # it names the style of a metric; a colour is a run's
            handle.set_color("0.3")
    # matplotlib leaves a label that begins with "_" out of a legend, and reads what stands between $ as a formula.
    names = [f" {name}" if name.startswith("_") else name for name in page.names]
    keys = [pyplot.Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(names)]
    columns = min(len(keys), LEGEND_COLUMNS)
    legend = figure.legend(handles=keys, loc="upper left", ncols=columns, fontsize=9, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    height = 0.15 + 0.2 * -(-len(keys) // columns)
    figure.tight_layout(rect=(0, 0, 1, 1 - height / figure.get_figheight()))
    figure.savefig(picture, format="png", dpi=DPI)
    pyplot.close(figure)
    html = "".join(_page(page, base64.b64encode(picture.getvalue()).decode()))
    with replacing(target) as unfinished:
        unfinished.write_bytes(FIRST_BYTES + html.encode(errors="replace"))


def _one_label_each(lines: Sequence[Line]) -> list[Line]:
    """Return the lines so that a panel's legend names each metric once. The colours of the runs have a legend above."""
    named: set[str] = set()
    found = []
    for line in lines:
        found.append(line._replace(label="" if line.label in named else line.label))
        named.add(line.label)
    return found


def _page(page: Page, picture: str) -> Iterator[str]:
    title = f"{page.stage}: {', '.join(page.names)}"
    yield f'<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title><style>{STYLE}</style></head>'
    yield f"<body><h1>Runs of {_text(page.stage)}</h1><ul>"
    for i, (name, folder) in enumerate(zip(page.names, page.folders, strict=True)):
        where = f" <span class=note>{_text(folder)}</span>" if folder != name else ""
        yield f"<li>{_key(i)}<b>{_text(name)}</b>{where}</li>"
    yield "</ul><h2>Settings that differ</h2>"
    if page.settings:
        yield from _table(page.names, page.settings, "setting")
    else:
        yield "<p>None.</p>"
    yield "<h2>Last values</h2><p class=note>Mean of the last tenth of a metric's points.</p>"
    yield from _table(page.names, page.values, "number")
    yield f'<h2>Curves</h2><img alt="Curves of the runs by step" src="data:image/png;base64,{picture}">'
    yield f"<h2>Samples</h2><p class=note>{_text(page.note)}</p>"
    if page.samples:
        yield "<table class=samples><tr><th>prompt</th>"
        yield "".join(f"<th>{_key(i)}{_text(name)}</th>" for i, name in enumerate(page.names)) + "</tr>"
        for step, prompt, answers in page.samples:
            said = f"<div class=numbers>{_text(step)}</div>" if step else ""
            cells = "".join(f"<td>{_answer(answer)}</td>" for answer in answers)
            yield f"<tr><td class=prompt>{said}<div class=text>{_text(prompt)}</div></td>{cells}</tr>"
        yield "</table>"
    yield "</body></html>\n"


def _table(names: Sequence[str], rows: Sequence[tuple[str, ...]], kind: str) -> Iterator[str]:
    yield "<div class=wide><table><tr><th></th>"
    yield "".join(f"<th>{_key(i)}{_text(name)}</th>" for i, name in enumerate(names)) + "</tr>"
    for name, *cells in rows:
        yield f"<tr><th>{_text(name)}</th>" + "".join(f"<td class={kind}>{_text(cell)}</td>" for cell in cells)
        yield "</tr>"
    yield "</table></div>"


def _answer(answer: Answer | None) -> str:
    if answer is None:
        return "<span class=note>-</span>"
    return "".join(
        f"<div class=text>{_text(text)}</div><div class=numbers>{_text(numbers)}</div>" for text, numbers in answer
    )


def _key(index: int) -> str:
    return f'<span class=key style="background: {COLOURS[index]}"></span>'


def _text(text: str) -> str:
    return escape(printable(text))
