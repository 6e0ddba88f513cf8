"""Continuous batching over a PagedKVCache.

Each step runs one decode pass over the running responses, then prefill passes for new prompts, then one sampling call.
Where the decode step is a CUDA graph, it samples too, and the sampling call is for new prompts alone.

Requests wait in a queue, longest prompt first, those of one prompt together. A prompt is prefilled once, with others in
one pass. Its responses share its full pages, and prompts share those of a common prefix (rollout/prompt_groups.py). A
finished response releases its pages and leaves the batch; once MIN_FREE_FRACTION of the slots is free, waiting requests
are admitted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.rollout.cuda_graphs import DecodeGraphs
from rlhf_fast.rollout.decoder import Decoder, TokenBatch
from rlhf_fast.rollout.input_batch import InputBatch, Inputs
from rlhf_fast.rollout.kv_cache import PagedKVCache
from rlhf_fast.rollout.prefill import Segment, prefill
from rlhf_fast.rollout.prompt_groups import PromptGroup, waiting_queue
from rlhf_fast.rollout.response_buffer import ProgressCallback, Requests, ResponseBuffer, TokenSample
from rlhf_fast.rollout.sampler import Sampler
from rlhf_fast.rollout.stop_criteria import StopCriteria

MIN_FREE_FRACTION = 1 / 8
"""Requests are admitted when at least this share of the slots is free."""


class _Admitted(NamedTuple):
    """A response that starts in this step."""

    response: int
    slot: int
    group: PromptGroup
    num_computed: int
    """Tokens of its prompt whose keys and values other prompts have computed; all, if the group started before."""
    copy_on_write: tuple[int, int] | None
    """Source and target if the prompt's last page must be copied."""


class _Running(NamedTuple):
    """State of the n running responses on the host; all (n,)."""

    responses: np.ndarray
    """int64: index of the response."""
    num_sampled: np.ndarray
    """int64: number of tokens sampled."""
    positions: np.ndarray
    """int32: position of the newest token."""
    slots: np.ndarray
    """int32: row of the block table that the response holds."""
    tokens: np.ndarray
    """int64: the newest token; 0 before the first."""

    def select(self, keep: np.ndarray) -> _Running:
        return _Running(*(part[keep] for part in self))


def cache_lengths(requests: Requests, cfg: SamplingConfig) -> list[int]:
    """Return the most cache positions that each response needs. Its last token is never run through the model."""
    return [len(requests.prompts[i]) + cfg.max_new_tokens - 1 for i in requests.prompt_index]


