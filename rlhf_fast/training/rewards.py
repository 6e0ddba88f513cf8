"""Reward functions: a reward model's folder, or any Python function.

A reward function is a callable `(Responses) -> (B,)` float32 scores. `load_reward("out/reward", ...)` loads a model;
`load_reward("my_module:my_function", ...)` imports a function, which takes either a list of texts (prompt and response
together) or two lists, prompts and responses, and returns one number for each.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.batches import Responses
from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.errors import BadRows, UserError, listed
from rlhf_fast.model.model import Model
from rlhf_fast.model.pretrained import check_tokenizers
from rlhf_fast.training.micro_batches import micro_batches

RewardFunction = Callable[[Responses], Tensor]


def load_reward(
    spec: str,
    tokenizer: Any,
    cfg: ModelConfig | None = None,
    *,
    micro_batch_tokens: int = 8192,
    device: str | torch.device | None = None,
    fresh_head: bool = False,
) -> RewardFunction:
    """Return the reward function that `spec` names.

    tokenizer: the policy's. cfg: how to load a model; its path is ignored. fresh_head: as in Model.load.
    """
    if is_function(spec):
        return PythonReward(import_function(spec), tokenizer, spec)
    path = replace(cfg or ModelConfig(), path=spec)
    model = Model.load(path, head="scalar", fresh_head=fresh_head, device=device)
    check_tokenizers(tokenizer, model.tokenizer, spec)
    return ModelReward(model, micro_batch_tokens)


def is_function(spec: str) -> bool:
    """Return True for module:function, False for a folder or hub name."""
    return ":" in spec and not Path(spec).exists()


class ModelReward:
    """Scores a response by a model with a scalar head, at the last token."""

    def __init__(self, model: Model, micro_batch_tokens: int = 8192):
        self.model, self.micro_batch_tokens = model, micro_batch_tokens

    @torch.no_grad()
    def __call__(self, responses: Responses) -> Tensor:
        scores = torch.zeros(len(responses.lengths))
        for index, part in micro_batches(responses, self.micro_batch_tokens, packed=lambda: self.model.packs_rows):
            scores[index] = self.model.last_scores(part.tokens, part.lengths, part.prompt_lengths).cpu()
        return check_scores(scores.tolist(), responses.uids.tolist(), self.model.name)


class PythonReward:
    """Scores a response by a function of texts, decoded by the policy's tokenizer without special tokens."""

    def __init__(self, function: Callable[..., Any], tokenizer: Any, name: str = ""):
        self.function, self.tokenizer = function, tokenizer
        self.name = name or getattr(function, "__name__", "reward")
        required = num_required(function)
        if required not in (1, 2):
            raise UserError(
                f"{self.name}: a reward function takes a list of texts, or a list of prompts and a list of responses;"
                f" it takes {required} arguments"
            )
        self.takes_prompts = required == 2

    def __call__(self, responses: Responses) -> Tensor:
        if self.takes_prompts:
            spans = zip(responses.tokens, responses.prompt_lengths.tolist(), strict=True)
            prompts = self._decode([row[:length].tolist() for row, length in spans])
            scores = self.function(prompts, self._decode(responses.response_ids()))
        else:
            spans = zip(responses.tokens, responses.lengths.tolist(), strict=True)
            scores = self.function(self._decode([row[:length].tolist() for row, length in spans]))
        return check_scores(scores, responses.uids.tolist(), self.name)

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def num_required(function: Callable[..., Any]) -> int:
    """Return the number of positional arguments that a function must be given."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


def check_scores(scores: Sequence[Any], uids: Sequence[int], name: str) -> Tensor:
    """Return one finite number for each row as (B,) float32; raise UserError naming the rows otherwise."""
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: a reward must return one number for each response ({error})") from error
    if len(numbers) != len(uids):
        raise UserError(f"{name}: returned {len(numbers)} rewards for {len(uids)} responses")
    bad = [i for i, number in enumerate(numbers) if not math.isfinite(number)]
    if bad:
        shown = listed([f"{numbers[i]} for prompt {uids[i]} (row {i} of the batch)" for i in bad])
        what = f"{name}: returned {shown}; {len(bad)} of {len(uids)} rewards are not finite numbers"
        raise BadRows(what, [("Responses", uids[i]) for i in bad])
    return torch.tensor(numbers, dtype=torch.float32)


def source_file(spec: str) -> Path | None:
    """Return the file of the module in module:function, or None if it has none."""
    import_function(spec)
    file = getattr(sys.modules[spec.rpartition(":")[0]], "__file__", None)
    return Path(file) if file else None


def import_function(spec: str, kind: str = "reward") -> Callable[..., Any]:
    """Return the function that module:function names; the working directory is searched too. kind: for messages."""
    module, _, name = spec.rpartition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{kind} {spec}: cannot be imported ({error}); write module:function") from error
    except Exception as error:  # the module's own, as a SyntaxError
        raise UserError(
            f"{kind} {spec}: cannot be imported ({type(error).__name__}: {error}); mend {module}"
        ) from error
    if not callable(function):
        raise UserError(f"{kind} {spec}: is a {type(function).__name__}, not a function")
    return function
