"""The batches that the stages pass to one another: named tuples of tensors, on the CPU; a model moves what it needs.

Shapes:
    B  rows; a row is a prompt, then a response
    T  tokens of the longest row
    R  tokens of the longest response
    N  rows of G groups (Comparisons)

A row is padded on the RIGHT with zeros. Only `lengths` says which tokens are real, never the value of a token. In
(B, R) fields column j is token j of the response, at position prompt_length + j, whose log-probability is predicted at
position prompt_length + j - 1.

A loss takes a batch with `num_items()`, the number of things its loss is averaged over (tokens, prompts), and
`take(index)`, a part of it. training/micro_batches.py splits a batch by a budget of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

LENGTH, EOS, STOP = 0, 1, 2
"""Why a response ended: max_new_tokens, an end token, a stop text."""
RESPONSE_FIELDS = frozenset(
    {
        *("mask", "logprobs", "raw_logprobs", "kept_logprobs", "entropy", "old_logprobs"),
        *("ref_logprobs", "values", "advantages", "returns", "weights", "loss_mask"),
    }
)
"""Fields of shape (B, R)."""


class Splittable(Protocol):
    """A batch that training/micro_batches.py can split."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def lengths(self) -> Tensor: ...

    def take(self, index: Tensor) -> Self: ...


class Batch(Splittable, Protocol):
    """A batch that a loss can take."""

    @property
    def uids(self) -> Tensor | None: ...

    def num_items(self) -> float: ...


class Demonstrations(NamedTuple):
    """Prompts with the response to learn: a loss on tokens prompt_length <= t < length, or some of them."""

    tokens: Tensor
    """(B, T)"""
    prompt_lengths: Tensor
    """(B,)"""
    lengths: Tensor
    """(B,) of prompt and response."""
    uids: Tensor | None = None
    """(B,) the row of the data set, for messages."""
    loss_mask: Tensor | None = None
    """(B, R) bool: the tokens of the response that have a loss. None = all of them."""

    def num_items(self) -> int:
        """Return the number of response tokens that have a loss."""
        if self.loss_mask is not None:
            return int(self.loss_mask.sum())
        return int((self.lengths - self.prompt_lengths).sum())

    def take(self, index: Tensor | Sequence[int]) -> Demonstrations:
        return take_rows(self, index)


class Texts(NamedTuple):
    """Pretraining text: the loss is on every token but the first."""

    tokens: Tensor
    """(B, T)"""
    lengths: Tensor
    """(B,)"""
    uids: Tensor | None = None
    """(B,) the row of the data set, for messages."""

    def num_items(self) -> int:
        """Return the number of tokens that have one before them."""
        return int((self.lengths - 1).clamp_min(0).sum())

    def take(self, index: Tensor | Sequence[int]) -> Texts:
        return take_rows(self, index)


class Comparisons(NamedTuple):
    """Ranked responses. Group g holds the responses to one prompt: rows group_offsets[g] to group_offsets[g + 1]."""

    tokens: Tensor
    """(N, T)"""
    prompt_lengths: Tensor
    """(N,)"""
    lengths: Tensor
    """(N,)"""
    group_offsets: Tensor
    """(G + 1,)"""
    ranks: Tensor
    """(N,) 0 is the best; equal ranks are a tie."""
    uids: Tensor | None = None
    """(G,) the row of the data set, for messages."""

    def num_items(self) -> int:
        """Return the number of prompts that have a pair. Prompts whose responses are all tied are not counted."""
        offsets = self.group_offsets.tolist()
        return sum(len(self.ranks[start:end].unique()) > 1 for start, end in pairwise(offsets))

    def take(self, index: Tensor) -> Comparisons:
        """Return whole groups, in the order of `index` (g,)."""
        sizes = self.group_offsets.diff()[index]
        offsets = self.group_offsets.tolist()
        parts = [torch.arange(offsets[g], offsets[g + 1]) for g in index.tolist()]
        rows = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
        lengths = self.lengths[rows]
        return Comparisons(
            tokens=self.tokens[rows, : int(lengths.max()) if len(rows) else 0],
            prompt_lengths=self.prompt_lengths[rows],
            lengths=lengths,
            group_offsets=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
            ranks=self.ranks[rows],
            uids=None if self.uids is None else self.uids[index],
        )


class GivenRow(NamedTuple):
    """The row of a prompt as its file has it, for reward functions that are called by the names of their parameters."""

    prompt: str | list[dict[str, Any]]
    """A text or messages, before any template."""
    columns: Mapping[str, Any]
    """The columns that the functions ask for, by name."""
    absent: frozenset[str] = frozenset()
    """Columns that are None because only other rows have them."""


class Prompts(NamedTuple):
    """Prompts to answer."""

    uids: list[int]
    """A prompt's number in the whole run. The noise of the prompt's samples depends on it and on their number."""
    tokens: list[list[int]]
    texts: list[str]
    rows: list[GivenRow] | None = None
    """The row of each prompt. None = no reward function asks for them."""

    @classmethod
    def from_texts(cls, tokenizer: Any, texts: Sequence[str]) -> Prompts:
        """Encode `texts` as the tokenizer does by default, special tokens included. Their uids are 0, 1, ...

        No chat template is applied: write the texts as the model was trained to read them.
        """
        tokens = tokenizer(list(texts))["input_ids"] if texts else []  # transformers fails on an empty list
        return cls(list(range(len(texts))), tokens, list(texts))

    def take(self, index: Sequence[int]) -> Prompts:
        return Prompts(
            uids=[self.uids[i] for i in index],
            tokens=[self.tokens[i] for i in index],
            texts=[self.texts[i] for i in index],
            rows=None if self.rows is None else [self.rows[i] for i in index],
        )


