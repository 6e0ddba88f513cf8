"""Rewards: models and Python functions, alone or as a weighted sum.

A reward is a callable `(Responses) -> (B,)` float32 scores. `load_reward("out/reward", ...)` loads a model,
`load_reward("my_module:my_function", ...)` imports a function, a function stands for itself, and a list of these is
their sum (docs/rewards.md). reward_functions.py has the ways in which a function is called.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.batches import Prompts, Responses
from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.config.rewards import (
    FunctionOfRun,
    RewardSpec,
    bare_function,
    is_function,
    reward_specs,
    short_names,
    spec_name,
)
from rlhf_fast.data.row_columns import Wanted
from rlhf_fast.errors import BadRows, FunctionFailed, UserError, listed
from rlhf_fast.model.model import Model
from rlhf_fast.model.pretrained import check_tokenizers
from rlhf_fast.training.micro_batches import micro_batches
from rlhf_fast.training.reward_calls import CallLimits, call_all, print_note
from rlhf_fast.training.reward_functions import FunctionReward

RewardFunction = Callable[[Responses], Tensor]
NO_LIMITS = CallLimits()


def load_reward(
    specs: RewardSpec | Sequence[RewardSpec],
    tokenizer: Any,
    cfg: ModelConfig | None = None,
    *,
    weights: Sequence[float] = (),
    limits: CallLimits = NO_LIMITS,
    micro_batch_tokens: int = 8192,
    device: str | torch.device | None = None,
    fresh_head: bool = False,
) -> Reward:
    """Return the reward that `specs` names: one, or the sum of several, each times its weight (none = 1).

    tokenizer: the policy's. cfg: how to load a model; its path is ignored. limits: of the functions' calls.
    fresh_head: as in Model.load.
    """
    parts: list[ModelReward | FunctionReward] = []
    for spec in reward_specs(specs):
        if is_function(spec):
            parts.append(FunctionReward(find_function(spec), tokenizer, spec_name(spec)))
        else:
            model_cfg = replace(cfg or ModelConfig(), path=str(spec))
            model = Model.load(model_cfg, head="scalar", fresh_head=fresh_head, device=device)
            check_tokenizers(tokenizer, model.tokenizer, str(spec))
            parts.append(ModelReward(model, micro_batch_tokens))
    return Reward(parts, weights, short_names(reward_specs(specs)), limits)


class ModelReward:
    """Scores a response by a model with a scalar head, at the last token."""

    def __init__(self, model: Model, micro_batch_tokens: int = 8192):
        self.model, self.micro_batch_tokens = model, micro_batch_tokens
        self.name = model.name

    @torch.no_grad()
    def __call__(self, responses: Responses) -> Tensor:
        scores = torch.zeros(len(responses.lengths))
        for index, part in micro_batches(responses, self.micro_batch_tokens, packed=lambda: self.model.packs_rows):
            scores[index] = self.model.last_scores(part.tokens, part.lengths, part.prompt_lengths).cpu()
        return check_scores(scores.tolist(), responses.uids.tolist(), self.model.name)


class Scores(NamedTuple):
    """The score of each response, and the mean and standard deviation of each of several rewards."""

    total: Tensor
    """(B,) float32"""
    stats: dict[str, float]
    columns: Sequence[Sequence[float | None]] = ()
    """The numbers that each reward gave the responses."""


class Reward:
    """The weighted sum of rewards. A reward that has no number for a response, None, adds nothing there.

    notify: gets a sentence for each call of a function that failed and is made again.
    """

    def __init__(
        self,
        parts: Sequence[ModelReward | FunctionReward],
        weights: Sequence[float] = (),
        names: Sequence[str] = (),
        limits: CallLimits = NO_LIMITS,
    ):
        self.parts, self.limits = list(parts), limits
        self.weights = [*weights] or [1.0] * len(self.parts)
        self.names = [*names] or [part.name for part in self.parts]
        self.notify: Callable[[str], object] = print_note

    @property
    def wanted(self) -> list[Wanted]:
        """The columns that the functions read."""
        return [part.wanted for part in self.parts if isinstance(part, FunctionReward)]

    def models(self) -> list[Model]:
        """Return the reward models among the parts."""
        return [part.model for part in self.parts if isinstance(part, ModelReward)]

    def notes(self) -> list[str]:
        """Return a sentence on how each function is called."""
        functions = [part for part in self.parts if isinstance(part, FunctionReward)]
        return [f"reward {part.name}: is called with {part.form}" for part in functions]

    def __call__(self, responses: Responses, prompts: Prompts | None = None) -> Tensor:
        return self.score(responses, prompts).total

    @torch.no_grad()
    def score(self, responses: Responses, prompts: Prompts | None = None) -> Scores:
        """Return the scores. prompts: the batch's, which have the columns that functions ask for. BadRows for a
        response to which no reward gives a number."""
        uids = responses.uids.tolist()
        functions = [part for part in self.parts if isinstance(part, FunctionReward)]
        calls = [part.call(responses, prompts) for part in functions]
        returned = iter(call_all(calls, self.limits, self.notify))
        columns: list[Sequence[float | None]] = []
        for part in self.parts:
            if isinstance(part, ModelReward):
                columns.append(part(responses).tolist())
            else:
                columns.append(check_numbers(next(returned), uids, f"{part.name}{part.place}", by_function=True))
        self._require_a_number(columns, uids)
        total = [
            math.fsum(weight * number for weight, number in zip(self.weights, row, strict=True) if number is not None)
            for row in zip(*columns, strict=True)
        ]
        return Scores(check_scores(total, uids, "the sum of the rewards"), self._stats(columns), columns)

    def _stats(self, columns: Sequence[Sequence[float | None]]) -> dict[str, float]:
        """Return rewards/NAME/mean and /std over the responses that have a number, if there are several rewards."""
        stats: dict[str, float] = {}
        for name, column in zip(self.names, columns, strict=True) if len(columns) > 1 else ():
            numbers = torch.tensor([number for number in column if number is not None], dtype=torch.float64)
            if len(numbers):
                stats |= {f"rewards/{name}/mean": float(numbers.mean())}
                stats |= {f"rewards/{name}/std": float(numbers.std(correction=0))}
        return stats

    def _require_a_number(self, columns: Sequence[Sequence[float | None]], uids: Sequence[int]) -> None:
        bad = [i for i, row in enumerate(zip(*columns, strict=True)) if all(number is None for number in row)]
        if not bad:
            return
        who = f"reward {self.parts[0].name}: returned None" if len(self.parts) == 1 else "reward: all returned None"
        raise BadRows(
            f"{who}; {len(bad)} of {len(uids)} responses have no reward, and each needs a number from one function at"
            " least",
            [("Responses", uids[i]) for i in bad],
            unlocated=_batch_rows(bad, uids),
            by_function=True,
        )


def score_responses(reward: RewardFunction, responses: Responses, prompts: Prompts | None) -> Scores:
    """Return what a reward gives, ours or any other callable."""
    if isinstance(reward, Reward):
        return reward.score(responses, prompts)
    return Scores(reward(responses), {})


def _batch_rows(bad: Sequence[int], uids: Sequence[int]) -> str:
    return listed([f"prompt {uids[i]}, row {i} of the batch" for i in bad])


def check_numbers(scores: Any, uids: Sequence[int], name: str, by_function: bool = False) -> list[float | None]:
    """Return one finite number or None for each row; raise UserError naming the rows otherwise. by_function: they are
    what a user's function returned, which FunctionFailed says."""
    kind = FunctionFailed if by_function else UserError
    try:
        found = [scores] if isinstance(scores, (str, bytes)) else list(scores)
        if any(isinstance(score, (str, bytes)) for score in found):
            raise TypeError("found text")
        numbers = [None if score is None else float(score) for score in found]
    except (TypeError, ValueError) as error:
        raise kind(f"{name}: a reward must return one number for each response ({error})") from error
    if len(numbers) != len(uids):
        raise kind(f"{name}: returned {len(numbers)} rewards for {len(uids)} responses")
    bad = [i for i, number in enumerate(numbers) if number is not None and not math.isfinite(number)]
    if bad:
        values = " and ".join(dict.fromkeys(str(numbers[i]) for i in bad))
        what = f"{name}: returned {values}; {len(bad)} of {len(uids)} rewards are not finite numbers"
        raise BadRows(what, [("Responses", uids[i]) for i in bad], _batch_rows(bad, uids), by_function)
    return numbers


