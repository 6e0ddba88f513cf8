"""Packing: several short rows in one, so that a forward pass computes little padding.

Positions start again at 0 with each row. From them transformers builds a block-diagonal causal mask, so that packed
rows do not see one another.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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
