"""Columns of the rows that reward functions ask for. A row keeps only those."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from rlhf_fast.batches import GivenRow
from rlhf_fast.config.fields import DataConfig
from rlhf_fast.data.encode import has_loss
from rlhf_fast.data.fields import shown
from rlhf_fast.data.rows import Example
from rlhf_fast.errors import UserError, did_you_mean

NOT_PASSED = frozenset({"prompt", "completion", "completion_ids"})
"""Columns that `**kwargs` does not get, as in TRL."""
LISTS = frozenset({"texts", "text", "prompts", "prompt", "responses", "response"})
"""Parameters that a function called by position may have although a column is called the same."""


class Wanted(NamedTuple):
    """The columns that a function reads of a row: none if it is called by position."""

    reward: str
    """The function's name, for messages."""
    required: tuple[str, ...] = ()
    """Columns without which it cannot be called."""
    optional: tuple[str, ...] = ()
    """Columns that it has a default for."""
    rest: bool = False
    """It has **kwargs, which get every other column."""
    lists: str = ""
    """The lists that it is called with, by position, in words. "" = it is called by the names of its parameters."""
    positional: tuple[str, ...] = ()
    """The names of its parameters if it is called by position. None may be a column, which it would not get."""

    @property
    def depends_on_columns(self) -> bool:
        """`require_columns` has something to look for."""
        return bool(self.required or self.positional)

    def takes(self, column: str, removed: Collection[str] = ()) -> bool:
        """Return whether a column reaches the function. removed: the columns of data.remove_columns, which only a
        function gets that names them."""
        if column in self.required or column in self.optional:
            return True
        return self.rest and column not in NOT_PASSED and column not in removed


def given_row(example: Example, taken: Collection[str], cfg: DataConfig) -> GivenRow:
    """Return the prompt of a row and its columns `taken`; a column that only other rows have is None."""
    prompt = example.prompt
    if cfg.turns == "all" and isinstance(prompt, list):  # the model is asked what comes before the first answer
        learned = (i for i, turn in enumerate(prompt) if turn["role"] == "assistant" and has_loss(turn))
        prompt = prompt[: next(learned, len(prompt))]
    columns = {name: example.row.get(name) for name in taken}
    return GivenRow(prompt, columns, frozenset(columns.keys() - example.row.keys()))


def taken_columns(examples: Iterable[Example], wanted: Sequence[Wanted], removed: Collection[str]) -> list[str]:
    """Return the columns of the rows that reach a function."""
    names = dict.fromkeys(name for example in examples for name in example.row) if wanted else {}
    return [name for name in names if any(each.takes(name, removed) for each in wanted)]


def _is_the_prompt(name: str, wanted: Wanted, examples: Sequence[Example]) -> bool:
    """Return whether a column is the prompt under the file's own name, and the parameter the one that gets prompts."""
    gets_prompts = wanted.lists.startswith("prompts") and name == wanted.positional[0]
    return gets_prompts and bool(examples) and examples[0].row.get(name) == examples[0].prompt


def require_columns(path: str, examples: Sequence[Example], wanted: Sequence[Wanted]) -> None:
    """Raise UserError if a function needs a column that no row has, or has a column's name for what is none."""
    names = dict.fromkeys(name for example in examples for name in example.row) if wanted else {}
    for each in wanted:
        taken = [name for name in each.positional if name in names and name not in LISTS]
        if column := next((name for name in taken if not _is_the_prompt(name, each, examples)), ""):
            raise UserError(
                f"reward {each.reward}: its parameter {column} is a column of {path}, which it would not get: it is"
                f" called with {each.lists}, by position; to be called by names, as in TRL, take the responses as"
                f" completions, or rename {column}"
            )
        for column in each.required:
            if column in names:
                continue
            hint = did_you_mean(column, names, "give the parameter a default, or the rows the column")
            raise UserError(
                f"reward {each.reward}: its parameter {column} is neither prompts, completions, completion_ids nor a"
                f" column of {path}, which has {', '.join(map(shown, names)) or 'none'}; {hint}"
            )
