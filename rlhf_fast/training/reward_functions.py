"""Reward functions in Python: how one is called, by the names of its parameters.

    f(texts)                               a list of prompt and response together
    f(prompts, responses)                  two lists of texts, as the model reads and writes them
    f(prompts, completions, answer, ...)   TRL's: by names, any of prompts, completions, completion_ids, and columns

A function is called by names if one of its parameters is called completions or completion_ids, or if it has `**kwargs`
or only parameters that must be named. One of texts or responses among them keeps the other forms. There a parameter
whose name says another thing than it would get is refused, as is the name of a column (data/row_columns.py).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from rlhf_fast.batches import GivenRow, Prompts, Responses
from rlhf_fast.config.rewards import bare_function
from rlhf_fast.data.row_columns import NOT_PASSED, Wanted
from rlhf_fast.errors import UserError, nearest
from rlhf_fast.training.reward_calls import Call

IDS = ("completion_ids", "completions_ids")
"""TRL's code has the first name, its documentation the second."""
GIVEN = ("prompts", "completions", *IDS)
"""Parameters that are no columns."""
BY_POSITION: dict[int, dict[tuple[str, ...], str]] = {
    1: {("texts",): "prompt and response together"},
    2: {("prompts",): "the prompts", ("responses", "completions"): "the responses"},
}
"""Number of lists -> what each is called, and what it holds."""
FORMS = "a list of texts, a list of prompts and a list of responses, or by name prompts, completions and columns"


class CallForm(NamedTuple):
    """The way in which a function is called. by_name: with keywords; else with `num_positional` lists."""

    by_name: bool
    num_positional: int = 0
    given: tuple[str, ...] = ()
    """The names of GIVEN that it takes."""
    required: tuple[str, ...] = ()
    """Columns that it takes, without a default."""
    optional: tuple[str, ...] = ()
    rest: bool = False
    """It has **kwargs."""
    positional: tuple[str, ...] = ()
    """The names of all parameters of a function that is not called by names."""

    def __str__(self) -> str:
        if not self.by_name:
            return "prompts and responses" if self.num_positional == 2 else "texts (prompt and response together)"
        names = [*self.given, *self.required, *self.optional, *(["all other columns"] if self.rest else [])]
        return f"{', '.join(names)}, by name"


def call_form(function: Callable[..., Any], name: str) -> CallForm:
    """Return how a function is called. UserError if it is in no way that we know."""
    if isinstance(function, torch.nn.Module):
        raise UserError(f"reward {name}: is a torch module, not a function; save the reward model and give its folder")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise UserError(f"reward {name}: its parameters cannot be read; wrap it in a def of your own") from error
    kinds = inspect.Parameter
    rest = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    bound = function.keywords if isinstance(function, functools.partial) else {}
    named = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    named = [p for p in named if p.name not in bound]
    names = [p.name for p in named]
    required = num_required(function)
    if {"completions", *IDS}.intersection(p.name for p in parameters if p.name not in bound) or (
        not {"texts", "responses"}.intersection(names) and (rest or (names and not _positional(function)))
    ):
        if any(p.kind is kinds.POSITIONAL_ONLY and p.default is kinds.empty for p in parameters):
            raise UserError(f"reward {name}: is called by the names of its parameters, and one has none; remove the /")
        columns = [p for p in named if p.name not in GIVEN]
        return CallForm(
            True,
            given=tuple(p for p in names if p in GIVEN) or (GIVEN[:2] if rest else ()),
            required=tuple(p.name for p in columns if p.default is kinds.empty),
            optional=tuple(p.name for p in columns if p.default is not kinds.empty),
            rest=rest,
        )
    if required not in (1, 2):
        raise UserError(f"{name}: a reward function takes {FORMS}; it takes {required} arguments")
    _check_positions(name, [p.name for p in _positional(function) if p.name not in bound][:required])
    stars = (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    own = tuple(p.name for p in parameters if p.kind not in stars and p.name not in bound)
    return CallForm(False, required, positional=own)


def _check_positions(name: str, parameters: Sequence[str]) -> None:
    """Raise UserError for a parameter that has, or nearly has, the name of another list than it would get."""
    for parameter, (own_names, content) in zip(parameters, BY_POSITION[len(parameters)].items(), strict=True):
        meant = nearest(parameter, ("responses", *GIVEN), cutoff=0.8)
        if meant and meant not in own_names:
            by_name = {"responses": "completions", "prompts": "prompts and add **kwargs"}.get(meant, meant)
            raise UserError(
                f"reward {name}: its parameter {parameter} would get {content}, by its position; to be called by names,"
                f" as in TRL, name it {by_name}, or name it {own_names[0]} if that is what it reads"
            )


def num_required(function: Callable[..., Any]) -> int:
    """Return the number of positional arguments that a function must be given."""
    return sum(p.default is inspect.Parameter.empty for p in _positional(function))


def _positional(function: Callable[..., Any]) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in inspect.signature(function).parameters.values() if p.kind in kinds]


