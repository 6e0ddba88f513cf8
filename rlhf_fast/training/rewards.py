"""What a response is worth: a reward model's folder, or any Python function.

A reward is a callable `(Responses) -> (B,)` float32 scores. `load_reward("out/reward", ...)` reads a model;
`load_reward("my_module:my_function", ...)` imports a function, which takes either a list of texts (prompt and response
together) or two lists, prompts and responses, and returns one number for each.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from rlhf_fast.batches import Responses, micro_batches
from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.errors import BadRows, UserError
from rlhf_fast.model.model import Model
from rlhf_fast.model.pretrained import check_tokenizers

Reward = Callable[[Responses], Tensor]
SHOWN = 8
"""Rows that an error names."""


def load_reward(
    spec: str, tokenizer, cfg: ModelConfig | None = None, *, micro_batch_tokens: int = 8192, device=None
) -> Reward:
    """The reward that `spec` names. `tokenizer` is the policy's; `cfg` says how to load a model, its path aside."""
    if is_function(spec):
        return FunctionReward(_import(spec), tokenizer, spec)
    fields = {**vars(cfg or ModelConfig()), "path": spec}
    model = Model.load(ModelConfig(**fields), head="scalar", device=device)
    check_tokenizers(tokenizer, model.tokenizer, spec)
    return ModelReward(model, micro_batch_tokens)


def is_function(spec: str) -> bool:
    """Whether `spec` is module:function rather than a folder or hub name."""
    return ":" in spec and not Path(spec).exists()


class ModelReward:
    """The score of a scalar model at the last token of each response."""

    def __init__(self, model: Model, micro_batch_tokens: int = 8192):
        self.model, self.micro_batch_tokens = model, micro_batch_tokens

    @torch.no_grad()
    def __call__(self, responses: Responses) -> Tensor:
        scores = torch.zeros(len(responses.lengths))
        for index, part in micro_batches(responses, self.micro_batch_tokens):
            scores[index] = self.model.last_scores(part.tokens, part.lengths).cpu()
        return checked(scores.tolist(), responses.uids.tolist(), self.model.name)


class FunctionReward:
    """A function of texts, decoded by the policy's tokenizer without special tokens."""

    def __init__(self, function: Callable, tokenizer, name: str = ""):
        self.function, self.tokenizer = function, tokenizer
        self.name = name or getattr(function, "__name__", "reward")
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(function).parameters.values()
        needed = [p for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
        if len(needed) not in (1, 2):
            raise UserError(
                f"{self.name}: a reward function takes a list of texts, or a list of prompts and a list of responses;"
                f" it takes {len(needed)} arguments"
            )
        self.takes_prompts = len(needed) == 2

    def __call__(self, responses: Responses) -> Tensor:
        answers = self._decode(responses.response_ids())
        spans = zip(responses.tokens, responses.prompt_lengths.tolist(), responses.lengths.tolist(), strict=True)
        if self.takes_prompts:
            prompts = self._decode([row[:start].tolist() for row, start, _ in spans])
            scores = self.function(prompts, answers)
        else:
            scores = self.function(self._decode([row[:end].tolist() for row, _, end in spans]))
        return checked(scores, responses.uids.tolist(), self.name)

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


def checked(scores: Sequence[float], uids: Sequence[int], name: str) -> Tensor:
    """(B,) float32 of one finite number for each row; UserError naming the rows otherwise."""
    try:
        scores = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: a reward must return one number for each response ({error})") from error
    if len(scores) != len(uids):
        raise UserError(f"{name}: returned {len(scores)} rewards for {len(uids)} responses")
    bad = [i for i, score in enumerate(scores) if not math.isfinite(score)]
    if bad:
        shown = ", ".join(f"{scores[i]} for prompt {uids[i]} (row {i} of the batch)" for i in bad[:SHOWN])
        what = f"{name}: returned {shown}; {len(bad)} of {len(uids)} rewards are not finite numbers"
        raise BadRows(what, [("Responses", uids[i]) for i in bad])
    return torch.tensor(scores, dtype=torch.float32)


def source_of(spec: str) -> Path | None:
    """The file of the module that module:function names; None if it has none."""
    _import(spec)
    file = getattr(sys.modules[spec.rpartition(":")[0]], "__file__", None)
    return Path(file) if file else None


def _import(spec: str) -> Callable:
    module, _, name = spec.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"reward {spec}: cannot be imported ({error}); write module:function") from error
    if not callable(function):
        raise UserError(f"reward {spec}: is a {type(function).__name__}, not a function")
    return function
