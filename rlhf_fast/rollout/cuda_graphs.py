"""The decode step as CUDA graphs: one launch for a whole step, where the ops of a small model take the host several
times longer to launch than the GPU to run.

    first step of a size    runs eagerly, and compiles what the ops need
    second step             is captured, and the graph replayed
    later steps             the graph is replayed

A graph holds the step from the newest tokens to the sampled ones, and advances the rows of the InputBatch in place.
So a step costs one launch, one copy of the results, and the transfer of n tokens to the host. There is a graph for
each bucket of batch sizes. A batch is padded to its bucket with rows that write nothing to the cache and attend to
nothing, and whose samples are dropped; but a product on a GPU may round differently for another number of rows.

A graph holds addresses: of the cache, the weights, the input batch. DecodeGraphs keeps those tensors alive and compares
them before each rollout (`fit`). `Rollout(keep_cache=True)` keeps graphs for the next rollout: an optimizer updates
weights in place. Without it, and for weights that are made for one rollout, such as sums with an adapter, each rollout
captures its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rlhf_fast.graph_capture import Recorder, recorder_for, report_failure
from rlhf_fast.rollout.decoder import Decoder, TokenBatch
from rlhf_fast.rollout.fused import FusedDecoder
from rlhf_fast.rollout.input_batch import InputBatch
from rlhf_fast.rollout.kv_cache import PagedKVCache
from rlhf_fast.rollout.op_step import OpStep
from rlhf_fast.rollout.response_buffer import TokenSample
from rlhf_fast.rollout.sampler import Sampler

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
BUCKET_STEP = 64
"""Larger buckets are its multiples."""
SAMPLE_BYTES = 8 + 4 * 4
"""A row's TokenSample takes this memory."""


def bucket_size(n: int) -> int:
    """Return the size to which a batch of n rows is padded."""
    return next((size for size in BUCKETS if size >= n), -(-n // BUCKET_STEP) * BUCKET_STEP)


def decode_graphs(
    decoder: Decoder, cache: PagedKVCache, sampler: Sampler, kept: DecodeGraphs | None
) -> DecodeGraphs | None:
    """Return graphs of the decoder's step over `cache`, `kept` if they fit, or None if it cannot be captured. Call it
    within `with decoder.session()`."""
    step = decoder.op_step(cache) if isinstance(decoder, FusedDecoder) else None
    if step is None:
        return None
    if kept is not None and kept.fit(step, sampler):
        return kept
    recorder = recorder_for(cache.memory.device)
    return None if recorder is None else DecodeGraphs(step, sampler, recorder)


class StaticStep:
    """The decode step on the rows of an input batch. All tensors that it reads stay where they are."""

    def __init__(self, step: OpStep, sampler: Sampler):
        self.step = step
        self.sampler = sampler
        self.input_batch = InputBatch(bucket_size(step.cache.num_slots), step.cache.memory.device)
        self.head = (sampler.model.head_weight, sampler.model.head_bias)

    def run(self, size: int, bans: bool) -> Tensor:
        """Sample a token for each of the first `size` rows, append it, and return the packed samples."""
        rows = self.input_batch.first(size)
        hidden = self.step(TokenBatch(rows.tokens, rows.positions, rows.slots, self.step.cache.block_table))
        sample = self.sampler.sample(hidden, rows.row_ids, rows.num_sampled, bans, rows.key)
        rows.advance(sample.token)
        parts = [sample.token, *(statistic.float() for statistic in sample[1:])]
        return torch.cat([part.view(torch.uint8) for part in parts])


class DecodeGraphs:
    """The graphs of one model over one cache, by bucket."""

    def __init__(self, step: OpStep, sampler: Sampler, recorder: Recorder):
        self.static = StaticStep(step, sampler)
        self.recorder = recorder
        self.failed = False
        """True after a capture that failed: all steps run eagerly."""
        self._key = _addresses(step, sampler)
        self._replays: dict[tuple[int, bool], Callable[[], Tensor] | None] = {}
        """By bucket and whether end tokens are banned; None after its first step."""

    @property
    def input_batch(self) -> InputBatch:
        return self.static.input_batch

    @property
    def num_graphs(self) -> int:
        return sum(replay is not None for replay in self._replays.values())

    def fit(self, step: OpStep, sampler: Sampler) -> bool:
        """Return whether a rollout with this step and sampler does what the graphs do."""
        return self._key == _addresses(step, sampler)

    def reads_parameters(self) -> bool:
        """Return whether all weights are the module's own, which have the same addresses in the next rollout."""
        module = self.static.sampler.model.module
        own = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}
        return all(x.data_ptr() in own for x in tree_leaves(self.static.step.weights) if isinstance(x, Tensor))

    def __call__(self, n: int, bans: bool) -> TokenSample:
        """Run a step of the first n rows of the input batch; bans: end tokens before min_new_tokens."""
        size = n if self.failed else bucket_size(n)
        key = (size, bans)
        if self.failed:
            return _unpack(self.static.run(size, bans), n)
        if key not in self._replays:
            self._replays[key] = None
            return _unpack(self.recorder.warm_up(lambda: self.static.run(size, bans)), n)
        replay = self._replays[key]
        if replay is None:
            try:
                replay = self._replays[key] = self.recorder.capture(lambda: self.static.run(size, bans))
            except RuntimeError as error:
                self._give_up(error)
                return self(n, bans)
        return _unpack(replay().clone(), n)

    def _give_up(self, error: RuntimeError) -> None:
        """Run all further steps eagerly, with one warning. UserError under RLHF_FAST_STRICT=1."""
        report_failure(f"{self.static.sampler.model.name}: the decode step", error)
        self.failed = True
        self._replays.clear()


def _addresses(step: OpStep, sampler: Sampler) -> tuple[Any, ...]:
    """Return all that a graph holds: addresses of tensors, and numbers."""
    model, cfg = sampler.model, sampler.cfg
    tensors = (step.weights, model.head_weight, model.head_bias)
    options = (cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.min_new_tokens)
    scales = (model.logit_scale, model.softcap)
    leaves = tree_leaves((tensors, options, scales, sampler.end_tokens))
    addresses = [(x.data_ptr(), x.dtype, x.shape) if isinstance(x, Tensor) else x for x in leaves]
    return (id(step.cache), *addresses)


def _unpack(packed: Tensor, n: int) -> TokenSample:
    """Return the samples of the first n rows."""
    size = len(packed) // SAMPLE_BYTES
    token, *statistics = packed.split([8 * size, *[4 * size] * 4])
    return TokenSample(token.view(torch.int64)[:n], *(x.view(torch.float32)[:n] for x in statistics))
