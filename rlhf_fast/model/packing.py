"""Packing: the rows of a batch without padding, end to end.

`pack_rows` lays them out for our own decoder (model/packed_decoder.py), with prompts that several rows share once.
`pack` lays them out for transformers' modules: several short rows in one. Positions start again at 0 with each row;
from them transformers builds a block-diagonal causal mask, so that packed rows do not see one another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.batches import shared_prompts

PADDING_LENGTH = 64
"""Tokens of a sequence of padding: short ones cost attention little."""


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on `device`. A GPU's earlier work is not waited for."""
    if device.type == "cuda" and x.is_cpu:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class PackedRows(NamedTuple):
    """N tokens of S sequences that hold the B rows of a batch.

    A row is one sequence, or two: a prompt that several rows share, which is computed once, and the rest of the row,
    whose tokens also see that prompt.
    """

    tokens: Tensor
    """(N,)"""
    positions: Tensor
    """(N,) of each token in its row."""
    offsets: Tensor
    """(S + 1,) of each sequence's first token; the last is N."""
    parents: Tensor | None
    """(S,) the sequence that this one's tokens see before their own, or -1. None = all are -1."""
    shared_lengths: Tensor
    """(B,) tokens of a row that are in the shared sequence; 0 = none."""
    shared_starts: Tensor
    """(B,) index of the first of them in `tokens`."""
    own_starts: Tensor
    """(B,) index of the row's other tokens in `tokens`."""
    attends: Tensor | None = None
    """(N,) 0 for tokens whose attention is 0, else 1: of padding that nothing visible precedes. None = all are 1."""

    def to(self, device: torch.device) -> PackedRows:
        """Return the rows with what a forward pass reads on `device`, by one transfer."""
        if self.tokens.device == device:
            return self
        return self.with_flat(to_device(self.flat(), device))

    def flat(self) -> Tensor:
        """Return what a forward pass reads, end to end."""
        return torch.cat([getattr(self, name) for name in self._read])

    def with_flat(self, flat: Tensor) -> PackedRows:
        """Return the rows with parts of `flat`, of the size of `flat()`, in the place of what a forward pass reads."""
        parts = flat.split([len(getattr(self, name)) for name in self._read])
        return self._replace(**dict(zip(self._read, parts, strict=True)))

    @property
    def _read(self) -> tuple[str, ...]:
        optional = [name for name in ("parents", "attends") if getattr(self, name) is not None]
        return ("tokens", "positions", "offsets", *optional)

    def locate(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return where in `tokens` the tokens at `columns` of `rows` are, all three (n,)."""
        shared = self.shared_lengths[rows]
        own = self.own_starts[rows] + columns - shared
        return torch.where(columns < shared, self.shared_starts[rows] + columns, own)


def pack_rows(tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor | None = None) -> PackedRows:
    """Pack rows (B, T) of the given lengths (B,), all on the CPU. prompt_lengths (B,): rows with equal prompts share
    them, unless they are a single token; None = no row shares a token."""
    num_rows = len(lengths)
    sizes = lengths.tolist()
    prompt_sizes = [0] * num_rows if prompt_lengths is None else prompt_lengths.tolist()
    first_of = {} if prompt_lengths is None else shared_prompts(tokens, prompt_lengths)
    columns: list[tuple[int, int, int]] = []  # of each sequence: its row, and the first and last column in it
    parents: list[int] = []
    shared_sequence: dict[int, int] = {}  # first row of a group -> its prompt's sequence
    own_sequence: list[int] = []
    for row in range(num_rows):
        parent, start = -1, 0
        if row in first_of:
            start = prompt_sizes[row]
            if first_of[row] == row:
                shared_sequence[row] = len(columns)
                columns.append((row, 0, start))
                parents.append(-1)
            parent = shared_sequence[first_of[row]]
        own_sequence.append(len(columns))
        columns.append((row, start, sizes[row]))
        parents.append(parent)
    width = tokens.shape[1]
    ranges = [torch.arange(row * width + start, row * width + end) for row, start, end in columns]
    source = torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)
    offsets = torch.tensor([0, *(end - start for _, start, end in columns)]).cumsum(0)
    shared = torch.tensor([shared_sequence[first_of[row]] if row in first_of else 0 for row in range(num_rows)])
    is_shared = torch.tensor([row in first_of for row in range(num_rows)], dtype=torch.bool)
    return PackedRows(
        tokens=tokens.reshape(-1)[source],
        positions=source % max(width, 1),
        offsets=offsets,
        parents=torch.tensor(parents) if first_of else None,
        shared_lengths=torch.tensor(prompt_sizes, dtype=torch.int64) * is_shared,
        shared_starts=offsets[shared.long()],
        own_starts=offsets[torch.tensor(own_sequence, dtype=torch.int64)],
    )


def pack_sequences(
    tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
) -> tuple[PackedRows, Tensor | None]:
    """Pack the tokens (B, T) that `mask` (B, T) lets in, and return where in the flattened batch they are; None = all.

    positions (B, T) or (1, T): None = columns. Without a mask a row is split where they do not rise by 1, as
    transformers splits packed rows. Of padding before a row the last token is packed too, with an attention of 0, as
    torch's scaled_dot_product_attention gives it: it predicts the row's first token.
    """
    B, T = tokens.shape
    columns = torch.arange(T, device=tokens.device).expand(B, T)
    positions = columns if positions is None else positions.expand(B, T)
    begins, places, attends = columns == 0, None, None
    if mask is None:
        begins[:, 1:] |= positions.diff(dim=1) != 1
    elif not mask.all():
        visible = mask.bool()
        first = visible & (visible.cumsum(1) == 1)
        before = first.roll(-1, 1) & (columns < T - 1)
        begins, packed = first | before, visible | before
        places = packed.flatten().nonzero()[:, 0]
        attends = visible.flatten()[places].long() if before.any() else None
    flat = [x.reshape(-1) if places is None else x.reshape(-1)[places] for x in (tokens, positions, begins)]
    offsets = torch.cat([flat[2].nonzero()[:, 0], torch.tensor([len(flat[0])], device=tokens.device)])
    zeros = offsets.new_zeros(len(offsets) - 1)
    return PackedRows(flat[0], flat[1], offsets, None, zeros, zeros, offsets[:-1], attends), places


def pad(rows: PackedRows, num_tokens: int, num_sequences: int) -> PackedRows:
    """Return the rows followed by sequences of padding, to `num_tokens` tokens in `num_sequences` sequences. At least
    `padding_sequences` must be unused; those that are left are empty."""
    N, S = len(rows.tokens), len(rows.offsets) - 1
    unused = num_tokens - N
    zeros = rows.tokens.new_zeros(unused)  # also the positions, of which a model may have few
    ends = N + PADDING_LENGTH * torch.arange(1, num_sequences - S + 1)
    parents = rows.parents
    if parents is not None:
        parents = torch.cat([parents, parents.new_full((num_sequences - S,), -1)])
    return rows._replace(
        tokens=torch.cat([rows.tokens, zeros]),
        positions=torch.cat([rows.positions, zeros]),
        offsets=torch.cat([rows.offsets, ends.clamp_max(num_tokens)]),
        parents=parents,
    )


def padding_sequences(unused: int) -> int:
    """Return the number of sequences that `unused` tokens of padding are."""
    return -(-unused // PADDING_LENGTH)


class Packed(NamedTuple):
    """P packed rows of C tokens that hold the B rows of a batch."""

    tokens: Tensor
    """(P, C)"""
    positions: Tensor
    """(P, C)"""
    starts: Tensor
    """(B,) index of each row's first token in tokens.flatten()."""


def pack(tokens: Tensor, lengths: Tensor, capacity: int) -> Packed:
    """Pack rows (B, T) of the given lengths into rows of `capacity` tokens, by first-fit decreasing."""
    free: list[int] = []  # unused tokens of each packed row
    assigned = [(0, 0)] * len(lengths)  # packed row and offset of each row
    for row in sorted(range(len(lengths)), key=lambda row: -int(lengths[row])):
        length = int(lengths[row])
        target = next((i for i, unused in enumerate(free) if unused >= length), len(free))
        if target == len(free):
            free.append(capacity)
        assigned[row] = (target, capacity - free[target])
        free[target] -= length
    packed = torch.zeros(len(free), capacity, dtype=tokens.dtype)
    positions = torch.zeros(len(free), capacity, dtype=torch.int64)
    for row, (target, start) in enumerate(assigned):
        length = int(lengths[row])
        packed[target, start : start + length] = tokens[row, :length]
        positions[target, start : start + length] = torch.arange(length)
    starts = torch.tensor([target * capacity + start for target, start in assigned], dtype=torch.int64)
    return Packed(packed, positions, starts)
