"""Log-probabilities of continuations: `Scorer(model)(requests) -> [Score, ...]`.

The input of a request is its context and its continuation without the last token. Inputs form a radix tree, and each
shared prefix is read once: a node's keys and values are in the pages of its parent and its own. Nodes of one level are
prefilled together, and only tokens that predict one of a continuation reach the head.

    requests   Q: ... A: | yes         Q: ... A: | no idea         another context | ...
    tree       [Q: ... A:] -> [no]     [another context ...]
    level      0              1        0
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.errors import UserError, shortened
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.choose import choose_decoder, require_model
from rlhf_fast.rollout.decoder import DecodePath, Decoder
from rlhf_fast.rollout.kv_cache import PAGE_SIZE, PagedKVCache, create_cache
from rlhf_fast.rollout.prefill import Segment, prefill
from rlhf_fast.rollout.prefix_tree import PrefixNode, build_prefix_tree, common_prefix

MAX_TOKENS = 4096
"""Tokens whose keys and values are in the cache at a time."""
PAGE_SIZES = PAGE_SIZE | {"cpu": 8}
"""Positions of a page, by device. Most nodes are short, and 8 to 32 take a CPU the same time."""
MIN_SHARED = 4
"""Shorter prefixes are read again: to copy the page in which they end takes longer."""
ROWS_PER_PASS = 16
"""Inputs of one padded forward pass of a model that no decoder serves."""

Request = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context and of its continuation, at least one of each."""
REQUEST = "pairs of token lists, (context, continuation)"


class Score(NamedTuple):
    """Log-probability of a continuation."""

    logprob: float
    """Sum over its tokens of log p(token | all before it), in nats."""
    greedy: bool
    """Each of its tokens has the largest logit."""
    num_tokens: int


class _Span(NamedTuple):
    """The continuation of one or several equal requests, after an input's first tokens."""

    context_length: int
    continuation: tuple[int, ...]
    requests: list[int]


