"""Decoding over transformers' own KV cache: slower, and right for every architecture that transformers can decode.

Prompts of one chunk are padded on the left inside this file, and nowhere else. Rows that are over leave the batch.
The forward pass may round differently in other company, in float32 by about 1e-6 nats.
"""

from __future__ import annotations

import inspect

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.response_buffer import Progress, Record
from rlhf_fast.rollout.sampler import Draw
from rlhf_fast.rollout.stop_criteria import Stops

COMPACT = 0.75
"""Rows that are over are dropped once no more than this share is left: dropping copies the cache."""


def run(
    model: Model, draw: Draw, stops: Stops, cfg: SamplingConfig, record: Record, progress: Progress | None = None
) -> None:
    """Draws every response of `record`, `cfg.batch` at a time, shortest prompts first."""
    rows = record.rows
    stops.begin(len(rows.which))
    order = sorted(range(len(rows.which)), key=lambda row: len(rows.prompts[rows.which[row]]))
    for start in range(0, len(order), cfg.batch):
        _chunk(model, draw, stops, cfg, record, np.array(order[start : start + cfg.batch]), progress)


def _chunk(
    model: Model, draw: Draw, stops: Stops, cfg: SamplingConfig, record: Record, rows: np.ndarray,
    progress: Progress | None,
) -> None:  # fmt: skip
    """Responses `rows` to their ends. Rows that are over may stay in the batch for a while; nobody looks at them."""
    state = _Decoding(model, [record.rows.prompts[record.rows.which[row]] for row in rows])
    alive = np.ones(len(rows), dtype=bool)
    for slot in range(cfg.max_new_tokens):
        slots = np.full(len(rows), slot)
        ids = torch.from_numpy(record.rows.ids[rows]).to(model.device)
        drawn = draw(state.last, ids, torch.full_like(ids, slot), slots)
        index = torch.from_numpy(alive.nonzero()[0]).to(model.device)
        tokens = record.add(rows[alive], slots[alive], type(drawn)(*(part[index] for part in drawn)))
        over = stops(tokens, rows[alive], slots[alive] + 1)
        if over is not None:
            gone = alive.nonzero()[0][over[0]]
            record.end(rows[gone], slots[gone] + 1, over[1][over[0]])
            alive[gone] = False
        if progress is not None:
            progress(len(tokens), 0 if over is None else int(over[0].sum()))
        if not alive.any():
            return
        token = drawn.token
        if alive.sum() <= COMPACT * len(rows):
            left = torch.from_numpy(alive.nonzero()[0]).to(model.device)
            state.select(left)
            rows, token, alive = rows[alive], token[left], alive[alive]
        state.advance(token.clamp_min(0))


class _Decoding:
    """Rows in the middle of decoding: the cache, and the last layer's hidden state that predicts each next token."""

    def __init__(self, model: Model, tokens: list[list[int]]):
        self.model = model
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, tokens)))}
        unique = list(places)
        width = max(map(len, unique))
        ids = torch.zeros(len(unique), width, dtype=torch.int64)
        self.mask = torch.zeros_like(ids)
        for row, prompt in enumerate(unique):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, width - len(prompt) :] = 1
        ids, self.mask = ids.to(model.device), self.mask.to(model.device)
        self.takes_positions = "position_ids" in inspect.signature(model.decoder.forward).parameters
        self.cache = None
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        self._forward(ids, positions)
        self.positions = positions[:, -1]
        index = torch.tensor([places[tuple(prompt)] for prompt in tokens], device=model.device)
        if index.tolist() != list(range(len(unique))):
            self.select(index)

    def select(self, index: Tensor) -> None:
        """Rows `index` become the batch; a row may be taken several times."""
        self.cache.batch_select_indices(index)
        self.mask, self.positions, self.last = self.mask[index], self.positions[index], self.last[index]

    def advance(self, token: Tensor) -> None:
        """Appends a token (B,) to each row."""
        self.positions = self.positions + 1
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self._forward(token[:, None], self.positions[:, None])

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        arguments = {"position_ids": positions} if self.takes_positions else {}
        output = self.model.run_decoder(
            input_ids=ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **arguments
        )
        self.cache = getattr(output, "past_key_values", None)
        if self.cache is None:
            raise UserError(f"{self.model.name}: its decoder keeps no KV cache, so responses cannot be sampled from it")
        self.last = output.last_hidden_state[:, -1]
