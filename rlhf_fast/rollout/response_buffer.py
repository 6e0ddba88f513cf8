"""What a rollout is asked for, and what it has drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.batches import Prompts, Responses, pad_rows, response_mask
from rlhf_fast.errors import BadRows, UserError

Progress = Callable[[int, int], None]
"""Called after each step with the tokens it drew and the responses that it ended."""


class Rows(NamedTuple):
    """The B responses to draw, `samples` to each prompt, those of one prompt next to each other."""

    prompts: list[list[int]]
    """Different prompts: equal ones under several uids are read once."""
    which: list[int]
    """(B,) the prompt of each response."""
    uids: list[int]
    """(B,)"""
    ids: np.ndarray
    """(B,) int64: names the noise of each response."""

    @classmethod
    def of(cls, prompts: Prompts, samples: int) -> Rows:
        """UserError where there is nothing to draw, or where a response's number does not fit 64 bits."""
        if samples < 1:
            raise UserError(f"rollout: samples must be at least 1, not {samples}")
        wide = [uid for uid in prompts.ids if not -(2**63) <= uid * samples <= 2**63 - samples]
        if wide:
            raise BadRows(
                f"prompt {wide[0]}: its uid times {samples} samples does not fit 64 bits, and the noise of a response"
                " is named by such a number; give smaller uids",
                [("Responses", uid) for uid in wide],
            )
        place = {tokens: i for i, tokens in enumerate(dict.fromkeys(map(tuple, prompts.tokens)))}
        which = [place[tuple(tokens)] for tokens in prompts.tokens for _ in range(samples)]
        uids = [uid for uid in prompts.ids for _ in range(samples)]
        ids = np.array([uid * samples + k for uid in prompts.ids for k in range(samples)], dtype=np.int64)
        return cls([list(tokens) for tokens in place], which, uids, ids)

    def groups(self) -> list[list[int]]:
        """The responses to each of `prompts`."""
        groups: list[list[int]] = [[] for _ in self.prompts]
        for row, prompt in enumerate(self.which):
            groups[prompt].append(row)
        return groups


class Drawn(NamedTuple):
    """One token of each of n rows; all (n,), all but `token` float32 nats."""

    token: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor
    kept_logprobs: Tensor
    entropy: Tensor


class Record:
    """Every draw of a rollout, in the order of drawing, put into rows at the end."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.sizes = np.zeros(len(rows.which), dtype=np.int64)
        self.reasons = np.zeros(len(rows.which), dtype=np.uint8)
        self._where: list[tuple[np.ndarray, np.ndarray]] = []
        self._drawn: list[Drawn] = []

    def add(self, rows: np.ndarray, slots: np.ndarray, drawn: Drawn) -> np.ndarray:
        """Token `slots` (n,) of responses `rows` (n,); none of the three may change later. Returns the tokens on the
        host. BadRows where a model that has gone astray gave no token."""
        tokens = drawn.token.cpu().numpy()
        if tokens.min() < 0:
            bad = (tokens < 0).nonzero()[0]
            bad = bad[rows[bad].argsort()]
            uids = [self.rows.uids[row] for row in rows[bad].tolist()]
            raise BadRows(
                f"token {slots[bad[0]] + 1} of the response to prompt {uids[0]}: the model gives NaN or infinity; its"
                " weights have gone astray, go back to an earlier checkpoint with a lower learning rate",
                [("Responses", uid) for uid in uids],
            )
        self._where.append((rows, slots))
        self._drawn.append(drawn)
        return tokens

    def end(self, rows: np.ndarray, sizes: np.ndarray, reasons: np.ndarray) -> None:
        """Responses `rows` (n,) are over after `sizes` tokens."""
        self.sizes[rows], self.reasons[rows] = sizes, reasons

    def responses(self) -> Responses:
        """One right-padded batch on the CPU."""
        prompts = [self.rows.prompts[i] for i in self.rows.which]
        tokens, prompt_lengths = pad_rows(prompts)
        lengths = prompt_lengths + torch.from_numpy(self.sizes)
        mask = response_mask(prompt_lengths, lengths)
        tokens = torch.nn.functional.pad(tokens, (0, int(lengths.max()) - tokens.shape[1] if prompts else 0))
        numbers = torch.zeros(4, *mask.shape, dtype=torch.float32)
        if self._drawn:
            rows, slots = (torch.from_numpy(np.concatenate(part)) for part in zip(*self._where, strict=True))
            drawn = Drawn(*(torch.cat(part).cpu() for part in zip(*self._drawn, strict=True)))
            tokens[rows, prompt_lengths[rows] + slots] = drawn.token
            numbers[:, rows, slots] = torch.stack(drawn[1:])
        uids = torch.tensor(self.rows.uids, dtype=torch.int64)
        return Responses(
            tokens, prompt_lengths, lengths, mask, *numbers, reasons=torch.from_numpy(self.reasons), uids=uids
        )
