"""A generate loop over transformers' own KV cache: slow, but right for every architecture that transformers can decode.

The prompts of a batch are padded on the left, in this file only. Finished rows leave the batch. The forward pass may
round differently in another batch, in float32 by about 1e-6 nats.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.response_buffer import ProgressCallback, ResponseBuffer, TokenSample
from rlhf_fast.rollout.sampler import Sampler
from rlhf_fast.rollout.stop_criteria import StopCriteria

COMPACT_BELOW = 0.75
"""Finished rows are removed once at most this share of the rows is running. Removal copies the cache."""


def generate(
    model: Model,
    sampler: Sampler,
    stop_criteria: StopCriteria,
    cfg: SamplingConfig,
    buffer: ResponseBuffer,
    progress: ProgressCallback | None = None,
) -> None:
    """Generate all responses of `buffer`, `cfg.batch` at a time, shortest prompts first."""
    requests = buffer.requests
    stop_criteria.reset(requests.num_responses)
    prompt_lengths = [len(requests.prompts[i]) for i in requests.prompt_index]
    order = sorted(range(requests.num_responses), key=lambda response: prompt_lengths[response])
    for start in range(0, len(order), cfg.batch):
        responses = np.array(order[start : start + cfg.batch])
        _generate_batch(model, sampler, stop_criteria, cfg, buffer, responses, progress)


def _generate_batch(
    model: Model,
    sampler: Sampler,
    stop_criteria: StopCriteria,
    cfg: SamplingConfig,
    buffer: ResponseBuffer,
    responses: np.ndarray,
    progress: ProgressCallback | None,
) -> None:
    """Generate `responses` (n,). Finished ones may stay in the batch for some steps; their tokens are not stored."""
    requests = buffer.requests
    batch = _Batch(model, [requests.prompts[requests.prompt_index[response]] for response in responses])
    running = np.ones(len(responses), dtype=bool)
    for step in range(cfg.max_new_tokens):
        steps = np.full(len(responses), step)
        row_ids = torch.from_numpy(requests.row_ids[responses]).to(model.device)
        sample = sampler(batch.last_hidden, row_ids, torch.full_like(row_ids, step), steps)
        index = torch.from_numpy(running.nonzero()[0]).to(model.device)
        tokens = buffer.add(responses[running], steps[running], TokenSample(*(part[index] for part in sample)))
        stop = stop_criteria(tokens, responses[running], steps[running] + 1)
        num_finished = 0
        if stop is not None:
            finished, reasons = stop
            finished_rows = running.nonzero()[0][finished]
            buffer.finish(responses[finished_rows], steps[finished_rows] + 1, reasons[finished])
            running[finished_rows] = False
            num_finished = len(finished_rows)
        if progress is not None:
            progress(len(tokens), num_finished)
        if not running.any():
            return
        token = sample.token
        if running.sum() <= COMPACT_BELOW * len(responses):
            keep = torch.from_numpy(running.nonzero()[0]).to(model.device)
            batch.select(keep)
            responses, token, running = responses[running], token[keep], running[running]
        batch.append(token.clamp_min(0))


class _Batch:
    """Rows that are being decoded: transformers' cache, and the hidden states that predict the next tokens."""

    def __init__(self, model: Model, prompts: list[list[int]]):
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.decoder.forward).parameters
        self.cache: Any = None
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        width = max(map(len, distinct))
        tokens = torch.zeros(len(distinct), width, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(distinct):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self.mask = mask.to(model.device)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        self.last_hidden = self._forward(tokens.to(model.device), positions)
        self.positions = positions[:, -1]
        index = [distinct[tuple(prompt)] for prompt in prompts]
        if index != list(range(len(distinct))):
            self.select(torch.tensor(index, device=model.device))

    def select(self, index: Tensor) -> None:
        """Keep rows `index` as the batch; a row may be kept several times."""
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]
        self.positions = self.positions[index]
        self.last_hidden = self.last_hidden[index]

    def append(self, token: Tensor) -> None:
        """Append a token (B,) to each row, and run the model on it."""
        self.positions = self.positions + 1
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.last_hidden = self._forward(token[:, None], self.positions[:, None])

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        kwargs = {"position_ids": positions} if self.takes_positions else {}
        output = self.model.run_decoder(
            input_ids=tokens, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **kwargs
        )
        self.cache = getattr(output, "past_key_values", None)
        if self.cache is None:
            raise UserError(f"{self.model.name}: its decoder keeps no KV cache, so responses cannot be sampled from it")
        return output.last_hidden_state[:, -1]
