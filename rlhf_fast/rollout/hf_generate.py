"""A generate loop over the model's own forward: slow, but right for every architecture that can be trained here.

rollout/hf_batch.py has what a batch is. Finished rows leave it. The forward pass may round differently in another
batch, in float32 by about 1e-6 nats.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.hf_batch import BatchKind
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
    kind: BatchKind,
    progress: ProgressCallback | None = None,
) -> None:
    """Generate all responses of `buffer`, at most `cfg.batch` at a time, shortest prompts first."""
    requests = buffer.requests
    stop_criteria.reset(requests.num_responses)
    lengths = np.array([len(requests.prompts[i]) for i in requests.prompt_index])
    for responses in _batches(lengths, cfg.batch, kind.one_length):
        _generate_batch(model, sampler, stop_criteria, cfg, buffer, responses, kind, progress)


def _batches(lengths: np.ndarray, size: int, one_length: bool) -> Iterator[np.ndarray]:
    """Yield the responses of each batch, given the lengths (B,) of their prompts."""
    order = lengths.argsort(kind="stable")
    parts = np.split(order, np.diff(lengths[order]).nonzero()[0] + 1) if one_length else [order]
    for part in parts:
        for start in range(0, len(part), size):
            yield part[start : start + size]


def _generate_batch(
    model: Model,
    sampler: Sampler,
    stop_criteria: StopCriteria,
    cfg: SamplingConfig,
    buffer: ResponseBuffer,
    responses: np.ndarray,
    kind: BatchKind,
    progress: ProgressCallback | None,
) -> None:
    """Generate `responses` (n,). Finished ones may stay in the batch for some steps; their tokens are not stored."""
    requests = buffer.requests
    batch = kind.make(model, [requests.prompts[requests.prompt_index[response]] for response in responses])
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
            buffer.finish(responses[running], steps[running] + 1, stop)
            finished_rows = running.nonzero()[0][stop.finished]
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