class FunctionReward:
    """A Python function that scores responses, decoded by the policy's tokenizer without special tokens."""

    def __init__(self, function: Callable[..., Any], tokenizer: Any, name: str = ""):
        self.function, self.tokenizer = function, tokenizer
        self.name = name or getattr(bare_function(function), "__name__", "reward")
        self.form = call_form(function, self.name)
        call = getattr(function, "__call__", None)  # noqa: B004  (of an object, which may be async)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)

    @property
    def place(self) -> str:
        """The file and line of the function, for messages: " (FILE:LINE)"; "" if it has no code of its own."""
        code = getattr(inspect.unwrap(bare_function(self.function)), "__code__", None)
        return f" ({code.co_filename}:{code.co_firstlineno})" if code else ""

    @property
    def wanted(self) -> Wanted:
        """The columns that the function reads."""
        form = self.form
        lists = "" if form.by_name else str(form)
        return Wanted(self.name, form.required, form.optional, form.rest, lists, form.positional)

    def call(self, responses: Responses, prompts: Prompts | None = None) -> Call:
        """Return the call of the function for a batch. prompts: the batch's, which have the columns of the rows."""
        uids = responses.uids.tolist()
        spans = list(zip(responses.prompt_lengths.tolist(), responses.lengths.tolist(), strict=True))
        if not self.form.by_name and self.form.num_positional == 1:
            ends = zip(responses.tokens, spans, strict=True)
            return self._call([self._decode([row[:end].tolist() for row, (_, end) in ends])], {}, uids)
        ids = responses.response_ids()
        completions = self._decode(ids)
        if prompts is not None and prompts.rows is not None and self.form.by_name:
            row_of = dict(zip(prompts.uids, prompts.rows, strict=True))
            return self._call([], self._keywords([row_of[uid] for uid in uids], completions, ids), uids)
        starts = zip(responses.tokens, spans, strict=True)
        texts = self._decode([row[:start].tolist() for row, (start, _) in starts])
        if not self.form.by_name:
            return self._call([texts, completions], {}, uids)
        return self._call([], self._keywords([GivenRow(text, {}) for text in texts], completions, ids), uids)

    def call_with_texts(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[GivenRow] = ()) -> Call:
        """Return the call for texts that no model has read. rows: the row of each response, if there is a file."""
        uids, completions = range(len(prompts)), list(responses)
        if self.form.by_name:
            given = rows or [GivenRow(prompt, {}) for prompt in prompts]
            return self._call([], self._keywords(given, completions, None), uids)
        if self.form.num_positional == 2:
            return self._call([list(prompts), completions], {}, uids)
        return self._call([[prompt + text for prompt, text in zip(prompts, completions, strict=True)]], {}, uids)

    def _keywords(
        self, rows: Sequence[GivenRow], completions: Sequence[str], ids: list[list[int]] | None
    ) -> dict[str, list[Any]]:
        """Return the lists that the function is called with, one entry for each response.

        A row with messages has messages as its prompt and its completion. UserError for what the rows do not have.
        """
        form = self.form
        pairs = zip(rows, completions, strict=True)
        found: dict[str, list[Any]] = {
            "prompts": [row.prompt for row in rows],
            "completions": [
                [{"role": "assistant", "content": text}] if isinstance(row.prompt, list) else text
                for row, text in pairs
            ],
        }
        if ids is not None:
            found |= dict.fromkeys(IDS, ids)
        passed = {name: found[name] for name in found if name in form.given or (form.rest and name != IDS[1])}
        for name in dict.fromkeys(name for row in rows for name in row.columns):
            named = name in form.required or name in form.optional
            if named or (form.rest and name not in NOT_PASSED and name not in GIVEN):
                passed[name] = [row.columns.get(name) for row in rows]
        for name in (*form.given, *form.required):
            if name not in passed:
                raise UserError(
                    f"reward {self.name}: needs {name}, which these rows do not have; give the parameter a default, or"
                    " the rows the column"
                )
        return passed

    def _call(self, args: Sequence[Any], keywords: Mapping[str, Any], uids: Sequence[int]) -> Call:
        def function() -> Any:
            # a function may change its lists, and is called again after a failure
            return self.function(*map(_copied, args), **{name: _copied(value) for name, value in keywords.items()})

        return Call(self.name, function, uids, self.is_async)

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(entry) for entry in value]
    return {key: _copied(entry) for key, entry in value.items()} if isinstance(value, dict) else value
