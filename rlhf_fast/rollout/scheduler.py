"""Which responses run: a queue, slots, and one forward pass a step over exactly the rows that are alive.

Responses wait longest prompt first, those of one prompt together. A prompt is read once, packed with others into calls
of at most PREFILL tokens; its samples share its full pages, and copy the last one if another row
writes on it. A row that is over leaves the next step, gives its pages back, and once an eighth of the slots is empty
the queue fills them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.rollout.decoder import Decoder, Packed
from rlhf_fast.rollout.kv_cache import Arena
from rlhf_fast.rollout.response_buffer import Progress, Record, Rows
from rlhf_fast.rollout.sampler import Draw
from rlhf_fast.rollout.stop_criteria import Stops

PREFILL = 2048
"""Prompt tokens of one forward pass."""
REFILL = 8
"""The queue is asked once this part of the slots is empty."""


@dataclass
class _Group:
    """The responses to one prompt."""

    prompt: list[int]
    left: int
    """Responses that have not started."""
    pages: list[int] = field(default_factory=list)
    """Those of the prompt, once it is read; held as long as responses are left. One row at a time writes behind the
    prompt on the last of them."""
    last: Tensor | None = None
    """(D,) the hidden state of the prompt's last token."""


def positions_of(rows: Rows, cfg: SamplingConfig) -> list[int]:
    """The cache positions that each response needs at the most: its last token is never read."""
    return [len(rows.prompts[i]) + cfg.max_new_tokens - 1 for i in rows.which]


