"""Paged KV cache, as in vLLM: one allocation, divided into pages of P positions, which sequences allocate and release.

Page m of a sequence holds its positions m * P to m * P + P - 1, in all layers. Row s of the block table lists the pages
of the sequence in slot s. Samples of one prompt share its full pages, so pages are reference-counted; a page whose
count falls to 0 is free again. A sequence gets all the pages it may need when it starts, so none is preempted later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rlhf_fast.errors import UserError

PAGE_SIZE = {"cpu": 32, "cuda": 64}
"""Positions of a page, by device. On a CPU 32 to 128 take the same time, and 16 a tenth longer at 1024 positions. With
smaller pages less of a sequence's last page is unused."""
ALIGNMENT = 128
"""Bytes: the keys and values of each layer start at a multiple of this."""
MIB = 2**20


class KVShape(NamedTuple):
    """Shape of one layer's keys and values."""

    num_heads: int
    k_dim: int
    v_dim: int


class OutOfPages(RuntimeError):
    """More pages were requested than are free; none was allocated."""


def page_size_for(device: torch.device) -> int:
    return PAGE_SIZE.get(device.type, 64)


class PagedKVCache:
    """Keys and values of all layers, as contiguous views of one tensor, and the table of their pages.

    k[layer], v[layer]: (num_pages, num_heads, P, k_dim) and (num_pages, num_heads, P, v_dim).
    block_table: (num_slots, max_pages_per_slot) int32; 0 where no page is assigned.
    """

    def __init__(
        self,
        shapes: Sequence[KVShape],
        dtype: torch.dtype,
        device: torch.device,
        num_pages: int,
        num_slots: int,
        max_pages_per_slot: int,
        page_size: int = 0,
    ):
        self.shapes = list(shapes)
        self.dtype = dtype
        self.page_size = page_size or page_size_for(device)
        self.num_pages = num_pages
        self.num_slots = num_slots
        self.max_pages_per_slot = max_pages_per_slot
        sizes = [num_pages * heads * self.page_size * dim for heads, *dims in self.shapes for dim in dims]
        unit = ALIGNMENT // dtype.itemsize
        padded_sizes = [-(-size // unit) * unit for size in sizes]
        self.memory = torch.empty(sum(padded_sizes), dtype=dtype, device=device)
        parts = self.memory.split(padded_sizes)
        views = iter([part[:size] for part, size in zip(parts, sizes, strict=True)])
        self.k, self.v = [], []
        for heads, k_dim, v_dim in self.shapes:
            self.k.append(next(views).view(num_pages, heads, self.page_size, k_dim))
            self.v.append(next(views).view(num_pages, heads, self.page_size, v_dim))
        self.block_table = torch.zeros(num_slots, max_pages_per_slot, dtype=torch.int32, device=device)
        self._free_pages = list(range(num_pages - 1, -1, -1))
        self._refcounts = [0] * num_pages

    @property
    def num_free_pages(self) -> int:
        return len(self._free_pages)

    def pages_for(self, num_positions: int) -> int:
        """Return the number of pages that hold `num_positions`."""
        return -(-num_positions // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Return `count` free pages, each with a reference count of 1."""
        if count > len(self._free_pages):
            raise OutOfPages(
                f"PagedKVCache: {count} pages requested, {len(self._free_pages)} of {self.num_pages} are free"
            )
        pages = [self._free_pages.pop() for _ in range(count)]
        for page in pages:
            self._refcounts[page] = 1
        return pages

    def incref(self, pages: Sequence[int]) -> None:
        """Add a reference to each of `pages`, which must be allocated."""
        for page in pages:
            if not self._refcounts[page]:
                raise RuntimeError(f"PagedKVCache: page {page} is free and cannot be shared")
            self._refcounts[page] += 1

    def refcount(self, page: int) -> int:
        """Return the number of references to `page`; 0 = it is free."""
        return self._refcounts[page]

    def release(self, pages: Sequence[int]) -> None:
        """Drop a reference to each of `pages`. A page without references is free."""
        for page in pages:
            if not self._refcounts[page]:
                raise RuntimeError(f"PagedKVCache: page {page} is free already")
            self._refcounts[page] -= 1
            if not self._refcounts[page]:
                self._free_pages.append(page)

    def assign(self, slot: int, pages: Sequence[int]) -> None:
        """Write `pages` to the block table's row of `slot`."""
        self.assign_rows({slot: pages})

    def assign_rows(self, pages_by_slot: Mapping[int, Sequence[int]]) -> None:
        """Write the pages of each slot to its row of the block table, with one copy to the device."""
        rows = np.zeros((len(pages_by_slot), 1 + self.max_pages_per_slot), dtype=np.int32)
        for row, (slot, pages) in zip(rows, pages_by_slot.items(), strict=True):
            row[0] = slot
            row[1 : 1 + len(pages)] = pages
        slots, table = torch.from_numpy(rows).to(self.block_table.device).split([1, self.max_pages_per_slot], 1)
        self.block_table.index_copy_(0, slots[:, 0].long(), table)

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy page sources[i] of every layer to targets[i]."""
        if not sources:
            return
        source, target = (torch.tensor(pages, device=self.memory.device) for pages in (sources, targets))
        for view in (*self.k, *self.v):
            view.index_copy_(0, target, view.index_select(0, source))


def page_bytes(shapes: Sequence[KVShape], dtype: torch.dtype, page_size: int) -> int:
    """Return the bytes of one page over all layers."""
    return page_size * dtype.itemsize * sum(heads * (k_dim + v_dim) for heads, k_dim, v_dim in shapes)


def cap_pages(num_pages: int, bytes_per_page: int, cache_mb: int) -> int:
    """Return `num_pages`, or the number that fits in `cache_mb` MiB if that is less; 0 MiB is no cap."""
    return min(num_pages, cache_mb * MIB // bytes_per_page) if cache_mb else num_pages


def create_cache(
    shapes: Sequence[KVShape],
    dtype: torch.dtype,
    device: torch.device,
    lengths: Sequence[int],
    num_pages: int,
    num_slots: int,
    cache_mb: int = 0,
    page_size: int = 0,
) -> PagedKVCache:
    """Return a cache for `num_slots` sequences at a time.

    lengths: the most positions of each sequence, longest first.
    num_pages: what any `num_slots` of the sequences need; `cache_mb` MiB cap it, 0 is no cap.
    UserError if the longest sequence does not fit, or if the memory is not available; it says how many would fit.
    """
    page_size = page_size or page_size_for(device)
    bytes_per_page = page_bytes(shapes, dtype, page_size)
    longest = -(-lengths[0] // page_size)
    num_pages = cap_pages(num_pages, bytes_per_page, cache_mb)
    if num_pages < longest:
        raise UserError(
            f"sampling.cache_mb: {cache_mb} MiB hold 0 rows: one of {lengths[0]} tokens needs"
            f" {-(-longest * bytes_per_page // MIB)} MiB of keys and values; raise sampling.cache_mb, or lower"
            " sampling.max_new_tokens or data.max_prompt_tokens"
        )
    available = available_bytes(device)
    try:
        if available is not None and num_pages * bytes_per_page > available:
            raise MemoryError
        return PagedKVCache(shapes, dtype, device, num_pages, num_slots, longest, page_size)
    except (MemoryError, RuntimeError) as error:  # torch's out of memory is a RuntimeError
        fit = 0 if available is None else available // (longest * bytes_per_page)
        raise UserError(
            f"rollout: {min(num_slots, len(lengths))} rows of up to {lengths[0]} tokens need"
            f" {-(-num_pages * bytes_per_page // MIB)} MiB of keys and values, and {device.type} has"
            f" {(available or 0) // MIB} MiB left: {fit} rows fit; lower sampling.batch or set sampling.cache_mb, or"
            " lower sampling.max_new_tokens or data.max_prompt_tokens"
        ) from error


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on `device`, or None if the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        return None
