"""What the stages hand to one another: named tuples of tensors, and how they are cut, joined and counted.

Shapes: B rows, T tokens of the longest row, R tokens of the longest response, N rows of G groups. A row is prompt then
response, padded on the RIGHT with zeros that nobody reads: lengths say what is real, never the value of a token.
Response-aligned fields are (B, R): slot j belongs to the token at prompt_length + j, whose log-probability is predicted
at position prompt_length + j - 1. Batches live on the CPU; the model moves what it needs.

Every batch that a loss takes has `units()`, how many things its loss is averaged over (tokens, prompts), and
`take(index)`, some of its units; `micro_batches` cuts by a budget of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LIMIT, END, STOP = 0, 1, 2
"""Why a response is over: max_new_tokens, an end token, a stop text."""
RESPONSE_FIELDS = frozenset(
    "mask logprobs raw_logprobs kept_logprobs entropy".split()
    + "old_logprobs ref_logprobs values advantages returns weights".split()
)


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token lists -> tokens (B, T) int64, right-padded with 0, and lengths (B,) int64."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tokens = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return tokens, lengths


def response_mask(prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """(B, R) bool: which response slots hold a token. R is the longest response."""
    sizes = lengths - prompt_lengths
    slots = torch.arange(int(sizes.max()) if len(sizes) else 0, device=sizes.device)
    return slots < sizes[:, None]


class Demonstrations(NamedTuple):
    """Prompts with the response to learn: the loss is on tokens prompt_length <= t < length."""

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    uids: Tensor | None = None
    """(B,) which row of the data each is, for messages."""

    def units(self) -> int:
        """Response tokens."""
        return int((self.lengths - self.prompt_lengths).sum())

    def take(self, index: Tensor) -> Demonstrations:
        return take_rows(self, index)


class Texts(NamedTuple):
    """Pretraining text: the loss is on every token but the first."""

    tokens: Tensor
    lengths: Tensor
    uids: Tensor | None = None

    def units(self) -> int:
        """Tokens that have one before them."""
        return int((self.lengths - 1).clamp_min(0).sum())

    def take(self, index: Tensor) -> Texts:
        return take_rows(self, index)


class Comparisons(NamedTuple):
    """Ranked responses. Group g, the responses to one prompt, is rows group_offsets[g] to group_offsets[g + 1]; how
    many may differ from group to group. ranks (N,): 0 is the best, equal ranks are a tie."""

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    group_offsets: Tensor
    ranks: Tensor
    uids: Tensor | None = None
    """(G,) which row of the data each group is."""

    def units(self) -> int:
        """Prompts whose responses are not all tied: the others say nothing and do not thin the mean."""
        offsets = self.group_offsets.tolist()
        return sum(len(self.ranks[a:b].unique()) > 1 for a, b in zip(offsets, offsets[1:], strict=False))

    def take(self, index: Tensor) -> Comparisons:
        """Whole groups, in the order of `index` (g,)."""
        sizes = self.group_offsets.diff()[index]
        rows = [torch.arange(self.group_offsets[g], self.group_offsets[g + 1]) for g in index.tolist()]
        rows = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        lengths = self.lengths[rows]
        return Comparisons(
            tokens=self.tokens[rows, : int(lengths.max()) if len(rows) else 0],
            prompt_lengths=self.prompt_lengths[rows],
            lengths=lengths,
            group_offsets=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
            ranks=self.ranks[rows],
            uids=None if self.uids is None else self.uids[index],
        )


class Prompts(NamedTuple):
    """What to answer. A uid names a prompt for the whole run: the noise of its samples hangs on it alone."""

    ids: list[int]
    """The uids."""
    tokens: list[list[int]]
    texts: list[str]

    @classmethod
    def from_texts(cls, tokenizer, texts: Sequence[str]) -> Prompts:
        """Encode `texts` as the tokenizer does by default, special tokens included. Their uids are 0, 1, ..."""
        tokens = tokenizer(list(texts))["input_ids"] if texts else []  # transformers fails on an empty list
        return cls(list(range(len(texts))), tokens, list(texts))

    def take(self, index: Sequence[int]) -> Prompts:
        return Prompts(*([field[i] for i in index] for field in self))


class Responses(NamedTuple):
    """Sampled responses, and what the sampler knew of each token. An end token is part of its response."""

    tokens: Tensor
    """(B, T) prompt and response."""
    prompt_lengths: Tensor
    lengths: Tensor
    mask: Tensor
    """(B, R) bool: slots that hold a token."""
    logprobs: Tensor
    """(B, R) nats, at the sampling temperature, before the filters: what the trainer's own forward would say."""
    raw_logprobs: Tensor
    """(B, R) at temperature 1."""
    kept_logprobs: Tensor
    """(B, R) after temperature and filters: under the distribution the token was really drawn from."""
    entropy: Tensor
    """(B, R) nats, of the distribution at the sampling temperature before the filters."""
    reasons: Tensor
    """(B,) uint8: why it is over: LIMIT, END or STOP."""
    uids: Tensor
    """(B,) uid of the prompt."""

    @property
    def finished(self) -> Tensor:
        """(B,) bool: ended by an end token or stop text, not by the limit."""
        return self.reasons != LIMIT

    def take(self, index: Tensor) -> Responses:
        return take_rows(self, index)

    def response_ids(self) -> list[list[int]]:
        """The responses alone, as token lists."""
        spans = zip(self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [row[a:b].tolist() for row, (a, b) in zip(self.tokens, spans, strict=True)]

    def texts(self, tokenizer) -> list[str]:
        """Return the responses as texts, without special tokens."""
        return tokenizer.batch_decode(self.response_ids(), skip_special_tokens=True)


class Experience(NamedTuple):
    """Responses with everything that PPO's losses read. `mask` is False at tokens that are to be left out of them."""

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    mask: Tensor
    old_logprobs: Tensor
    """(B, R) of the policy that sampled."""
    ref_logprobs: Tensor
    """(B, R) of the reference model."""
    values: Tensor
    """(B, R) of the value model at collection: slot j holds the value before token j was drawn."""
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    """(B, R) float32: what each token counts in the losses; 0 outside `mask`."""
    scores: Tensor
    """(B,) rewards as the reward model or function gave them."""
    finished: Tensor
    uids: Tensor

    def units(self) -> float:
        """Sum of the weights: response tokens, or responses."""
        return float(self.weights.double().sum())

    def take(self, index: Tensor) -> Experience:
        return take_rows(self, index)


def take_rows(batch, index: Tensor):
    """Rows `index` of a batch whose every field starts with B, its padding cut to the longest row that is left."""
    index = torch.as_tensor(index, dtype=torch.int64)
    lengths = batch.lengths[index]
    longest = int(lengths.max()) if len(index) else 0
    response = int((lengths - batch.prompt_lengths[index]).max()) if len(index) and "mask" in batch._fields else 0
    cut = {"tokens": longest, **dict.fromkeys(RESPONSE_FIELDS, response)}
    fields = {}
    for name, value in zip(batch._fields, batch, strict=True):
        if value is not None:
            value = value[index]
            fields[name] = value[:, : cut[name]] if name in cut else value
    return type(batch)(**fields)


def cat(batches: Sequence):
    """One batch of several of the same row-wise type, padded to the longest row."""
    fields = {}
    for name, parts in zip(batches[0]._fields, zip(*batches, strict=True), strict=True):
        if any(part is None for part in parts):
            continue
        if parts[0].dim() > 1:
            width = max(part.shape[1] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        fields[name] = torch.cat(list(parts))
    return type(batches[0])(**fields)


def micro_batches(batch, tokens: int) -> Iterator[tuple[Tensor, object]]:
    """(index, part) for parts of at most `tokens` tokens, padding included, longest rows first; a unit longer than that
    comes alone. A unit is a row, of Comparisons a group. Every unit is in exactly one part."""
    if isinstance(batch, Comparisons):
        offsets = batch.group_offsets.tolist()
        spans = list(zip(offsets, offsets[1:], strict=False))
        longest = [int(batch.lengths[a:b].max()) if b > a else 0 for a, b in spans]
        counts = [b - a for a, b in spans]
    else:
        longest = batch.lengths.tolist()
        counts = [1] * len(longest)
    part, rows, width = [], 0, 0
    for unit in sorted(range(len(counts)), key=lambda unit: -longest[unit]):
        if part and (rows + counts[unit]) * max(width, longest[unit]) > tokens:
            yield torch.tensor(part), batch.take(torch.tensor(part))
            part, rows, width = [], 0, 0
        part.append(unit)
        rows, width = rows + counts[unit], max(width, longest[unit])
    if part:
        yield torch.tensor(part), batch.take(torch.tensor(part))
