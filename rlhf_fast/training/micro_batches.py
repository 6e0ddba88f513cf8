"""Micro-batches: parts of a batch of which each is one forward and backward pass, by a budget of tokens."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_fast.batches import RESPONSE_FIELDS, Comparisons, Splittable, shared_prompts

S = TypeVar("S", bound=Splittable)


def micro_batches(batch: S, tokens: int, packed: bool | Callable[[], bool] = False) -> Iterator[tuple[Tensor, S]]:
    """Yield (index, part) with at most `tokens` tokens in each part.

    A part is made of whole rows, or of whole groups of Comparisons. One that is longer than the budget is a part of its
    own. The parts depend on the arguments alone.

    packed: count what a pass over packed rows computes (`Model.packs_rows`): no padding, and a prompt that rows of a
    part share once. Rows with equal prompts then stay together where the budget allows, and parts are of similar sizes,
    for which few CUDA graphs are captured. Else padding counts, and the longest rows come first. A function is asked
    only where the padded batch exceeds the budget.
    """
    offsets = batch.group_offsets.tolist() if isinstance(batch, Comparisons) else range(len(batch.lengths) + 1)
    spans = list(pairwise(offsets))
    if len(batch.lengths) and len(batch.lengths) * int(batch.lengths.max()) <= tokens:
        parts = [list(range(len(spans)))]
    else:
        is_packed = packed() if callable(packed) else packed
        parts = (_packed_parts if is_packed else _padded_parts)(batch, spans, tokens)
    if len(parts) == 1 and _is_trimmed(batch):  # without a copy
        yield torch.arange(len(spans)), batch
        return
    for part in parts:
        index = torch.tensor(part)
        yield index, batch.take(index)


def _is_trimmed(batch: Splittable) -> bool:
    """Return whether `take` of all rows would cut no padding."""
    in_response = batch.lengths - getattr(batch, "prompt_lengths", 0)
    fields = [(getattr(batch, name, None), in_response) for name in RESPONSE_FIELDS] + [(batch.tokens, batch.lengths)]
    return all(x is None or (len(x) > 0 and x.shape[1] == int(size.max())) for x, size in fields)


def _padded_parts(batch: Splittable, spans: list[tuple[int, int]], budget: int) -> list[list[int]]:
    """Return parts as lists of spans, whose rows (first, last + 1) stay together, by padded size."""
    lengths = batch.lengths.tolist()
    longest = [max(lengths[start:end], default=0) for start, end in spans]
    parts: list[list[int]] = []
    rows = width = 0
    for i in sorted(range(len(spans)), key=lambda i: -longest[i]):
        num_rows = spans[i][1] - spans[i][0]
        if not parts or (rows + num_rows) * width > budget:
            parts.append([])
            rows, width = 0, longest[i]
        parts[-1].append(i)
        rows += num_rows
    return parts


def _packed_parts(batch: Splittable, spans: list[tuple[int, int]], budget: int) -> list[list[int]]:
    """Return parts as lists of spans, whose rows (first, last + 1) stay together, by tokens without padding."""
    lengths, prompt_lengths = batch.lengths.tolist(), getattr(batch, "prompt_lengths", None)
    first_of = {} if prompt_lengths is None else shared_prompts(batch.tokens, prompt_lengths)
    with_prompt: dict[int, list[int]] = {}
    for i, (start, _) in enumerate(spans):
        with_prompt.setdefault(first_of.get(start, start), []).append(i)
    chunks: list[tuple[int, list[int]]] = []  # tokens, and spans of one prompt
    for first, same in with_prompt.items():
        shared = 0 if prompt_lengths is None or first not in first_of else int(prompt_lengths[first])
        own = {i: sum(lengths[slice(*spans[i])]) - shared * (spans[i][1] - spans[i][0]) for i in same}
        size, chunk = shared, list[int]()
        for i in sorted(same, key=lambda i: -own[i]):
            if chunk and size + own[i] > budget:
                chunks.append((size, chunk))
                size, chunk = shared, []
            size += own[i]
            chunk.append(i)
        chunks.append((size, chunk))
    chunks.sort(key=lambda sized: -sized[0])
    large = [chunk for size, chunk in chunks if size > budget]  # single rows, and groups of Comparisons
    rest = chunks[len(large) :]
    if not rest:
        return large
    count = -(-sum(size for size, _ in rest) // budget)
    parts = _level(rest, count)
    while parts[0][0] > budget:  # the largest
        count = min(count + 1 + count // 16, len(rest))
        parts = _level(rest, count)
    return large + [part for _, part in parts if part]


def _level(chunks: list[tuple[int, list[int]]], count: int) -> list[tuple[int, list[int]]]:
    """Return `count` parts (tokens, spans) of all chunks, each chunk added to the smallest part, the largest first."""
    heap = [(0, number, list[int]()) for number in range(count)]
    for size, chunk in chunks:
        total, number, part = heap[0]
        part += chunk
        heapq.heapreplace(heap, (total + size, number, part))
    return [(total, part) for total, _, part in sorted(heap, key=lambda sized: (-sized[0], sized[1]))]
