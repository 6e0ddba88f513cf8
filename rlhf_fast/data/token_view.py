"""One row as tokens: a star, and on a terminal a colour, marks those that have a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from rlhf_fast.data.datasets import Row

SHOWN_TOKENS = 48
"""Tokens of a prompt or response that are shown; the middle of a longer one is a count."""
WIDTH = 110
PROMPT, LOSS, NO_LOSS = "cyan", "bold green", "dim"
"""Styles of the prompt's tokens, and of the response's with and without a loss."""

Cell = tuple[str, str]
"""Text and style."""


def echo_row(row: Row, tokenizer: Any, echo: Callable[[str], None], console: Console | None = None) -> None:
    """Print the row's tokens as `id token`. console: the terminal, or else the file, that decides on colours."""
    console = console or Console(highlight=False)
    response = row.responses[0] if row.responses else []
    # The first token of a text is not predicted.
    mask = row.loss_mask or [i > 0 or bool(row.prompt) for i in range(len(response))]
    note = f"; * has a loss ({sum(mask)} of {len(row.prompt) + len(response)})" if response else ""
    if note and has_colors(console):
        note += ", green; prompt cyan"
    echo(f"  the row of {row.location} as tokens{note}:")
    prompt_cells = [(f" {token}", PROMPT) for token in _id_and_token(tokenizer, row.prompt)]
    tokens = zip(mask, _id_and_token(tokenizer, response), strict=True)
    response_cells = [
        (f"{'*' if has_loss else ' '}{token}", LOSS if has_loss else NO_LOSS) for has_loss, token in tokens
    ]
    line = Text("   ")
    for text, style in [*_elided(prompt_cells), *_elided(response_cells)]:
        if len(line) + len(text) + 1 > WIDTH:
            echo(_rendered(line, console))
            line = Text("   ")
        line.append(" ").append(text, style)
    echo(_rendered(line, console))


def has_colors(console: Console) -> bool:
    """Return whether colours are shown: on a terminal, unless NO_COLOR is set."""
    return console.is_terminal and not console.no_color and console.color_system is not None


def _rendered(line: Text, console: Console) -> str:
    if not has_colors(console):
        return line.plain
    with console.capture() as captured:
        console.print(line, soft_wrap=True, end="")
    return captured.get()


def _elided(cells: list[Cell]) -> list[Cell]:
    """Replace the middle of a long list by a count."""
    if len(cells) <= SHOWN_TOKENS:
        return cells
    half = SHOWN_TOKENS // 2
    return [*cells[:half], (f" ... {len(cells) - SHOWN_TOKENS} more ...", ""), *cells[-half:]]


def _id_and_token(tokenizer: Any, ids: list[int]) -> list[str]:
    return [f"{i} {repr(token)[1:-1]}" for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)]
