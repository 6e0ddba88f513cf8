"""The inputs of the decode step, one row for each running response, on the device.

They have fixed addresses, so a captured CUDA graph can read them, and they are one block of memory, so that one copy
brings them all to the device. That is needed only when responses start or finish: a step advances the rows in place.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The first n rows; all fields but `key` are (n,)."""

    key: Tensor
    """(1,) int64: the seed of the sampling noise."""
    tokens: Tensor
    """int64: the newest token of each response."""
    row_ids: Tensor
    """int64: keys of the responses' noise."""
    num_sampled: Tensor
    """int64: number of tokens sampled."""
    positions: Tensor
    """int32: position of the newest token; -1 in a row of padding."""
    slots: Tensor
    """int32: row of the block table."""

    def advance(self, tokens: Tensor) -> None:
        """Append the sampled `tokens` (n,) to the responses. A row of padding stays one."""
        self.tokens.copy_(tokens)
        self.num_sampled.add_(1)
        self.positions.add_(self.positions >= 0)


class InputBatch:
    """The rows of up to `capacity` responses, a number that is rounded up."""

    def __init__(self, capacity: int, device: torch.device):
        capacity = -(-capacity // 4) * 4  # each field begins at a multiple of 16 bytes
        num_bytes = 16 + 32 * capacity  # the key; of each row three int64 and two int32
        self._on_device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._on_host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._all = _fields(self._on_device, capacity)
        self._host_key, *self._host_rows = [field.numpy() for field in _fields(self._on_host, capacity)]
        self._host_positions = self._host_rows[3]
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def load(
        self,
        key: int,
        tokens: np.ndarray,
        row_ids: np.ndarray,
        num_sampled: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
    ) -> Inputs:
        """Set the rows, all (n,), and return them. The rows behind them become padding."""
        if self._copied is not None:
            self._copied.synchronize()  # an earlier copy may still read the memory on the host
        n = len(tokens)
        self._host_key[0] = key
        for field, values in zip(self._host_rows, (tokens, row_ids, num_sampled, positions, slots), strict=True):
            field[:n] = values
            field[n:] = 0
        self._host_positions[n:] = -1
        self._on_device.copy_(self._on_host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._on_device.device))  # not the current device's
        return self.first(n)

    def first(self, n: int) -> Inputs:
        """Return the first n rows."""
        return Inputs(self._all.key, *(field[:n] for field in self._all[1:]))


def _fields(memory: Tensor, capacity: int) -> Inputs:
    """Return views of the memory of a batch."""
    sizes = [16, *[8 * capacity] * 3, *[4 * capacity] * 2]
    dtypes = [torch.int64] * 4 + [torch.int32] * 2
    key, *rows = (part.view(dtype) for part, dtype in zip(memory.split(sizes), dtypes, strict=True))
    return Inputs(key[:1], *rows)
