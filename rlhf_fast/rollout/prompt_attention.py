"""Attention of whole prompts, of which nothing was in the cache before, by torch's scaled_dot_product_attention.

decode_attention reads a prompt's keys again for each of its tokens. Here the queries of a prompt share them:

    tokens of a pass    | prompt 0 ... | prompt 1 ... | prompt 2 . | prompt 3 . |
    groups, padded      | prompt 0 ... | prompt 1 ... |   then   | prompt 2 . | prompt 3 . |

Keys and values are read from the pages that rope_store has just written, so they are the ones that later tokens see.
Padding is at the end of a prompt and repeats its last token. Attention is causal, so no token of the prompt sees it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf_fast.rollout.kv_cache import KVShape, PagedKVCache

MAX_PADDING = 2
"""A group has at most this many times the tokens of its prompts."""
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's, which compiles a plan for each new shape."""


class _Group(NamedTuple):
    """Adjacent prompts, padded to the longest: B prompts of L tokens."""

    shape: tuple[int, int]
    """B, L"""
    part: slice
    """The prompts in the tokens of the pass."""
    rows: Tensor
    """(B L heads,) int64: rows of the layer's cache, seen as (rows, d)."""
    tokens: Tensor | None
    """(B L,) int64: the token of each place, counted within `part`; None if there is no padding."""
    places: Tensor | None
    """The place of each token; None if there is no padding."""


class PromptAttention:
    """The attention of one pass of prompts, for all layers of a model."""

    def __init__(self, lengths: tuple[int, ...], slot_mapping: Tensor, cache: PagedKVCache, num_heads: int):
        shape = cache.shapes[0]
        self.longest = max(lengths)
        self.repeats = 1 if _reads_groups(cache) else num_heads // shape.num_heads
        rows = _cache_rows(slot_mapping, shape, cache.page_size, self.repeats)
        self.groups = []
        start = 0
        for group in _split(lengths):
            part = slice(start, start + sum(group))
            self.groups.append(_make_group(group, part, rows[part]))
            start = part.stop

    def serves(self, q: Tensor, k_cache: Tensor, window: int) -> bool:
        """Return whether scaled_dot_product_attention has a fast kernel for this layer, and computes the same."""
        dim = q.shape[2]
        return q.dtype == k_cache.dtype and dim % 8 == 0 and dim <= 256 and (not window or window >= self.longest)

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
        """Return (N, H, d) for the rotated queries q (N, H, d), of a layer whose cache holds their keys and values."""
        outputs = [self._attend(group, q[group.part], k_cache, v_cache, scale) for group in self.groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, group: _Group, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
        queries = q if group.tokens is None else q.index_select(0, group.tokens)
        keys, values = (pages.view(-1, pages.shape[3]).index_select(0, group.rows) for pages in (k_cache, v_cache))
        queries, keys, values = (x.view(*group.shape, -1, x.shape[-1]).transpose(1, 2) for x in (queries, keys, values))
        grouped = keys.shape[1] != queries.shape[1]
        with sdpa_kernel(KERNELS):
            out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
        out = out.transpose(1, 2).flatten(0, 1)
        return out if group.places is None else out.index_select(0, group.places)


def _reads_groups(cache: PagedKVCache) -> bool:
    """Return whether a fast kernel reads the keys that several query heads share. Only flash attention does, in 16 bits
    on processors since Ampere; for the others keys are repeated."""
    device, half = cache.memory.device, cache.dtype in (torch.bfloat16, torch.float16)
    return device.type != "cuda" or (half and torch.cuda.get_device_capability(device) >= (8, 0))


def _cache_rows(slot_mapping: Tensor, shape: KVShape, page_size: int, repeats: int) -> Tensor:
    """Return the rows (N, heads) of a layer's cache, seen as (rows, d), that hold the tokens, each head `repeats`
    times."""
    heads = torch.arange(shape.num_heads * repeats, device=slot_mapping.device) // repeats
    pages, offsets = slot_mapping // page_size, slot_mapping % page_size
    return (pages[:, None] * shape.num_heads + heads) * page_size + offsets[:, None]


def _split(lengths: tuple[int, ...]) -> list[list[int]]:
    """Split prompts, longest first, into groups of little padding."""
    groups: list[list[int]] = []
    longest = total = 0
    for length in lengths:
        longest, total = max(longest, length), total + length
        if groups and longest * (len(groups[-1]) + 1) <= MAX_PADDING * total:
            groups[-1].append(length)
        else:
            groups.append([length])
            longest = total = length
    return groups


def _make_group(lengths: list[int], part: slice, rows: Tensor) -> _Group:
    count, longest = len(lengths), max(lengths)
    shape = (count, longest)
    if sum(lengths) == count * longest:
        return _Group(shape, part, rows.flatten(), None, None)
    sizes, columns = np.array(lengths)[:, None], np.arange(longest)
    tokens = sizes.cumsum()[:, None] - sizes + np.minimum(columns, sizes - 1)
    places = np.flatnonzero(columns < sizes)
    index = torch.from_numpy(np.concatenate([tokens.ravel(), places])).to(rows.device)
    on_device, places_on_device = index.split([tokens.size, len(places)])
    return _Group(shape, part, rows.index_select(0, on_device).flatten(), on_device, places_on_device)