def check_scores(scores: Any, uids: Sequence[int], name: str) -> Tensor:
    """Return one finite number for each row as (B,) float32; raise UserError naming the rows otherwise."""
    numbers = check_numbers(scores, uids, name)
    if missing := [i for i, number in enumerate(numbers) if number is None]:
        shown = _batch_rows(missing, uids)
        raise UserError(f"{name}: a reward must return one number for each response, and returned None for {shown}")
    return torch.tensor(numbers, dtype=torch.float32)


def check_function(spec: RewardSpec, kind: str = "reward") -> Wanted:
    """Return the columns that a function reads. UserError if it cannot be imported or called."""
    return FunctionReward(find_function(spec, kind), None, spec_name(spec)).wanted


def find_function(spec: RewardSpec, kind: str = "reward") -> Callable[..., Any]:
    """Return a function as it was given, or the one that module:function names."""
    return import_function(spec, kind) if isinstance(spec, str) else spec


def source_file(spec: str) -> Path | None:
    """Return the file in which the function of module:function is written, which may be another than the module's;
    that of its module if Python does not know it; None if there is none."""
    function = bare_function(import_function(spec))
    file = getattr(sys.modules[spec.rpartition(":")[0]], "__file__", None)
    with suppress(TypeError):
        file = inspect.getsourcefile(inspect.unwrap(function)) or file
    return Path(file) if file else None


def import_function(spec: str, kind: str = "reward") -> Callable[..., Any]:
    """Return the function that module:function names; the working directory is searched too. kind: for messages.

    The folder of a FunctionOfRun is searched first, and only for this import.
    """
    module, _, name = spec.rpartition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:  # for good: a function may import modules when it is called
        sys.path.insert(0, folder)
    try:
        with _searched(spec.folder) if isinstance(spec, FunctionOfRun) else nullcontext():
            function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        remedy = "write module:function"
        if module == "__main__" or "<" in name:
            remedy = "it is a function of a script: start the script again, or give another reward"
        elif module.endswith(".py") or "/" in module:
            remedy = f"write {Path(module).stem}:{name}, the module's name, from its folder"
        raise UserError(f"{kind} {spec}: cannot be imported ({error}); {remedy}") from error
    except Exception as error:  # the module's own, as a SyntaxError
        raise UserError(
            f"{kind} {spec}: cannot be imported ({type(error).__name__}: {error}); mend {module}"
        ) from error
    if not callable(function):
        raise UserError(f"{kind} {spec}: is a {type(function).__name__}, not a function")
    return function


@contextmanager
def _searched(folder: str) -> Iterator[None]:
    """Search a folder for modules first, within the block."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the module may have removed it
            sys.path.remove(folder)