def pages_needed(requests: Requests, cfg: SamplingConfig, page_size: int) -> int:
    """Return the most pages that any `cfg.batch` responses need at a time."""
    cost = []
    for prompt, responses in zip(requests.prompts, requests.responses_by_prompt(), strict=True):
        total = -(-(len(prompt) + cfg.max_new_tokens - 1) // page_size)
        shared = len(prompt) // page_size
        # the first response also allocates the pages that the others share
        cost += [total] + [total - shared] * (len(responses) - 1)
    return sum(sorted(cost, reverse=True)[: cfg.batch])


class Scheduler:
    """Runs the requests of `buffer`, and stores their tokens in it."""

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedKVCache,
        sampler: Sampler,
        stop_criteria: StopCriteria,
        cfg: SamplingConfig,
        buffer: ResponseBuffer,
        progress: ProgressCallback | None = None,
        graphs: DecodeGraphs | None = None,
    ):
        self.decoder = decoder
        self.cache = cache
        self.sampler = sampler
        self.stop_criteria = stop_criteria
        self.cfg = cfg
        self.buffer = buffer
        self.progress = progress
        self.graphs = graphs
        self.device = cache.memory.device
        self.waiting = waiting_queue(buffer.requests, cache.page_size, self.device)
        self.free_slots = list(range(cache.num_slots - 1, -1, -1))
        self.pages: dict[int, list[int]] = {}
        """The pages of each occupied slot."""
        self.input_batch = InputBatch(cache.num_slots, self.device) if graphs is None else graphs.input_batch
        empty, empty32 = np.zeros(0, np.int64), np.zeros(0, np.int32)
        self._set_running(_Running(empty, empty, empty32, empty32, empty))

    def run(self) -> None:
        """Generate all responses. Afterwards all pages are free."""
        self.stop_criteria.reset(self.buffer.requests.num_responses)
        while self.waiting or self.num_running:
            hidden, decoded = [], None
            # decode
            if self.num_running and self.graphs is not None:
                decoded = self._decode_and_sample(self.graphs)
            elif self.num_running:
                hidden.append(self._decode())
            # prefill
            if admitted := self._admit():
                hidden.append(self._prefill(admitted))
            if not hidden and decoded is None:
                raise RuntimeError(self._stuck_message())
            # sample
            tokens = self._sample(hidden, decoded)
            num_finished = self._retire_finished(tokens)
            if self.progress is not None:
                self.progress(len(tokens), num_finished)
        if self.cache.num_free_pages != self.cache.num_pages:
            raise RuntimeError(f"Scheduler: {self.cache.num_pages - self.cache.num_free_pages} pages were not released")

    @property
    def num_running(self) -> int:
        return len(self.running.responses)

    def _stuck_message(self) -> str:
        return (
            f"Scheduler: no response runs, and the next of {len(self.waiting)} does not fit in"
            f" {self.cache.num_free_pages} free of {self.cache.num_pages} pages and {len(self.free_slots)} slots"
        )

    def _set_running(self, running: _Running) -> None:
        """Set the running responses. Their state is copied to the device when it is next needed."""
        self.running = running
        self._inputs: Inputs | None = None

    def _device_inputs(self) -> Inputs:
        """Return the state of the running responses on the device."""
        if self._inputs is None:
            running = self.running
            row_ids = self.buffer.requests.row_ids[running.responses]
            self._inputs = self.input_batch.load(
                self.sampler.key, running.tokens, row_ids, running.num_sampled, running.positions, running.slots
            )
        return self._inputs

    def _decode(self) -> Tensor:
        """Run the newest token of each running response. Return the hidden states (n, D)."""
        inputs = self._device_inputs()
        batch = TokenBatch(inputs.tokens, inputs.positions, inputs.slots, self.cache.block_table)
        return self.decoder.hidden(self.cache, batch)

    def _decode_and_sample(self, graphs: DecodeGraphs) -> TokenSample:
        """Run the newest tokens and sample the next, which the graph appends on the device."""
        self._device_inputs()
        return graphs(self.num_running, self.sampler.needs_ban(self.running.num_sampled))

    def _admit(self) -> list[_Admitted]:
        """Start waiting requests as long as there are free slots and pages."""
        admitted: list[_Admitted] = []
        if len(self.free_slots) < MIN_FREE_FRACTION * self.cache.num_slots:
            return admitted
        while self.waiting and self.free_slots:
            response, group = self.waiting[0]
            shared, num_new = self._plan_pages(group)
            if num_new > self.cache.num_free_pages:
                break
            self.waiting.popleft()
            admitted.append(self._start(response, group, shared, num_new))
        if admitted:
            self.cache.assign_rows({a.slot: self.pages[a.slot] for a in admitted})
        return admitted

    def _plan_pages(self, group: PromptGroup) -> tuple[list[int], int]:
        """Return the pages that the group's next response shares, and how many new pages it needs.

        The first response shares the computed pages of its prompt's prefixes. Later ones share the prompt's full pages,
        and the last, partly filled one if only the group holds it, for then no running response writes to it.
        """
        if not group.pages:
            shared = group.computed_pages()
        elif self.cache.refcount(group.pages[-1]) == 1:
            shared = group.pages
        else:
            shared = group.pages[: len(group.prompt) // self.cache.page_size]
        total = self.cache.pages_for(len(group.prompt) + self.cfg.max_new_tokens - 1)
        return shared, total - len(shared)

    def _start(self, response: int, group: PromptGroup, shared: list[int], num_new: int) -> _Admitted:
        """Give `response` a slot, the `shared` pages and `num_new` new ones."""
        slot = self.free_slots.pop()
        new = self.cache.allocate(num_new)
        self.cache.incref(shared)
        self.pages[slot] = shared + new
        num_computed = len(group.prompt)
        copy_on_write = None
        if not group.pages:
            num_computed = len(shared) * self.cache.page_size
            group.pages = self.pages[slot][: self.cache.pages_for(len(group.prompt))]
            self.cache.incref(group.pages)
            group.keep_prefixes(self.cache, group.pages)
        elif len(shared) < len(group.pages):
            copy_on_write = (group.pages[-1], new[0])
        group.num_waiting -= 1
        return _Admitted(response, slot, group, num_computed, copy_on_write)

    def _prefill(self, admitted: list[_Admitted]) -> Tensor:
        """Run the prompts that are new, and append the admitted responses to the running ones. Return the hidden
        states (n, D) of their prompts' last tokens."""
        new = [a for a in admitted if a.num_computed < len(a.group.prompt)]
        # prompts from their start on, which have kernels of their own, and then those that read what others computed
        self._run_prompts([a for a in new if not a.num_computed])
        self._run_prompts([a for a in new if a.num_computed])
        copies = [a.copy_on_write for a in admitted if a.copy_on_write is not None]
        self.cache.copy_pages([source for source, _ in copies], [target for _, target in copies])
        hidden = torch.stack([a.group.last_hidden for a in admitted])
        for group in {id(a.group): a.group for a in admitted}.values():
            if not group.num_waiting:
                self.cache.release(group.pages)
        started = _Running(
            responses=np.array([a.response for a in admitted], dtype=np.int64),
            num_sampled=np.zeros(len(admitted), dtype=np.int64),
            positions=np.array([len(a.group.prompt) - 1 for a in admitted], dtype=np.int32),
            slots=np.array([a.slot for a in admitted], dtype=np.int32),
            tokens=np.zeros(len(admitted), dtype=np.int64),
        )
        self._set_running(_Running(*(np.concatenate(parts) for parts in zip(self.running, started, strict=True))))
        return hidden

    def _run_prompts(self, admitted: list[_Admitted]) -> None:
        """Run what is not computed of the prompts, and keep the hidden states of their last tokens."""
        if not admitted:
            return
        segments = [Segment(a.slot, a.num_computed, a.group.prompt[a.num_computed :]) for a in admitted]
        last = np.array([len(segment.tokens) for segment in segments]).cumsum() - 1
        for a, hidden in zip(admitted, prefill(self.decoder, self.cache, segments, last), strict=True):
            a.group.last_hidden = hidden

    def _sample(self, hidden: list[Tensor], decoded: TokenSample | None) -> np.ndarray:
        """Sample a token for each running response; the first ones may be in `decoded` already, and `hidden` is that of
        the others. Return the tokens (n,) on the host."""
        running = self.running
        num_sampled = running.num_sampled.copy()  # the buffer keeps it
        samples = [] if decoded is None else [decoded]
        inputs = self._device_inputs() if hidden else None
        if inputs is not None and decoded is None:
            samples.append(self.sampler(torch.cat(hidden), inputs.row_ids, inputs.num_sampled, num_sampled))
            inputs.advance(samples[0].token)
        elif inputs is not None and decoded is not None:
            rest = slice(len(decoded.token), None)
            # copies, because Triton compiles other code for memory that is not aligned
            row_ids, steps = inputs.row_ids[rest].clone(), inputs.num_sampled[rest].clone()
            samples.append(self.sampler(torch.cat(hidden), row_ids, steps, num_sampled[rest]))
            self._inputs = None  # `_device_inputs` has written the rows of `decoded` as they were before it
        sample = samples[0] if len(samples) == 1 else TokenSample(*map(torch.cat, zip(*samples, strict=True)))
        tokens = self.buffer.add(running.responses, num_sampled, sample)
        running.num_sampled[:] += 1
        running.positions[:] += 1
        running.tokens[:] = tokens
        return tokens

    def _retire_finished(self, tokens: np.ndarray) -> int:
        """Remove the responses that the newest `tokens` (n,) finish, and release their pages. Return their number."""
        stops = self.stop_criteria(tokens, self.running.responses, self.running.num_sampled)
        if stops is None:
            return 0
        self.buffer.finish(self.running.responses, self.running.num_sampled, stops)
        retired = self.running.select(stops.finished)
        for slot in retired.slots.tolist():
            self.cache.release(self.pages.pop(slot))
            self.free_slots.append(slot)
        self._set_running(self.running.select(~stops.finished))
        return len(retired.responses)
