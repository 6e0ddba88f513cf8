"""Prefill: tokens of many sequences at a time through a decoder, in passes of a bounded number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.rollout.decoder import Decoder, TokenBatch
from rlhf_fast.rollout.kv_cache import PagedKVCache

MAX_PREFILL_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of one pass at most, by device. On a GPU the launches of a smaller pass take longer than its products."""


class Segment(NamedTuple):
    """Adjacent tokens of one sequence, whose earlier tokens are in the cache already."""

    slot: int
    start: int
    """Position of the first token."""
    tokens: Sequence[int]


def prefill(decoder: Decoder, cache: PagedKVCache, segments: Sequence[Segment], wanted: np.ndarray) -> Tensor:
    """Write the segments' keys and values to the cache. Return the hidden states (n, D) of the tokens at index `wanted`
    (n,), rising, counted over all segments."""
    device = cache.memory.device
    lengths = np.array([len(segment.tokens) for segment in segments])
    tokens = torch.tensor([token for segment in segments for token in segment.tokens], device=device)
    ranges = [np.arange(s.start, s.start + len(s.tokens), dtype=np.int32) for s in segments]
    positions = torch.from_numpy(np.concatenate(ranges)).to(device)
    slots = torch.from_numpy(np.repeat(np.array([s.slot for s in segments], dtype=np.int32), lengths)).to(device)
    starts_at_0 = not any(segment.start for segment in segments)
    hidden = []
    for part, whole in prefill_passes(lengths.tolist(), MAX_PREFILL_TOKENS.get(device.type, 16384)):
        first, last = np.searchsorted(wanted, [part.start, part.stop])
        index = torch.from_numpy(wanted[first:last] - part.start).to(device)
        prompt_lengths = whole if starts_at_0 else None
        batch = TokenBatch(tokens[part], positions[part], slots[part], cache.block_table, index, prompt_lengths)
        hidden.append(decoder.hidden(cache, batch))
    return torch.cat(hidden)


def prefill_passes(lengths: list[int], max_tokens: int) -> Iterator[tuple[slice, tuple[int, ...] | None]]:
    """Yield the tokens of each pass, at most `max_tokens`: of as many whole segments as fit, and their lengths; or of a
    part of a longer one, and None."""
    start, total = 0, 0
    whole: list[int] = []
    for length in lengths:
        if whole and total + length > max_tokens:
            yield slice(start, start + total), tuple(whole)
            start, whole, total = start + total, [], 0
        if length <= max_tokens:
            whole.append(length)
            total += length
            continue
        for part in range(0, length, max_tokens):
            yield slice(start + part, start + min(part + max_tokens, length)), None
        start += length
    if whole:
        yield slice(start, start + total), tuple(whole)
