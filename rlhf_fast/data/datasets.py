"""Data sets: encoded rows, shuffled anew each epoch, read from any position on, and joined to batches.

A position counts the rows a run has taken since its start, over all epochs; row_at(position) hangs on the seed and the
position alone, so an integer is all that a resumed run needs to see the same rows again.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from rlhf_fast.batches import Comparisons, Demonstrations, Prompts, Texts, pad_rows
from rlhf_fast.config.fields import DataConfig
from rlhf_fast.data.encode import Encoder
from rlhf_fast.data.fields import Bad, Dialog
from rlhf_fast.data.rows import Example, read
from rlhf_fast.errors import UserError

B = TypeVar("B", Demonstrations, Comparisons, Prompts, Texts)


class Row(NamedTuple):
    """One example as tokens. A text is a response without prompt, a prompt has no responses."""

    location: str
    """file:line"""
    prompt: list[int]
    text: str
    """The prompt, as text."""
    responses: tuple[list[int], ...] = ()
    ranks: tuple[int, ...] = ()
    groups: tuple[str, ...] = ()
    """Names; rows that have one in common stay on one side of a split."""


class Dataset(Generic[B]):
    """Rows and how they are joined to a batch. len() is the number of rows, [i] is row i of the file's order."""

    def __init__(self, rows: Sequence[Row], join: Callable[[Sequence[Row], list[int]], B], seed: int, notes: str = ""):
        self.rows, self.join, self.seed, self.notes = rows, join, seed, notes
        """notes: a sentence on what was read and dropped."""
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def row_at(self, position: int) -> int:
        """The row that is taken at a position; every row once an epoch."""
        epoch, place = divmod(position, len(self.rows))
        if self._order[0] != epoch:
            order = list(range(len(self.rows)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = epoch, order
        return self._order[1][place]

    def batch(self, position: int, size: int) -> B:
        """`size` rows from a position on, into the next epoch where one ends. uids: the rows, of Prompts the positions,
        because a prompt that comes again must not be answered with the same noise."""
        if not self.rows:
            raise UserError("the data set is empty, so no batch can be taken from it")
        places = range(position, position + size)
        index = [self.row_at(place) for place in places]
        return self.join([self.rows[i] for i in index], list(places) if self.join is join_prompts else index)

    def in_order(self, size: int) -> Iterator[B]:
        """Every row once, in the file's order, in batches of at most `size`: for validation."""
        for start in range(0, len(self.rows), size):
            index = list(range(start, min(start + size, len(self.rows))))
            yield self.join([self.rows[i] for i in index], index)

    def location(self, row: int) -> str:
        """file:line of a row, for messages."""
        return self.rows[row].location


class Split(NamedTuple, Generic[B]):
    """What is trained on and what is held out (perhaps nothing)."""

    train: Dataset[B]
    valid: Dataset[B]


def read_demonstrations(cfg: DataConfig, tokenizer: Any, seed: int = 0, context: int = 0) -> Split[Demonstrations]:
    """Prompts with a response. context: the model's longest sequence, 0 = unknown; longer rows are dropped."""
    return _load(cfg, "demonstrations", tokenizer, join_demonstrations, seed, context)


def read_comparisons(cfg: DataConfig, tokenizer: Any, seed: int = 0, context: int = 0) -> Split[Comparisons]:
    """Prompts with two or more ranked responses."""
    return _load(cfg, "comparisons", tokenizer, join_comparisons, seed, context)


def read_prompts(cfg: DataConfig, tokenizer: Any, seed: int = 0, context: int = 0) -> Split[Prompts]:
    """Prompts. context: what is left of the model's longest sequence when the longest response is taken off."""
    return _load(cfg, "prompts", tokenizer, join_prompts, seed, context)


def read_texts(cfg: DataConfig, tokenizer: Any, seed: int = 0, context: int = 0) -> Split[Texts]:
    """Pretraining text, in pieces of at most max_response_tokens."""
    return _load(cfg, "texts", tokenizer, join_texts, seed, context)


def join_demonstrations(rows: Sequence[Row], uids: list[int]) -> Demonstrations:
    tokens, lengths = pad_rows([row.prompt + row.responses[0] for row in rows])
    return Demonstrations(tokens, torch.tensor([len(row.prompt) for row in rows]), lengths, torch.tensor(uids))


def join_comparisons(rows: Sequence[Row], uids: list[int]) -> Comparisons:
    tokens, lengths = pad_rows([row.prompt + response for row in rows for response in row.responses])
    prompts = torch.tensor([len(row.prompt) for row in rows for _ in row.responses])
    offsets = torch.tensor([0, *(len(row.responses) for row in rows)]).cumsum(0)
    ranks = torch.tensor([rank for row in rows for rank in row.ranks])
    return Comparisons(tokens, prompts, lengths, offsets, ranks, torch.tensor(uids))


def join_prompts(rows: Sequence[Row], uids: list[int]) -> Prompts:
    return Prompts(uids, [row.prompt for row in rows], [row.text for row in rows])


def join_texts(rows: Sequence[Row], uids: list[int]) -> Texts:
    tokens, lengths = pad_rows([row.responses[0] for row in rows])
    return Texts(tokens, lengths, torch.tensor(uids))


def _load(cfg: DataConfig, kind: str, tokenizer: Any, join: Callable, seed: int, context: int) -> Split:
    encoder = Encoder(tokenizer, cfg.template, cfg.append_eos)
    rows, notes = _encoded(cfg.path, cfg.limit, kind, encoder, cfg, context)
    if cfg.valid:
        held_out, told = _encoded(cfg.valid, 0, kind, encoder, cfg, context)
        notes = f"{notes}. {told}"
    else:
        rows, held_out = split(rows, cfg.valid_fraction)
        notes += f"; {len(held_out)} of them held out" if held_out else ""
    return Split(Dataset(rows, join, seed, notes), Dataset(held_out, join, seed, notes))


def _encoded(
    path: str, limit: int, kind: str, encoder: Encoder, cfg: DataConfig, context: int
) -> tuple[list[Row], str]:
    """The rows of a file, and a sentence on them."""
    examples = read(path, kind, cfg.columns, limit)
    rows, dropped = encode(examples, path, kind, encoder, cfg, context)
    told = ", ".join(f"{count} {why}" for why, count in dropped.items())
    if not rows:
        raise UserError(f"{path}: none of the {len(examples)} rows is left: {told or 'each is a single token'}")
    return rows, f"{path}: {len(rows)} {kind}" + (f"; left out: {told}" if told else "")


def encode(
    examples: Sequence[Example], path: str, kind: str, encoder: Encoder, cfg: DataConfig, context: int = 0
) -> tuple[list[Row], Counter[str]]:
    """Rows, and how many examples were left out for which reason."""
    rows, dropped, prefixes = [], Counter(), set()
    for example in examples:
        location = f"{path}:{example.line}"
        try:
            prompt, text = encoder.prompt(example.prompt) if kind != "texts" else ([], "")
        except Bad as bad:
            raise UserError(f"{location}: {bad}") from bad
        if kind == "texts":
            whole = Row(location, [], "", (encoder.text(example.responses[0]),), (), _groups(example))
            rows += _pieces(whole, cfg.max_response_tokens, context)
            continue
        responses = tuple(encoder.response(r) for r in example.responses)
        row, short = shorten(Row(location, prompt, text, responses, example.ranks, _groups(example)), cfg, context)
        if short:
            dropped["responses that are too long, of prompts that keep others"] += short
        why = too_long(row, cfg, context)
        if not why and kind == "prompts" and cfg.dedupe_prefix:
            prefix = opening(example.prompt)[: cfg.dedupe_prefix]
            why = "begin like an earlier prompt (data.dedupe_prefix)" if prefix in prefixes else ""
            prefixes.add(prefix)
        if why:
            dropped[why] += 1
        else:
            rows.append(row)
    return rows, dropped


def too_long(row: Row, cfg: DataConfig, context: int = 0) -> str:
    """Which limit a row exceeds, or nothing."""
    longest = max(map(len, row.responses), default=0)
    if len(row.prompt) > cfg.max_prompt_tokens:
        return f"with a prompt over {cfg.max_prompt_tokens} tokens (data.max_prompt_tokens)"
    if longest > cfg.max_response_tokens:
        return f"with a response over {cfg.max_response_tokens} tokens (data.max_response_tokens)"
    if context and len(row.prompt) + longest > context:
        return f"over the {context} tokens that the model leaves for them"
    return ""


def shorten(row: Row, cfg: DataConfig, context: int = 0) -> tuple[Row, int]:
    """A comparison without its over-long responses, if others of two ranks or more are left; and how many went."""
    room = min(cfg.max_response_tokens, context - len(row.prompt) if context else cfg.max_response_tokens)
    kept = [i for i, response in enumerate(row.responses) if len(response) <= room]
    if len(kept) == len(row.responses) or len({row.ranks[i] for i in kept if row.ranks}) < 2:
        return row, 0
    less = row._replace(responses=tuple(row.responses[i] for i in kept), ranks=tuple(row.ranks[i] for i in kept))
    return less, len(row.responses) - len(kept)


def _groups(example: Example) -> tuple[str, ...]:
    key = opening(example.prompt) if example.prompt else "".join(example.responses)
    own = "text " + hashlib.sha256(key.encode()).hexdigest()
    return (own, f"group {example.group}") if example.group else (own,)


def _pieces(document: Row, size: int, context: int) -> Iterator[Row]:
    """A document in pieces; a last piece of one token predicts nothing and is left out."""
    size, ids = max(min(size, context or size), 2), document.responses[0]
    for start in range(0, len(ids), size):
        if start + 1 < len(ids):
            yield document._replace(responses=(ids[start : start + size],))


def opening(prompt: Dialog) -> str:
    """A prompt as one text, to compare prompts by."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def split(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """(train, valid), `valid` about that share of the groups of rows that have a name in common.

    Which groups are held out hangs on their texts alone: not on the seed, the order or, mostly, on what else is there.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for row in rows if fraction else ():
        first, *others = sorted(map(root, row.groups))  # the least name stands for all, whatever the order of the rows
        parent.update(dict.fromkeys(others, first))
    roots = [root(row.groups[0]) for row in rows]
    groups = sorted(set(roots), key=lambda name: hashlib.sha256(name.encode()).digest())
    if not fraction or len(groups) < 2:
        return list(rows), []
    held = set(groups[: min(max(round(fraction * len(groups)), 1), len(groups) - 1)])
    train = [row for row, name in zip(rows, roots, strict=True) if name not in held]
    return train, [row for row, name in zip(rows, roots, strict=True) if name in held]
