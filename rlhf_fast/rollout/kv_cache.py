"""Paged memory for keys and values: one allocation, cut into pages of P positions that sequences take and give back.

A sequence's page m holds its positions m * P to m * P + P - 1, in all layers. Which page that is stands in the block
table, one row a slot. The samples of a prompt share its full pages, so pages count who holds them; a page that nobody
holds goes back to the free list. A row takes all the pages it may ever need when it starts: nothing runs out later.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_fast.errors import UserError

PAGE = {"cpu": 32, "cuda": 64}
"""Positions of a page, by device. On a CPU 32 to 128 read alike, 16 a tenth slower at 1024 positions; the smaller the
page, the less of a row's last one is empty."""
ALIGN = 128
"""Bytes: every layer's keys and values start at a multiple of it."""
MIB = 2**20


class KVShape(NamedTuple):
    """Of one layer's cache."""

    heads: int
    k_dim: int
    v_dim: int


class Overflow(RuntimeError):
    """More pages were asked for than are free; nothing was taken."""


def page_of(device: torch.device) -> int:
    """Positions of a page on `device`."""
    return PAGE.get(device.type, 64)


class Arena:
    """`k[layer]` (pages, heads, P, k_dim) and `v[layer]` (pages, heads, P, v_dim): contiguous views of one tensor.
    `block_table` (slots, width) int32; entries that no sequence has taken are 0."""

    def __init__(
        self, shapes: Sequence[KVShape], dtype: torch.dtype, device: torch.device, pages: int, slots: int, width: int,
        page: int = 0,
    ):  # fmt: skip
        self.shapes, self.dtype, self.page = list(shapes), dtype, page or page_of(device)
        self.pages, self.slots, self.width = pages, slots, width
        sizes = [pages * heads * self.page * dim for heads, *dims in self.shapes for dim in dims]
        unit = ALIGN // dtype.itemsize
        spans = [-(-size // unit) * unit for size in sizes]
        self.memory = torch.empty(sum(spans), dtype=dtype, device=device)
        blocks = [block[:size] for block, size in zip(self.memory.split(spans), sizes, strict=True)]
        views = iter(blocks)
        self.k, self.v = [], []
        for heads, k_dim, v_dim in self.shapes:
            self.k.append(next(views).view(pages, heads, self.page, k_dim))
            self.v.append(next(views).view(pages, heads, self.page, v_dim))
        self.block_table = torch.zeros(slots, width, dtype=torch.int32, device=device)
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def need(self, positions: int) -> int:
        """Pages that so many positions take."""
        return -(-positions // self.page)

    def take(self, count: int) -> list[int]:
        """So many free pages, held once each."""
        if count > len(self._free):
            raise Overflow(f"Arena: {count} pages asked for, {len(self._free)} of {self.pages} are free")
        taken = [self._free.pop() for _ in range(count)]
        for index in taken:
            self._holders[index] = 1
        return taken

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder for each of `pages`, which somebody holds already."""
        for index in pages:
            if not self._holders[index]:
                raise RuntimeError(f"Arena: page {index} is free and cannot be shared")
            self._holders[index] += 1

    def holders(self, index: int) -> int:
        """How many hold page `index`; 0 = it is free."""
        return self._holders[index]

    def drop(self, pages: Sequence[int]) -> None:
        """One holder less; a page without any is free, and its contents mean nothing from now on."""
        for index in pages:
            if not self._holders[index]:
                raise RuntimeError(f"Arena: page {index} is free already")
            self._holders[index] -= 1
            if not self._holders[index]:
                self._free.append(index)

    def seat(self, slot: int, pages: Sequence[int]) -> None:
        """The sequence in `slot` lives on `pages` from now on."""
        row = torch.zeros(self.width, dtype=torch.int32)
        row[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self.block_table[slot] = row.to(self.block_table.device)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Page sources[i] of every layer to targets[i]."""
        if not sources:
            return
        source, target = (torch.tensor(pages, device=self.memory.device) for pages in (sources, targets))
        for block in (*self.k, *self.v):
            block.index_copy_(0, target, block.index_select(0, source))


def page_bytes(shapes: Sequence[KVShape], dtype: torch.dtype, page: int) -> int:
    """Bytes of one page over all layers."""
    return page * dtype.itemsize * sum(heads * (k_dim + v_dim) for heads, k_dim, v_dim in shapes)


def affordable(shapes: Sequence[KVShape], dtype: torch.dtype, page: int, pages: int, cache_mb: int) -> int:
    """`pages`, or as many as `cache_mb` MiB hold if that is less; 0 MiB is no bound."""
    return min(pages, cache_mb * MIB // page_bytes(shapes, dtype, page)) if cache_mb else pages


def allocate(
    shapes: Sequence[KVShape], dtype: torch.dtype, device: torch.device,
    rows: Sequence[int], pages: int, slots: int, cache_mb: int = 0, page: int = 0,
) -> Arena:  # fmt: skip
    """An arena for `slots` rows at a time. `rows`: the most positions of each row that will ever run, longest first;
    `pages`: what `slots` of them need at the most; `cache_mb` caps it. UserError where not one row fits, or where the
    memory is not there: it says how many would fit."""
    page = page or page_of(device)
    unit, longest = page_bytes(shapes, dtype, page), -(-rows[0] // page)
    pages = affordable(shapes, dtype, page, pages, cache_mb)
    if pages < longest:
        raise UserError(
            f"sampling.cache_mb: {cache_mb} MiB hold 0 rows: one of {rows[0]} tokens needs"
            f" {-(-longest * unit // MIB)} MiB of keys and values; raise sampling.cache_mb, or lower"
            " sampling.max_new_tokens or data.max_prompt_tokens"
        )
    room = _room(device)
    try:
        if room is not None and pages * unit > room:
            raise MemoryError
        return Arena(shapes, dtype, device, pages, slots, longest, page)
    except (MemoryError, RuntimeError) as error:  # torch's out of memory is a RuntimeError
        fit = 0 if room is None else room // (longest * unit)
        raise UserError(
            f"rollout: {min(slots, len(rows))} rows of up to {rows[0]} tokens need {-(-pages * unit // MIB)} MiB of"
            f" keys and values, and {device.type} has {(room or 0) // MIB} MiB left: {fit} rows fit; lower"
            " sampling.batch or set sampling.cache_mb, or lower sampling.max_new_tokens or data.max_prompt_tokens"
        ) from error


def _room(device: torch.device) -> int | None:
    """Bytes that can still be taken on `device`; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        return None
