"""Rows decoded by a model's own forward: over transformers' cache, whatever it keeps, or without a cache.

    padded       prompts of different lengths are padded on the left; keys and values of padding are masked
    one length   prompts of one length share a batch: a recurrent state may take in the padding (MiniMax)
    whole rows   every token runs its whole row again: the cache gives other hidden states than the training forward
                 (Zamba2 decodes with other time steps than it trains with; RWKV is wrong for more than one row)

`choose_batch` tries them in this order, and compares each with the model's own forward.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.batches import pad_rows
from rlhf_fast.model.model import Model
from rlhf_fast.model.reduced import first_layers, float32
from rlhf_fast.rollout.choose import warn_slow

CACHE_NAMES = ("past_key_values", "cache_params")
"""Arguments of a decoder's forward, and fields of its output, that hold the cache."""
STEPS = 3
"""Tokens decoded after the prompts when a cache is compared with the model's own forward."""


class CachedBatch:
    """Rows over transformers' cache, and the hidden states (B, D) that predict their next tokens."""

    def __init__(self, model: Model, prompts: list[list[int]]):
        self.model = model
        parameters = inspect.signature(model.decoder.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in parameters), "")
        self.cache: Any = None
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        width = max(map(len, distinct))
        tokens = torch.zeros(len(distinct), width, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(distinct):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        positions = (mask.cumsum(1) - 1).clamp_min(0).to(model.device)
        # not needed, and some models without attention take none
        self.mask = None if mask.all() else mask.to(model.device)
        self.last_hidden = self._forward(tokens.to(model.device), positions)
        self.positions = positions[:, -1]
        index = [distinct[tuple(prompt)] for prompt in prompts]
        if index != list(range(len(distinct))):
            self.select(torch.tensor(index, device=model.device))

    def select(self, index: Tensor) -> None:
        """Keep rows `index` as the batch; a row may be kept several times."""
        # not Cache.batch_select_indices, which layers with a recurrent state lack or do not apply to it
        for layer in self.cache.layers:
            layer.reorder_cache(index)
        if hasattr(self.cache, "linear_cache"):  # MiniMax keeps the states beside the layers
            states = self.cache.linear_cache
            self.cache.linear_cache = [state[index] if isinstance(state, Tensor) else state for state in states]
        self.mask = None if self.mask is None else self.mask[index]
        self.positions = self.positions[index]
        self.last_hidden = self.last_hidden[index]

    def append(self, token: Tensor) -> None:
        """Append a token (B,) to each row, and run the model on it."""
        self.positions = self.positions + 1
        self.mask = None if self.mask is None else F.pad(self.mask, (0, 1), value=1)
        self.last_hidden = self._forward(token[:, None], self.positions[:, None])

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        kwargs: dict[str, Any] = {"position_ids": positions} if self.takes_positions else {}
        if self.mask is not None:
            kwargs["attention_mask"] = self.mask
        if self.cache_name:
            kwargs[self.cache_name] = self.cache
        output = self.model.run_decoder(input_ids=tokens, use_cache=True, **kwargs)
        self.cache = getattr(output, self.cache_name, None)
        if self.cache is None:
            raise NoCache
        return output.last_hidden_state[:, -1]


class WholeRows:
    """Rows without a cache, as CachedBatch: each token runs the training forward on its whole row."""

    def __init__(self, model: Model, prompts: list[list[int]]):
        self.model = model
        self.rows = [list(prompt) for prompt in prompts]
        self.last_hidden = self._forward()

    def select(self, index: Tensor) -> None:
        """Keep rows `index` as the batch; a row may be kept several times."""
        self.rows = [list(self.rows[row]) for row in index.tolist()]
        self.last_hidden = self.last_hidden[index]

    def append(self, token: Tensor) -> None:
        """Append a token (B,) to each row, and run the model on the rows."""
        for row, new in zip(self.rows, token.tolist(), strict=True):
            row.append(new)
        self.last_hidden = self._forward()

    def _forward(self) -> Tensor:
        tokens, lengths = pad_rows(self.rows)
        return self.model.hidden(tokens)[torch.arange(len(lengths)), lengths - 1]


class NoCache(RuntimeError):
    """The decoder returns no cache."""


class BatchKind(NamedTuple):
    """The way in which rows are decoded together."""

    make: type[CachedBatch | WholeRows]
    one_length: bool
    """Only prompts of one length share a batch."""


@torch.no_grad()
def choose_batch(model: Model) -> BatchKind:
    """Return the fastest kind that agrees with the model's own forward. One warning, or UserError under
    RLHF_FAST_STRICT=1, if that is without a cache."""
    training, problem = model.module.training, ""
    model.module.eval()
    try:
        for prompt_lengths in ((5, 1, 3), (4, 4, 4)):
            problem = _problem(model, prompt_lengths)
            if not problem:
                return BatchKind(CachedBatch, one_length=len(set(prompt_lengths)) == 1)
    finally:
        model.module.train(training)
    warn_slow(f"{model.name}: every sampled token runs its whole row again, very slowly, because {problem}")
    return BatchKind(WholeRows, one_length=False)


def _problem(model: Model, prompt_lengths: tuple[int, int, int]) -> str:
    """Return what is wrong with transformers' cache of this model for prompts of these lengths; "" = nothing."""
    limit = model.max_positions
    if limit and limit < max(prompt_lengths) + STEPS:
        return ""  # too few positions to try it
    limit_error = 1e-3
    try:
        error = _float32_cache_error(model, prompt_lengths)
        if error is None:
            error = _cache_error(model, prompt_lengths)
            # in half precision a router may choose other experts
            limit_error = 1e-3 if model.head_weight.dtype == torch.float32 else 0.2
    except NoCache:
        return "its decoder returns no cache"
    except Exception as exception:  # an architecture's own code may fail in a batch that training never has
        reason = str(exception).partition("\n")[0]
        return f"its decoder fails over transformers' own cache ({type(exception).__name__}: {reason})"
    if error <= limit_error:
        return ""
    return f"its hidden states over transformers' own cache are off by {error:.2g} of their size"


def _float32_cache_error(model: Model, prompt_lengths: tuple[int, int, int]) -> float | None:
    """Return `_cache_error` of a model in half precision, where rounding hides padding that leaks, as one in float32 of
    the first layers; None if that cannot be made."""
    if model.head_weight.dtype == torch.float32:
        return None
    try:
        with first_layers(model, few=True), float32(model):
            return _cache_error(model, prompt_lengths)
    except NoCache:
        raise
    except Exception:  # a model cut short may fail in any way, or there is no room for it
        return None


def _cache_error(model: Model, prompt_lengths: tuple[int, int, int]) -> float:
    """Decode a batch whose first prompt comes twice and whose last row leaves early. Return the largest error of its
    hidden states relative to the model's own forward; in half precision the median error."""
    tokens = model.probe_tokens(len(prompt_lengths), max(prompt_lengths) + STEPS)
    rows, lengths = [0, 0, 1, 2], torch.tensor(prompt_lengths)
    batch = CachedBatch(model, [tokens[row, : prompt_lengths[row]].tolist() for row in rows])
    errors = []
    for step in range(STEPS + 1):
        ends = lengths[rows] + step
        parts = [model.hidden(tokens[row : row + 1, :end])[0, -1] for row, end in zip(rows, ends.tolist(), strict=True)]
        truth = torch.stack(parts).float()
        errors.append((batch.last_hidden.float() - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(1e-6))
        if step == STEPS:
            break
        if step == 1:
            kept = [2, 0, 1]
            batch.select(torch.tensor(kept, device=tokens.device))
            rows, ends = [rows[row] for row in kept], ends[kept]
        batch.append(tokens[rows, ends.to(tokens.device)])
    found = torch.cat(errors)
    return float(found.max() if model.head_weight.dtype == torch.float32 else found.median())
