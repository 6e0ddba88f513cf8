"""Memory and disk that a training run takes, from the sizes of its models and batches. Only arithmetic.

Memory is what lies there throughout (weights, masters, moments, averages, gradients) and the largest of what comes and
goes: a micro-batch's activations, or a rollout's keys and values. docs/running.md has the bytes of a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

GIB, MIB = 2**30, 2**20
WARM_UP = 100 * MIB
"""Bytes that the libraries load and allocate at their first use."""
HEAD_LOGITS, HEAD_KEPT = 36 * MIB, 128 * MIB
"""Logits and exponentials that the fused heads hold (kernels/_cpu_head.py)."""
PREFILL_TOKENS = 2048
"""Tokens of a pass over prompts on a CPU (rollout/prefill.py)."""
ROW_BYTES = 44
"""Bytes of a token in a data set: a Python integer, its place in a list, and its share of the text."""
MIN_MICRO_BATCH = 64
"""Smallest optim.micro_batch_tokens that is proposed."""
SMALL_RANK = 8
"""lora.rank that is proposed."""


class ModelSize(NamedTuple):
    """Sizes of a model, in numbers."""

    params: int
    """In memory."""
    trained: int
    """Number of them that get a gradient."""
    itemsize: int
    """Bytes of a weight."""
    layers: int
    hidden: int
    """Width of the residual stream."""
    inner: int
    """Width inside the MLP."""
    heads: int
    """Width of all queries."""
    kv: int
    """Width of all keys."""
    vocab: int
    adapters: bool = False
    checkpointing: bool = False
    packed: bool = True
    """Our own layers run."""

    @property
    def weights(self) -> int:
        return self.params * self.itemsize

    @property
    def masters(self) -> int:
        """Bytes of the float32 copies that are trained; adapters and float32 weights need none."""
        return 0 if self.itemsize == 4 or self.adapters else 4 * self.trained

    def activations(self, tokens: int, dropout: bool = False) -> int:
        """Return the bytes that a forward pass of `tokens` keeps for its backward pass, which adds one layer's own."""
        D, F, H, K = self.hidden, self.inner, self.heads, self.kv
        if not self.packed:  # norms in float32, keys and values of each query's head
            numbers = 9 * D + 4 * F + 8 * H
        elif self.adapters or dropout:  # by autograd, op by op
            numbers = 6 * D + 4 * F + 4 * H + 4 * K
        else:
            numbers = 4 * D + 3 * F + 3 * H + 3 * K
        if self.adapters:  # in float32: their products, and their inputs where those are not
            own = 2 * (D + F + H + K) + (0 if self.itemsize == 4 else 2 * D + H + F)
            numbers += own * 4 // self.itemsize
        kept = numbers + (self.layers - 1) * (D if self.checkpointing else numbers)
        return tokens * (kept + 3 * F + 4 * D) * self.itemsize

    def head(self, tokens: int) -> int:
        """Return the bytes of the output embedding's logits."""
        size = tokens * self.vocab
        return min(4 * size, HEAD_LOGITS) + (0 if self.itemsize == 4 else min(2 * size, HEAD_KEPT))

    def cache(self, positions: int) -> int:
        """Return the bytes of the keys and values of so many positions."""
        return positions * 2 * self.layers * self.kv * self.itemsize

    def with_adapters(self, rank: int) -> ModelSize:
        """Return the sizes with adapters of `rank` at every linear layer."""
        D, F, H, K = self.hidden, self.inner, self.heads, self.kv
        trained = self.layers * rank * (2 * (D + H) + 2 * (D + K) + 3 * (D + F))
        return self._replace(adapters=True, trained=trained, params=self.params + trained * 4 // self.itemsize)


@dataclass(frozen=True)
class Knobs:
    """The settings that a run which does not fit can lower."""

    micro_batch_tokens: int
    slots: int = 0
    """sampling.batch; 0 = the stage does not sample."""
    cache_mb: int = 0
    checkpointing: bool = False
    bfloat16: bool = False
    rank: int = 0
    """Rank of adapters that the models as they are do not have."""


@dataclass(frozen=True)
class Work:
    """A run's models and batches."""

    base: int
    """Bytes of the process before it has read a model."""
    trained: tuple[ModelSize, ...]
    """The model that learns, or policy and value model."""
    frozen: tuple[ModelSize, ...] = ()
    step_tokens: int = 0
    """Tokens of the largest optimizer step."""
    longest: int = 1
    """Tokens that one forward pass must take: of a row, or of all responses to a prompt."""
    rows_tokens: int = 0
    """Tokens of the data sets."""
    ema: bool = False
    dropout: bool = False
    prompts: tuple[int, ...] = ()
    """Lengths of the longest prompts that are answered at a time, longest first; () if the stage does not sample."""
    new_tokens: int = 0
    page: int = 32
    """Positions of a page of keys and values."""
    on_gpu: bool = False
    may_adapt: bool = True
    """Adapters are allowed."""

    def with_knobs(self, knobs: Knobs) -> Work:
        """Return the work with the models that these settings give."""

        def changed(size: ModelSize, is_trained: bool) -> ModelSize:
            if knobs.bfloat16:
                size = size._replace(itemsize=min(size.itemsize, 2))
            if is_trained and knobs.rank:
                size = size.with_adapters(knobs.rank)
            return size._replace(checkpointing=size.checkpointing or (knobs.checkpointing and is_trained))

        trained = tuple(changed(size, True) for size in self.trained)
        return replace(self, trained=trained, frozen=tuple(changed(size, False) for size in self.frozen))


def memory_needed(work: Work, knobs: Knobs) -> int:
    """Return the peak of a run's memory in bytes."""
    work = work.with_knobs(knobs)
    total = 0 if work.on_gpu else work.base + WARM_UP + work.rows_tokens * ROW_BYTES
    total += sum(size.weights for size in work.frozen)
    tokens = min(work.step_tokens, max(knobs.micro_batch_tokens, work.longest))
    gradients = passes = read_again = 0
    for number, size in enumerate(work.trained):
        total += size.weights + size.masters + 8 * size.trained
        total += 4 * size.trained if work.ema and number == 0 else 0
        # a bfloat16 gradient of the only backward pass stays as it is; policy and value model take turns
        in_bfloat16 = size.masters and tokens >= work.step_tokens and not work.on_gpu
        gradients = max(gradients, (2 if in_bfloat16 else 4) * size.trained)
        passes = max(passes, size.activations(tokens, work.dropout) + size.head(tokens))
        read_again = max(read_again, size.weights)  # the saved folder is compared with the model at the end
    for size in work.frozen:  # without gradients: one layer at a time
        passes = max(passes, size._replace(checkpointing=True, layers=1).activations(tokens) + size.head(tokens))
    if work.prompts:  # CUDA graphs hold the activations of training meanwhile
        rollout = _rollout(work, knobs)
        passes = passes + rollout if work.on_gpu else max(passes, rollout)
    return total + gradients + passes + (0 if work.on_gpu else read_again)


def cache_needed(work: Work, slots: int) -> int:
    """Return the bytes of the keys and values of `slots` responses."""
    pages = sum(-(-(length + work.new_tokens - 1) // work.page) for length in work.prompts[:slots])
    return work.trained[0].cache(pages * work.page)


def _rollout(work: Work, knobs: Knobs) -> int:
    policy = work.trained[0]
    cache = cache_needed(work, knobs.slots)
    cache = min(cache, knobs.cache_mb * MIB) if knobs.cache_mb else cache
    prefill = min(sum(work.prompts[: knobs.slots]), max(PREFILL_TOKENS, work.prompts[0]))
    merged = 4 * (policy.params - policy.trained) if policy.adapters else 0  # float32 sums
    one_layer = policy._replace(checkpointing=True, layers=1)
    return cache + merged + one_layer.activations(prefill) + policy.head(knobs.slots)


def smaller(work: Work, knobs: Knobs) -> Iterator[Knobs]:
    """Yield settings that need less memory, those first that change least: one at a time, then several together."""
    micro = [max(MIN_MICRO_BATCH, work.longest)]
    start = min(knobs.micro_batch_tokens, work.step_tokens)
    sizes = [2**n for n in range(20, 5, -1) if micro[0] < 2**n < start] + [m for m in micro if m < start]
    yield from (replace(knobs, micro_batch_tokens=size) for size in sizes)
    caches: list[Knobs] = []
    if knobs.slots:
        one, now = cache_needed(work, 1), cache_needed(work, knobs.slots)
        now = min(now, knobs.cache_mb * MIB) if knobs.cache_mb else now
        mib = [2**n for n in range(20, 3, -1) if one <= 2**n * MIB < now]
        caches = [replace(knobs, cache_mb=size) for size in mib]
        yield from caches
        yield from (replace(caches[-1], micro_batch_tokens=size) for size in sizes if caches)
    smallest = replace(caches[-1] if caches else knobs, micro_batch_tokens=sizes[-1] if sizes else start)
    adapters = any(size.adapters for size in work.trained) or not work.may_adapt
    half = any(size.itemsize == 4 for size in (*work.trained, *work.frozen))
    checkpoints = not all(size.checkpointing for size in work.trained)
    for first in (knobs, smallest):
        if checkpoints:
            yield replace(first, checkpointing=True)
        if half:
            yield replace(first, bfloat16=True)
        if not adapters:
            yield replace(first, rank=SMALL_RANK)
    yield replace(smallest, checkpointing=checkpoints, bfloat16=half, rank=0 if adapters else SMALL_RANK)


class Disk(NamedTuple):
    """Bytes of a run's folder."""

    running: int
    after: int


def disk_needed(checkpoint: int, saved: int, best: int, keep: int, written: int) -> Disk:
    """Return the bytes of a run's folder while it runs, at their most, and when it is finished.

    checkpoint: of one. saved: of the finished models. best: of the weights that are kept to select from, or 0. written:
    checkpoints that the run writes; `keep` of them stay, and another exists while it is written.
    """
    checkpoints = checkpoint * min(keep + 1, max(written, 1))
    at_the_end = checkpoint * min(keep, max(written, 1)) + best + saved
    return Disk(max(checkpoints + 2 * best, at_the_end), saved)


def gib(size: float) -> str:
    """Return bytes as GiB with two digits that matter, such as 0.05 GiB, 3.1 GiB or 139 GiB."""
    return f"{size_in_gib(size)} GiB"


def size_in_gib(size: float) -> str:
    value = size / GIB
    if 0 < value < 0.005:
        return "under 0.01"
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 99.5 else f"{value:,.0f}"


def count(number: float) -> str:
    """Return a number of tokens as people write it: 940, 11.2k, 1.2M."""
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M"), (math.inf, "B")):
        if number < 0.9995 * limit:
            value = number / (limit / 1e3 if limit < math.inf else 1e9)
            return f"{value:.0f}{unit}" if value >= 100 or not unit else f"{value:.1f}{unit}"
    raise ValueError(number)


def duration(seconds: float) -> str:
    """Return a time with the two digits that an estimate has: 40 s, 12 min, 3.5 h, 4.2 days."""
    for limit, size, unit in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h"), (math.inf, 86_400, "days")):
        if seconds < limit:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 10 or size == 1 else f"{value:.1f} {unit}"
    return "forever"


def sizes_up_to(largest: int) -> Sequence[int]:
    """Return 1, 2, 4, ... and `largest`."""
    return [*(2**n for n in range(largest.bit_length()) if 2**n < largest), largest]
