"""The table at the end: the paper's figure, what was measured here, and whether the two tell the same story."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from rlhf_fast.demo.measure import Estimate

Numbers = Mapping[str, Estimate]
AS, NOT, OPEN = "as in the paper", "not as in the paper", "not decided here"


class Row(NamedTuple):
    """One line of the table. `paper` is what arXiv 2203.02155 reports; numbers of 175B models unless it says so."""

    title: str
    paper: str
    measured: str
    verdict: str


def compare(low: Estimate, high: Estimate) -> str:
    """Whether `high` is above `low`: for sure, for sure not, or within the noise (95 %, independent means)."""
    difference, error = high.value - low.value, math.hypot(low.error, high.error)
    if math.isnan(difference):
        return OPEN
    return AS if difference > error else NOT if difference < -error else OPEN


def no_lower(before: Estimate, after: Estimate, margin: float = 0.05) -> str:
    """Whether `after` is not below `before`: surely not by more than `margin`, surely below, or neither (95 %)."""
    difference, error = after.value - before.value, math.hypot(after.error, before.error)
    if math.isnan(difference):
        return OPEN
    return NOT if difference + error < 0 else AS if difference - error > -margin else OPEN


def beats(rate: Estimate, level: float = 0.5) -> str:
    """Whether a rate's interval lies above `level`."""
    if math.isnan(rate.value):
        return OPEN
    return AS if rate.low > level else NOT if rate.high < level else OPEN


def near(ours: Estimate, theirs: Estimate) -> str:
    """Whether two intervals meet."""
    if math.isnan(ours.value):
        return OPEN
    return AS if abs(ours.value - theirs.value) <= ours.error + theirs.error else NOT


def percent(*estimates: Estimate) -> str:
    shown = ("none" if math.isnan(e.value) else f"{100 * e.value:.1f} ± {100 * e.error:.1f} %" for e in estimates)
    return " -> ".join(shown)


def nats(*estimates: Estimate) -> str:
    return " -> ".join(f"{e.value:.3f} ± {e.error:.3f}" for e in estimates)


def rows(n: Numbers) -> Iterator[Row]:
    """The table's lines from the measured numbers, named as `demo.measure` names them."""

    def line(title: str, paper: str, names: str, verdict: str, show: Callable[..., str] = percent) -> Row:
        return Row(title, paper, show(*(n[name] for name in names.split())), verdict)

    yield line("SFT preferred to base", "about 76 %", "win/sft/base", beats(n["win/sft/base"]))
    yield line("PPO-ptx preferred to SFT", "73.4 ± 2 %", "win/ppo-ptx/sft", beats(n["win/ppo-ptx/sft"]))
    yield line("PPO-ptx preferred to base", "85 ± 3 %", "win/ppo-ptx/base", beats(n["win/ppo-ptx/base"]))
    yield line(
        "small PPO-ptx preferred to the 10x larger base",
        "1.3B preferred to 175B, no figure",
        "win/ppo-ptx/large",
        beats(n["win/ppo-ptx/large"]),
    )
    yield line(
        "PPO-ptx preferred to SFT, by held-out labelers",
        "about the same as by the others",
        "win/ppo-ptx/sft/held-out",
        beats(n["win/ppo-ptx/sft/held-out"]),
    )
    yield line(
        "true and informative answers: base -> SFT -> PPO-ptx",
        "25 -> 27 -> 69 %",
        "true/base true/sft true/ppo-ptx",
        compare(n["true/sft"], n["true/ppo-ptx"]),
    )
    yield line(
        "claims that are false: SFT -> PPO-ptx",
        "fewer (no figure)",
        "false/sft false/ppo-ptx",
        compare(n["false/ppo-ptx"], n["false/sft"]),
    )
    yield line(
        "made up, where the prompt has the answer: base -> PPO-ptx",
        "41 -> 21 %",
        "invented/base invented/ppo-ptx",
        compare(n["invented/ppo-ptx"], n["invented/base"]),
    )
    yield line(
        "rude, after a rude prompt that asks for manners: base -> PPO-ptx",
        "about 25 % fewer",
        "polite/base polite/ppo-ptx",
        compare(n["polite/ppo-ptx"], n["polite/base"]),
    )
    yield line(
        "rude, after a rude prompt as it is: base -> PPO-ptx",
        "no fewer",
        "rude/base rude/ppo-ptx",
        no_lower(n["rude/base"], n["rude/ppo-ptx"]),
    )
    everywhere = "impolite/base impolite/sft impolite/ppo-ptx"
    yield line("rude, to all sorts of prompts: base -> SFT -> PPO-ptx", "(not reported)", everywhere, "")
    yield line(
        "loss on raw text, nats a token: base -> SFT -> PPO (the alignment tax)",
        "tasks get worse: x 0.84",
        "loss/base loss/sft loss/ppo",
        compare(n["loss/base"], n["loss/ppo"]),
        nats,
    )
    yield line(
        "the same with pretraining gradients: PPO -> PPO-ptx",
        "tax mostly paid back: x 0.94",
        "loss/ppo loss/ppo-ptx",
        compare(n["loss/ppo-ptx"], n["loss/ppo"]),
        nats,
    )
    yield line(
        "two labelers agree, new pairs", "72.6 ± 1.5 %", "agreement", near(n["agreement"], Estimate(0.726, 0.015))
    )
    others = near(n["agreement/held-out"], Estimate(0.773, 0.013))
    yield line("two held-out labelers agree", "77.3 ± 1.3 %", "agreement/held-out", others)
    yield line("reward model right, its labelers", "72.4 ± 0.4 %", "accuracy", beats(n["accuracy"]))
    right = beats(n["accuracy/held-out"])
    yield line("reward model right, held-out labelers", "69.6 ± 0.9 %", "accuracy/held-out", right)


def print_table(n: Numbers, notes: list[str]) -> list[Row]:
    """Prints the table to standard output and returns its lines."""
    console = Console(highlight=False, soft_wrap=False)
    lines = list(rows(n))
    if console.is_terminal:
        table = Table(title="InstructGPT at the smallest scale (95 % intervals)", title_justify="left")
        for column in ("", "paper", "measured here", "verdict"):
            table.add_column(column)
        for row in lines:
            colour = {AS: "green", NOT: "red"}.get(row.verdict, "yellow")
            table.add_row(row.title, row.paper, row.measured, f"[{colour}]{row.verdict}[/]")
        console.print(table)
    else:
        print(plain(lines))
    for note in notes:
        print(note)
    return lines


def plain(lines: list[Row]) -> str:
    """The table as aligned text, its widest line as wide as it needs."""
    every = [Row("", "paper", "measured here", "verdict"), *lines]
    widths = [max(len(row[i]) for row in every) for i in range(4)]
    text = "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in every)
    return f"InstructGPT at the smallest scale (95 % intervals)\n{text}"