def most_pages(rows: Rows, cfg: SamplingConfig, page: int) -> int:
    """Pages that `cfg.batch` responses at a time can hold, whichever they are."""
    cost = []
    for prompt, group in zip(rows.prompts, rows.groups(), strict=True):
        whole, own = -(-(len(prompt) + cfg.max_new_tokens - 1) // page), len(prompt) // page
        # the first response brings the prompt's pages along
        cost += [whole] + [whole - own] * (len(group) - 1)
    return sum(sorted(cost, reverse=True)[: cfg.batch])


class Schedule:
    """One rollout of `rows` into `record`."""

    def __init__(
        self, decoder: Decoder, arena: Arena, draw: Draw, stops: Stops, cfg: SamplingConfig, record: Record,
        progress: Progress | None = None,
    ):  # fmt: skip
        self.decoder, self.arena, self.draw, self.stops, self.cfg = decoder, arena, draw, stops, cfg
        self.record, self.progress, self.ids = record, progress, record.rows.ids
        rows, self.device = record.rows, arena.memory.device
        members = rows.groups()
        order = sorted(range(len(members)), key=lambda i: -len(rows.prompts[i]))
        groups = [_Group(prompt, len(group)) for prompt, group in zip(rows.prompts, members, strict=True)]
        self.queue = deque((row, groups[i]) for i in order for row in members[i])
        self.free_slots = list(range(arena.slots - 1, -1, -1))
        self.pages: dict[int, list[int]] = {}
        """Of each occupied slot."""
        self._set(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))
        self.tokens = torch.zeros(0, dtype=torch.int64, device=self.device)

    def run(self) -> None:
        """Every response to its end; afterwards nobody holds a page."""
        self.stops.begin(len(self.ids))
        while len(self.rows) or self.queue:
            hidden = [self._decode()] if len(self.rows) else []
            if self.queue and len(self.free_slots) * REFILL >= self.arena.slots:
                hidden += self._admit()
            if not hidden:
                raise RuntimeError(
                    f"Schedule: no response runs, and the next of {len(self.queue)} has no room in"
                    f" {self.arena.free} free of {self.arena.pages} pages and {len(self.free_slots)} slots"
                )
            self._step(hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        if self.arena.free != self.arena.pages:
            raise RuntimeError(f"Schedule: {self.arena.pages - self.arena.free} pages were not given back")

    def _set(self, rows: np.ndarray, steps: np.ndarray, positions: np.ndarray, slots: np.ndarray) -> None:
        """The n rows that are alive: which responses, tokens drawn, positions of the newest token, slots; and what of
        it the device needs."""
        self.rows, self.steps, self.positions, self.slots = rows, steps, positions, slots
        self.on_device = [torch.tensor(x, device=self.device) for x in (self.ids[rows], steps, positions, slots)]

    def _decode(self) -> Tensor:
        _, _, positions, slots = self.on_device
        return self.decoder.hidden(self.arena, Packed(self.tokens, positions, slots, self.arena.block_table))

    def _step(self, hidden: Tensor) -> None:
        """A token for each row that is alive."""
        ids, steps, positions, _ = self.on_device
        slots = self.steps.copy()
        drawn = self.draw(hidden, ids, steps, slots)
        tokens = self.record.add(self.rows, slots, drawn)
        self.tokens = drawn.token
        self.steps += 1
        self.positions += 1
        over = self.stops(tokens, self.rows, self.steps)
        if over is None:
            steps += 1
            positions += 1
        else:
            self._leave(*over)
        if self.progress is not None:
            self.progress(len(tokens), 0 if over is None else int(over[0].sum()))

    def _leave(self, over: np.ndarray, reasons: np.ndarray) -> None:
        """Rows `over` (n,) bool are done."""
        self.record.end(self.rows[over], self.steps[over], reasons[over])
        for slot in self.slots[over].tolist():
            self.arena.drop(self.pages.pop(slot))
            self.free_slots.append(slot)
        stay = ~over
        self.tokens = self.tokens[torch.from_numpy(stay).to(self.device)]
        self._set(self.rows[stay], self.steps[stay], self.positions[stay], self.slots[stay])

    def _admit(self) -> list[Tensor]:
        """Starts responses while there are slots and pages: reads their prompts and appends the rows. Their last
        hidden states (n, D), as a list of one; an empty list if none has room."""
        arena, started, to_read = self.arena, [], []
        sources, targets = [], []
        while self.queue and self.free_slots:
            row, group = self.queue[0]
            prompt, page = len(group.prompt), arena.page
            count = arena.need(prompt + self.cfg.max_new_tokens - 1)
            shared = group.pages[: prompt // page]
            if prompt % page and group.pages and arena.holders(group.pages[-1]) == 1:  # the group: no row writes there
                shared = group.pages
            if count - len(shared) > arena.free:
                break
            self.queue.popleft()
            slot, own = self.free_slots.pop(), arena.take(count - len(shared))
            arena.hold(shared)
            if not group.pages:
                group.pages = own[: arena.need(prompt)]
                arena.hold(group.pages)
                to_read.append((slot, group))
            elif prompt % page and shared is not group.pages:
                sources.append(group.pages[-1])
                targets.append(own[0])
            self.pages[slot] = shared + own
            arena.seat(slot, self.pages[slot])
            group.left -= 1
            started.append((row, slot, group))
        self._read(to_read)
        arena.copy(sources, targets)
        if not started:
            return []
        hidden = torch.stack([group.last for _, _, group in started])
        for group in {id(group): group for _, _, group in started}.values():
            if not group.left:
                arena.drop(group.pages)
                group.last = None
        rows, slots = (np.array([entry[i] for entry in started]) for i in (0, 1))
        lengths = np.array([len(group.prompt) for _, _, group in started], dtype=np.int32)
        self._set(
            np.concatenate([self.rows, rows]), np.concatenate([self.steps, np.zeros_like(rows)]),
            np.concatenate([self.positions, lengths - 1]), np.concatenate([self.slots, slots.astype(np.int32)]),
        )  # fmt: skip
        return [hidden]

    def _read(self, prompts: list[tuple[int, _Group]]) -> None:
        """Puts the prompts into the arena, each in its slot, and notes their last hidden states."""
        if not prompts:
            return
        sizes = np.array([len(group.prompt) for _, group in prompts])
        tokens = torch.tensor([token for _, group in prompts for token in group.prompt], device=self.device)
        positions = torch.from_numpy(np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]))
        slots = torch.from_numpy(np.repeat(np.array([slot for slot, _ in prompts], dtype=np.int32), sizes))
        positions, slots, ends = positions.to(self.device), slots.to(self.device), sizes.cumsum() - 1
        last = []
        for start in range(0, len(tokens), PREFILL):
            stop = start + PREFILL
            wanted = torch.from_numpy(ends[(ends >= start) & (ends < stop)] - start).to(self.device)
            part = Packed(tokens[start:stop], positions[start:stop], slots[start:stop], self.arena.block_table, wanted)
            last.append(self.decoder.hidden(self.arena, part))
        for (_, group), hidden in zip(prompts, torch.cat(last), strict=True):
            group.last = hidden
