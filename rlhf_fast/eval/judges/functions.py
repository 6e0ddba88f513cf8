"""Judges that are Python functions: module:function, or a function that is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_fast.errors import UserError, listed
from rlhf_fast.eval.judges.protocol import Validation, Verdict
from rlhf_fast.training.reward_functions import num_required


class FunctionJudge:
    """Scores answers by a function of (answers) or (prompts, answers), which returns one number for each."""

    def __init__(self, function: Callable[..., Any], name: str, threshold: float = 0.5):
        self.function, self.name, self.threshold = function, name, threshold
        self.validation: Validation | None = None
        self.takes_prompts = _num_arguments(function, name, 1, "a list of answers, or prompts and answers") == 2

    def __call__(
        self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()
    ) -> list[Verdict]:
        del rows
        texts = (list(prompts), list(answers)) if self.takes_prompts else (list(answers),)
        return [Verdict(score) for score in _numbers(self.function, self.name, texts, prompts)]


class FunctionPairJudge:
    """Compares answers by a function of (first, second) or (prompts, first, second).

    It returns for each pair the probability, or True, False or 0.5, that the first answer is better.
    """

    def __init__(self, function: Callable[..., Any], name: str):
        self.function, self.name = function, name
        self.validation: Validation | None = None
        what = "two lists of answers, or prompts and two lists of answers"
        self.takes_prompts = _num_arguments(function, name, 2, what) == 3

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
        texts = (list(prompts), list(first), list(second)) if self.takes_prompts else (list(first), list(second))
        numbers = _numbers(self.function, self.name, texts, prompts)
        outside = [i for i, number in enumerate(numbers) if not 0 <= number <= 1]
        if outside:
            shown = listed([f"{numbers[i]:g} for {_row(i, prompts)}" for i in outside])
            raise UserError(
                f"judge {self.name}: returned {shown}; a judge of pairs returns the probability, 0 to 1, that the first"
                " answer is better"
            )
        return numbers


def _numbers(
    function: Callable[..., Any], name: str, texts: Sequence[list[str]], prompts: Sequence[str]
) -> list[float]:
    """Call a function; return one finite number for each prompt. UserError for an exception within the function."""
    try:
        scores = function(*texts)
        if isinstance(scores, Iterator):
            scores = list(scores)  # a generator raises here
    except UserError:
        raise
    except Exception as error:
        first = f" ({len(prompts)} prompts, the first is {_row(0, prompts)})" if prompts else " (no prompts)"
        raise UserError(f"judge {name}: raised {type(error).__name__}: {error}{first}") from error
    return check_numbers(scores, name, prompts)


def check_numbers(scores: Any, name: str, prompts: Sequence[str]) -> list[float]:
    """Return one finite number for each prompt. UserError naming the judge and the rows otherwise."""
    if not isinstance(scores, Iterable) or isinstance(scores, (str, bytes, Mapping)):
        raise UserError(f"judge {name}: returned {type(scores).__name__}, not a list with one number for each answer")
    found = list(scores)
    if len(found) != len(prompts):
        raise UserError(f"judge {name}: returned {len(found)} scores for {len(prompts)} answers; return one for each")
    numbers, bad = [], []
    for i, score in enumerate(found):
        try:
            number = math.nan if isinstance(score, (str, bytes)) else float(score)
        except (TypeError, ValueError):
            number = math.nan
        numbers.append(number)
        if not math.isfinite(number):
            bad.append(f"{' '.join(repr(score).split())[:40]} for {_row(i, prompts)}")
    if bad:
        raise UserError(
            f"judge {name}: returned {listed(bad)}; {len(bad)} of {len(found)} scores are not finite numbers"
        )
    return numbers


def _row(i: int, prompts: Sequence[str]) -> str:
    """Return the name of a row in messages: its number from 0 and the end of its prompt."""
    prompt = " ".join(prompts[i].split())
    shown = prompt if len(prompt) <= 40 else "..." + prompt[-37:]
    return f"row {i} ({shown!r})"


def _num_arguments(function: Callable[..., Any], name: str, fewest: int, what: str) -> int:
    """Return the number of a function's arguments: `fewest`, or one more for the prompts."""
    required = num_required(function)
    if required not in (fewest, fewest + 1):
        raise UserError(f"judge {name}: takes {required} arguments; a judge of this role takes {what}")
    return required