class Scorer:
    """Scores continuations by `model` with the weights that it has at the call.

    decode_path: the decoder that runs the tokens (rollout/decoder.py); "auto" takes the fastest that serves the model.
        transformers: no cache, rows that are padded. By the path fused on a CPU the bits of a score do not depend on
        the other requests.
    max_tokens: tokens whose keys and values are in memory at a time. A longer input has a cache of its own.
    """

    def __init__(self, model: Model, *, decode_path: DecodePath = "auto", max_tokens: int = MAX_TOKENS):
        require_model("Scorer", model)
        if model.head != "lm":
            raise UserError(f"scoring: {model.name} has no language-model head, which log-probabilities need")
        self.model = model
        self.max_tokens = max_tokens
        self.tokens_read = 0
        """Tokens that went through the layers, over all calls."""
        self._decoder = choose_decoder(model, decode_path)

    @property
    def decode_path(self) -> str:
        """The path that runs: fused, attention or transformers."""
        return "transformers" if self._decoder is None else self._decoder.name

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        """Return the score of each request. Equal ones are computed once.

        UserError for a request without context or continuation, with a token that the model does not know, or with more
        tokens than the model has positions.
        """
        self._check(requests)
        spans = _spans_by_input(requests)
        scores: list[Score | None] = [None] * len(requests)
        with self.model.eval_mode(), self._session():
            for inputs in self._chunks(sorted(spans)):
                firsts = [min(span.context_length for span in spans[tokens]) - 1 for tokens in inputs]
                hidden, rows = self._hidden(inputs, firsts)
                found = [
                    (span, rows_of_input[span.context_length - 1 - first :])
                    for tokens, first, rows_of_input in zip(inputs, firsts, rows, strict=True)
                    for span in spans[tokens]
                ]
                flat = np.concatenate([predicting for _, predicting in found])
                for (span, _), score in zip(found, self._score(hidden, flat, [s for s, _ in found]), strict=True):
                    for request in span.requests:
                        scores[request] = score
        return [score for score in scores if score is not None]

    @contextmanager
    def _session(self) -> Iterator[None]:
        if self._decoder is None:
            yield
        else:
            with self._decoder.session():
                yield

    def _check(self, requests: Sequence[Request]) -> None:
        vocab_size, limit = self.model.num_rows, self.model.max_positions
        for i, request in enumerate(_listed(requests)):
            context, continuation = _as_pair(i, request)
            if not len(context) or not len(continuation):
                part = "continuation" if len(context) else "context"
                raise UserError(f"scoring: request {i} has no {part}; give it at least one token")
            tokens = (*context, *continuation)
            if min(tokens) < 0 or max(tokens) >= vocab_size:
                unknown = next(token for token in tokens if not 0 <= token < vocab_size)
                raise UserError(
                    f"scoring: request {i}: token {unknown} is not one of the model's {vocab_size}, 0 to"
                    f" {vocab_size - 1}; use the model's own tokenizer"
                )
            if limit and len(tokens) - 1 > limit:
                raise UserError(
                    f"scoring: request {i}: {len(tokens)} tokens are more than the model's {limit} positions and one;"
                    " shorten its context"
                )

    def _chunks(self, inputs: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Yield inputs that fit in the cache together, with what neighbours share counted once."""
        chunk: list[tuple[int, ...]] = []
        total = 0
        for tokens in inputs:
            new = len(tokens) - (common_prefix(chunk[-1], tokens) if chunk else 0)
            if chunk and total + new > self.max_tokens:
                yield chunk
                chunk, total, new = [], 0, len(tokens)
            chunk.append(tokens)
            total += new
        if chunk:
            yield chunk

    def _hidden(self, inputs: Sequence[tuple[int, ...]], firsts: Sequence[int]) -> tuple[Tensor, list[np.ndarray]]:
        """Return hidden states (n, D), as the head reads them, and for each input the rows of its tokens from position
        `first` on."""
        if self._decoder is None:
            return self._padded_hidden(inputs, firsts)
        return self._cached_hidden(self._decoder, inputs, firsts)

    def _padded_hidden(
        self, inputs: Sequence[tuple[int, ...]], firsts: Sequence[int]
    ) -> tuple[Tensor, list[np.ndarray]]:
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        hidden, rows, total = [], [np.zeros(0, np.int64)] * len(inputs), 0
        for start in range(0, len(order), ROWS_PER_PASS):
            part = order[start : start + ROWS_PER_PASS]
            lengths = [len(inputs[i]) for i in part]
            tokens = torch.zeros(len(part), max(lengths), dtype=torch.int64)
            for row, i in zip(tokens, part, strict=True):
                row[: len(inputs[i])] = torch.tensor(inputs[i])
            # no column more: a table of learned positions ends with the longest input
            states = self.model.hidden(tokens)
            hidden.append(torch.cat([found[firsts[i] : len(inputs[i])] for found, i in zip(states, part, strict=True)]))
            for i in part:
                count = len(inputs[i]) - firsts[i]
                rows[i] = np.arange(total, total + count)
                total += count
            self.tokens_read += sum(lengths)
        return self.model.for_head(torch.cat(hidden)), rows

    def _cached_hidden(
        self, decoder: Decoder, inputs: Sequence[tuple[int, ...]], firsts: Sequence[int]
    ) -> tuple[Tensor, list[np.ndarray]]:
        leaves = _leaves(inputs)
        first_of: dict[PrefixNode, int] = {}
        for leaf, first in zip(leaves, firsts, strict=True):
            for node in leaf.path():
                first_of[node] = min(first, first_of.get(node, first))
        levels: defaultdict[int, list[PrefixNode]] = defaultdict(list)
        for node in first_of:
            levels[node.level].append(node)
        cache, slots = _create_cache(decoder, self.model.device, list(first_of))
        hidden, row_of, total = [], {}, 0
        for level in sorted(levels):
            _allocate(cache, levels[level], slots)
            wanted, start = [], 0
            for node in levels[level]:
                skipped = max(first_of[node] - node.start, 0)
                count = max(len(node.tokens) - skipped, 0)
                wanted.append(np.arange(start + skipped, start + skipped + count))
                row_of[node] = total - skipped  # the row of its first token, if that were asked for
                total, start = total + count, start + len(node.tokens)
            segments = [Segment(slots[node].row, node.start, node.tokens) for node in levels[level]]
            hidden.append(prefill(decoder, cache, segments, np.concatenate(wanted)))
            self.tokens_read += start
        rows = []
        for tokens, leaf, first in zip(inputs, leaves, firsts, strict=True):
            parts = [
                np.arange(max(node.start, first), min(node.end, len(tokens))) + (row_of[node] - node.start)
                for node in leaf.path()
                if node.end > first
            ]
            rows.append(np.concatenate(parts))
        return self.model.for_head(torch.cat(hidden)), rows

    def _score(self, hidden: Tensor, rows: np.ndarray, spans: Sequence[_Span]) -> Iterator[Score]:
        """Yield the score of each span. rows: those of `hidden` that predict the spans' tokens, one after another."""
        device, model = hidden.device, self.model
        targets = torch.tensor([token for span in spans for token in span.continuation], device=device)
        weight, bias = model.head_layer.weight, getattr(model.head_layer, "bias", None)
        x = hidden[torch.from_numpy(rows).to(device)].to(weight.dtype)
        logprobs, _, _, largest = ops.linear_logprobs(x, weight, targets, bias, 1.0, model.softcap)
        logprobs, largest = logprobs.double().cpu(), largest.cpu()
        start = 0
        for span in spans:
            part = slice(start, start + len(span.continuation))
            yield Score(float(logprobs[part].sum()), bool(largest[part].all()), len(span.continuation))
            start = part.stop


def _listed(requests: Any) -> Sequence[Any]:
    """Return requests that are several. UserError for others."""
    if isinstance(requests, (str, Mapping)) or not hasattr(requests, "__len__"):
        raise UserError(f"scoring: requests are of type {type(requests).__name__}; give a list of {REQUEST}")
    return requests


def _as_pair(number: int, request: Any) -> Request:
    """Return a request. UserError if it is not two lists of numbers."""
    is_pair = isinstance(request, (list, tuple)) and len(request) == 2
    if not is_pair or not all(hasattr(part, "__len__") for part in request):
        raise UserError(f"scoring: request {number} is {shortened(repr(request))}; give {REQUEST}")
    context, continuation = request
    kinds = {*map(type, context), *map(type, continuation)}
    if str in kinds or isinstance(context, str) or isinstance(continuation, str):
        raise UserError(
            f"scoring: request {number} has text; give {REQUEST}, which are model.tokenizer(context).input_ids and"
            " model.tokenizer(continuation, add_special_tokens=False).input_ids"
        )
    if wrong := [kind.__name__ for kind in kinds if not issubclass(kind, (Integral, Tensor))]:
        raise UserError(f"scoring: request {number} has tokens of type {wrong[0]}; give {REQUEST}")
    return context, continuation


class _Slot(NamedTuple):
    """A node's row of the block table, and its pages from position 0 on."""

    row: int
    pages: list[int]


def _spans_by_input(requests: Sequence[Request]) -> dict[tuple[int, ...], list[_Span]]:
    """Return the continuations that each input has, equal requests as one."""
    same: defaultdict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    for i, (context, continuation) in enumerate(requests):
        same[tuple(context), tuple(continuation)].append(i)
    spans: defaultdict[tuple[int, ...], list[_Span]] = defaultdict(list)
    for (context, continuation), equal in same.items():
        spans[context + continuation[:-1]].append(_Span(len(context), continuation, equal))
    return spans


def _leaves(inputs: Sequence[tuple[int, ...]]) -> list[PrefixNode]:
    """Return the node of each sorted input's last token. An input with which another begins has no node of its own."""
    longest = [
        tokens for i, tokens in enumerate(inputs) if i + 1 == len(inputs) or inputs[i + 1][: len(tokens)] != tokens
    ]
    nodes = iter(zip(longest, build_prefix_tree(longest, MIN_SHARED), strict=True))
    leaves = []
    extension, leaf = next(nodes)
    for tokens in inputs:
        if extension[: len(tokens)] != tokens:
            extension, leaf = next(nodes)
        assert leaf is not None
        leaves.append(leaf)
    return leaves


def _create_cache(
    decoder: Decoder, device: torch.device, nodes: Sequence[PrefixNode]
) -> tuple[PagedKVCache, dict[PrefixNode, _Slot]]:
    """Return a cache with the pages that all nodes need, and the slots of the nodes, without pages yet."""
    page_size = PAGE_SIZES.get(device.type, 64)
    num_pages = sum(_num_pages(node, page_size) for node in nodes)
    longest = max(node.end for node in nodes)
    cache = create_cache(decoder.shapes, decoder.dtype, device, [longest], num_pages, len(nodes), 0, page_size)
    return cache, {node: _Slot(i, []) for i, node in enumerate(nodes)}


def _num_pages(node: PrefixNode, page_size: int) -> int:
    """Return the number of a node's own pages. The first may be a copy, with the last tokens of its parent."""
    return -(-node.end // page_size) - node.start // page_size


def _allocate(cache: PagedKVCache, nodes: Sequence[PrefixNode], slots: dict[PrefixNode, _Slot]) -> None:
    """Give the nodes of one level their pages: the full ones of their parents, and their own."""
    copies = []
    for node in nodes:
        own = cache.allocate(_num_pages(node, cache.page_size))
        if node.parent is not None:
            inherited = slots[node.parent].pages
            full = node.start // cache.page_size
            slots[node].pages.extend(inherited[:full])
            if node.start % cache.page_size:
                copies.append((inherited[full], own[0]))
        slots[node].pages.extend(own)
    cache.copy_pages([source for source, _ in copies], [target for _, target in copies])
    cache.assign_rows({slots[node].row: slots[node].pages for node in nodes})