class Responses(NamedTuple):
    """Sampled responses, and what the sampler knows of each token. An end token is part of its response."""

    tokens: Tensor
    """(B, T) prompt and response."""
    prompt_lengths: Tensor
    """(B,)"""
    lengths: Tensor
    """(B,) of prompt and response."""
    mask: Tensor
    """(B, R) bool: true where there is a token."""
    logprobs: Tensor
    """(B, R) nats, at the sampling temperature, before the filters: comparable with the trainer's forward pass. Of a
    greedy response those at temperature 1."""
    raw_logprobs: Tensor
    """(B, R) nats, at temperature 1."""
    kept_logprobs: Tensor
    """(B, R) nats, after temperature and filters: under the distribution that the token was drawn from."""
    entropy: Tensor
    """(B, R) nats, of the distribution at the sampling temperature, before the filters."""
    finish_reasons: Tensor
    """(B,) uint8: LENGTH, EOS or STOP."""
    uids: Tensor
    """(B,) of the prompt."""
    stop_indices: Tensor | None = None
    """(B,) for STOP the index in `sampling.stop` of the text that ended the response, else -1."""

    @property
    def finished(self) -> Tensor:
        """(B,) bool: ended by an end token or stop text, not by the limit."""
        return self.finish_reasons != LENGTH

    def take(self, index: Tensor | Sequence[int]) -> Responses:
        return take_rows(self, index)

    def response_ids(self) -> list[list[int]]:
        """Return the tokens of each response, without its prompt."""
        spans = zip(self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [row[start:end].tolist() for row, (start, end) in zip(self.tokens, spans, strict=True)]

    def texts(self, tokenizer: Any) -> list[str]:
        """Return the responses as texts, without special tokens."""
        return tokenizer.batch_decode(self.response_ids(), skip_special_tokens=True)


class Experience(NamedTuple):
    """Responses with everything that PPO's losses read."""

    tokens: Tensor
    """(B, T) prompt and response."""
    prompt_lengths: Tensor
    """(B,)"""
    lengths: Tensor
    """(B,) of prompt and response."""
    mask: Tensor
    """(B, R) bool: valid tokens; the losses leave the others out."""
    old_logprobs: Tensor
    """(B, R) nats, of the policy that sampled."""
    ref_logprobs: Tensor
    """(B, R) nats, of the reference model."""
    values: Tensor
    """(B, R) of the value model at collection: the value before token j is sampled is in column j."""
    advantages: Tensor
    """(B, R)"""
    returns: Tensor
    """(B, R)"""
    weights: Tensor
    """(B, R) float32: each token's weight in the losses; 0 outside `mask`."""
    scores: Tensor
    """(B,) rewards as the reward function returned them."""
    finished: Tensor
    """(B,) bool: ended by an end token or stop text."""
    uids: Tensor
    """(B,) of the prompt."""

    def num_items(self) -> float:
        """Return the sum of the weights: the number of response tokens, or of responses."""
        return float(self.weights.double().sum())

    def take(self, index: Tensor | Sequence[int]) -> Experience:
        return take_rows(self, index)


S = TypeVar("S", bound=Splittable)
RowWise = TypeVar("RowWise", Demonstrations, Texts, Responses, Experience)
"""The batches whose every field starts with B."""


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Turn token lists into tokens (B, T) int64, padded on the right with 0, and lengths (B,) int64."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tokens = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return tokens, lengths


def response_mask(prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """Return (B, R) bool: true where a response has a token."""
    sizes = lengths - prompt_lengths
    positions = torch.arange(int(sizes.max()) if len(sizes) else 0, device=sizes.device)
    return positions < sizes[:, None]


def last_columns(tokens: Tensor, lengths: Tensor, pad: int | None) -> Tensor:
    """Return the column (B,) of each row's last token that is not `pad`, None = of its last token."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    inside = positions < lengths[:, None]
    return (positions * (inside if pad is None else inside & (tokens != pad))).argmax(1)


def take_rows(batch: RowWise, index: Tensor | Sequence[int]) -> RowWise:
    """Return rows `index` of a batch, its padding cut to the longest row among them."""
    index = torch.as_tensor(index, dtype=torch.int64)
    lengths = batch.lengths[index]
    widths = {"tokens": int(lengths.max()) if len(index) else 0}
    if isinstance(batch, (Demonstrations, Responses, Experience)):
        longest = int((lengths - batch.prompt_lengths[index]).max()) if len(index) else 0
        widths.update(dict.fromkeys(RESPONSE_FIELDS, longest))
    fields: dict[str, Any] = {}
    for name, value in zip(batch._fields, batch, strict=True):
        if value is not None:
            rows = value[index]
            fields[name] = rows[:, : widths[name]] if name in widths else rows
    return type(batch)(**fields)


def cat(batches: Sequence[RowWise]) -> RowWise:
    """Join batches of one type, padded to the longest row."""
    fields: dict[str, Any] = {}
    for name in batches[0]._fields:
        parts = [getattr(batch, name) for batch in batches]
        if any(part is None for part in parts):
            continue
        if parts[0].dim() > 1:
            width = max(part.shape[1] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        fields[name] = torch.cat(parts)
    return type(batches[0])(**fields)


def shared_prompts(tokens: Tensor, prompt_lengths: Tensor) -> dict[int, int]:
    """Return {row: first row with an equal prompt} of the rows that share theirs. A single token is not shared."""
    rows_of: dict[bytes, list[int]] = {}
    for row, size in enumerate(prompt_lengths.tolist()):
        if size > 1:
            rows_of.setdefault(tokens[row, :size].numpy().tobytes(), []).append(row)
    return {row: rows[0] for rows in rows_of.values() if len(rows) > 1 for row in rows}
