"""Several short rows end to end in one, so that a forward pass computes no padding. Positions start again at 0 with
each row, from which transformers builds a block-diagonal causal mask: rows do not see one another."""

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    tokens: Tensor
    """(P, C)"""
    positions: Tensor
    """(P, C)"""
    starts: Tensor
    """(B,) where each row begins in tokens.flatten()."""


def pack(tokens: Tensor, lengths: Tensor, capacity: int) -> Packed:
    """Rows (B, T) of the given lengths into rows of `capacity` tokens: longest first, each where there is room."""
    free, places = [], [(0, 0)] * len(lengths)
    for row in sorted(range(len(lengths)), key=lambda row: -int(lengths[row])):
        length = int(lengths[row])
        target = next((i for i, room in enumerate(free) if room >= length), len(free))
        if target == len(free):
            free.append(capacity)
        places[row] = (target, capacity - free[target])
        free[target] -= length
    packed = torch.zeros(len(free), capacity, dtype=tokens.dtype)
    positions = torch.zeros(len(free), capacity, dtype=torch.int64)
    for row, (target, start) in enumerate(places):
        length = int(lengths[row])
        packed[target, start : start + length] = tokens[row, :length]
        positions[target, start : start + length] = torch.arange(length)
    return Packed(packed, positions, torch.tensor([i * capacity + start for i, start in places], dtype=torch.int64))
