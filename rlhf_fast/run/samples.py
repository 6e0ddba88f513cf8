"""Samples as people read them: a prompt, the response to it, and its score, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.text import Text

from rlhf_fast.run.terminal import GAP, shortened_lines

PROMPT_LINES, RESPONSE_LINES = 3, 6
"""Lines of a text on a terminal; the rest is in samples.jsonl."""
LABEL = len("response") + len(GAP)
SMALLEST_WIDTH = 40
RAW_PROMPT = "raw_prompt"
"""Column of samples.jsonl: the prompt as the data have it, where the template changed it."""
NUMBERS = ("score", "kl", "length")


def given_prompt(row: Mapping[str, Any]) -> str:
    """Return the prompt of a row of samples.jsonl as the data have it."""
    return str(row.get(RAW_PROMPT, row.get("prompt", "")))


def responses_of(row: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (response, its numbers) of a row of samples.jsonl: one response, or those of a ranking, best first."""
    if "responses" not in row:
        return [(str(row.get("response", "")), {name: row[name] for name in (*NUMBERS, "eos") if name in row})]
    ranked = sorted(zip(row["ranks"], row["responses"], row["scores"], strict=True), key=lambda entry: entry[0])
    best = min(row["ranks"], default=0)
    return [(str(text), {"rank": rank - best + 1, "score": score}) for rank, text, score in ranked]


def numbers_text(numbers: Mapping[str, Any]) -> str:
    """Return the numbers of a response on one line: "score 0.52  kl 1.3  length 24, cut off"."""
    parts = [f"{name} {value:.4g}" for name, value in numbers.items() if _is_number(value)]
    if numbers.get("eos") is False and parts:
        parts[-1] += ", cut off"
    return GAP.join(parts)


def sample_lines(step: int, row: Mapping[str, Any], width: int, title: str = "") -> list[Text]:
    """Return a row of samples.jsonl as lines of at most `width` columns: prompt, response, its score.

    Of a ranking the best and the worst response are shown. Long texts are shortened to a few lines.
    """
    width = max(width, SMALLEST_WIDTH)
    lines = [Text(f"{title}: sample at step {step}" if title else f"sample at step {step}", style="bold")]
    lines += _labelled("prompt", given_prompt(row), width, PROMPT_LINES, "dim")
    responses = responses_of(row)
    for text, numbers in responses if len(responses) < 3 else (responses[0], responses[-1]):
        lines += _labelled("response", text, width, RESPONSE_LINES)
        if said := numbers_text(numbers):
            lines += _labelled("", said, width, 2, "cyan")
    return lines


def _labelled(label: str, text: str, width: int, count: int, style: str = "") -> Iterator[Text]:
    indent = len(GAP) + LABEL
    for i, line in enumerate(shortened_lines(text, width - indent, count)):
        shown = Text(f"{GAP}{label if i == 0 else '':<{LABEL}}", style="bold")
        shown.append(line, style=style)
        yield shown


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
