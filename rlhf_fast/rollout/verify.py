"""Comparison of a decoder with its model's own forward, once a model, before anything is sampled with it."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rlhf_fast.kernels._backends import forced_backend
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.model.model import Model
from rlhf_fast.model.packed_decoder import inspect
from rlhf_fast.rollout.decoder import Decoder, TokenBatch
from rlhf_fast.rollout.kv_cache import PagedKVCache

PAGE_SIZE = 4
MAX_LENGTH = 12
ROWS = 3
_refusals: WeakKeyDictionary[Model, dict[tuple[Any, ...], str]] = WeakKeyDictionary()
"""The result of each comparison: why the decoder was refused, or ""."""


def verify_decoder(model: Model, decoder: Decoder) -> None:
    """Compare a decoder's hidden states with those of the module's own forward. Raise Unsupported unless they agree.

    The result is kept, until a module is replaced, hooked or converted.
    """
    found = inspect(model.decoder)
    hooks = tuple(map(id, found.hooks))
    state = (model.device, model.adapter_enabled, model.exact, forced_backend())
    key = (decoder.name, decoder.dtype, tuple(decoder.shapes), found.kinds, found.adapters, hooks, *state)
    known = _refusals.setdefault(model, {})
    if key not in known:
        try:
            _run_and_compare(model, decoder)
            known[key] = ""
        except Unsupported as reason:
            known[key] = str(reason)
    if known[key]:
        raise Unsupported(known[key])


@torch.no_grad()
def _run_and_compare(model: Model, decoder: Decoder) -> None:
    """Run rows of different lengths, prefilled in two calls, or as whole prompts in one, and then decoded together."""
    length = min(model.max_positions or MAX_LENGTH, MAX_LENGTH)
    if length < 4:
        raise Unsupported(f"{length} positions are too few to try it")
    tokens = model.probe_tokens(ROWS, length)
    prompt_lengths = [length - 3, 1, length // 2]
    num_steps = length - max(prompt_lengths)
    pages = -(-length // PAGE_SIZE)
    cache = PagedKVCache(decoder.shapes, decoder.dtype, tokens.device, ROWS * pages, ROWS, pages, PAGE_SIZE)
    for slot in range(ROWS):
        cache.assign(slot, cache.allocate(pages))
    ends = [prompt_length + num_steps for prompt_length in prompt_lengths]
    expected = [model.hidden(tokens[row : row + 1, :end])[0].float() for row, end in enumerate(ends)]
    for whole_prompts in (False, True):
        found = torch.full(
            (ROWS, length, model.head_weight.shape[1]), torch.nan, dtype=torch.float32, device=tokens.device
        )
        for call, given in _calls(prompt_lengths, num_steps, whole_prompts):
            slots, positions = torch.tensor(call, device=tokens.device).unbind(1)
            batch = TokenBatch(
                tokens[slots, positions], positions.int(), slots.int(), cache.block_table, prompt_lengths=given
            )
            found[slots, positions] = decoder.hidden(cache, batch).float()
        _compare(found, expected, decoder.dtype)


def _compare(found: Tensor, expected: list[Tensor], dtype: torch.dtype) -> None:
    """Raise Unsupported unless the hidden states of each row's first tokens are those expected.

    In half precision rounding may change a row's tokens a little, and a few tokens of all much: those that a module
    computes far from a float32 copy of its own too. So the largest errors there, one token in twelve, have no bound.
    """
    max_error, median_error = (1e-4, 1e-4) if dtype == torch.float32 else (0.3, 0.1)
    rows = [
        (found[row, : len(truth)] - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-6)
        for row, truth in enumerate(expected)
    ]
    errors = torch.cat(rows).sort().values  # NaN last
    exempt = 0 if dtype == torch.float32 else len(errors) // 12
    bounded = errors[: len(errors) - exempt]
    fits = bool(errors.isfinite().all()) and bool((bounded <= max_error).all())
    if not fits or any(row.median() > median_error for row in rows):
        raise Unsupported(f"its hidden states over our cache are off by {bounded.max():.2g} of their size")


Call = list[tuple[int, int]]
"""The (slot, position) pairs of its tokens."""


def _calls(prompt_lengths: list[int], num_steps: int, whole_prompts: bool) -> list[tuple[Call, tuple[int, ...] | None]]:
    """Return each call and its prompt_lengths: a prefill of whole prompts or two of parts, then `num_steps` decodes."""
    prefill = [(slot, position) for slot, length in enumerate(prompt_lengths) for position in range(length)]
    split = prompt_lengths[0] + 1 + prompt_lengths[2] // 2
    decode = [[(slot, length + step) for slot, length in enumerate(prompt_lengths)] for step in range(num_steps)]
    if whole_prompts:
        return [(prefill, tuple(prompt_lengths)), *((call, None) for call in decode)]
    return [(call, None) for call in (prefill[:split], prefill[split:], *decode)]
