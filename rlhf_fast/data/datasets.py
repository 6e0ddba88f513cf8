"""Data sets: tokenized rows, shuffled in every epoch, joined to batches, readable from any position.

A position counts the rows that a run has taken since its start, over all epochs. row_at(position) depends only on the
seed and the position, so one integer is all that a resumed run needs to see the same rows again.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from rlhf_fast.batches import Comparisons, Demonstrations, GivenRow, Prompts, Texts, pad_rows, response_mask
from rlhf_fast.config.data_path import DataPath, shown_path
from rlhf_fast.config.fields import DataConfig
from rlhf_fast.data.encode import Encoder, PromptFormat, has_loss
from rlhf_fast.data.fields import Dialog, InvalidRow, Message
from rlhf_fast.data.notes import row_notes, unknown_warning
from rlhf_fast.data.row_columns import Wanted, given_row, require_columns, taken_columns
from rlhf_fast.data.rows import Example, read_examples
from rlhf_fast.errors import UserError

B = TypeVar("B", Demonstrations, Comparisons, Prompts, Texts)


class Row(NamedTuple):
    """One example as tokens. A text is a response without a prompt; a prompt has no responses."""

    location: str
    """file:line"""
    prompt: list[int]
    text: str
    """The prompt as text."""
    responses: tuple[list[int], ...] = ()
    ranks: tuple[int, ...] = ()
    groups: tuple[str, ...] = ()
    """Keys of a split: rows that share one stay on the same side."""
    loss_mask: tuple[bool, ...] = ()
    """For each token of a demonstration's response, whether it has a loss. Empty = all have one."""
    given: GivenRow | None = None
    """The row as its file has it, for reward functions that ask for columns. None = none does."""
    raw_prompt: str = ""
    """The prompt as the data have it: its text, that of its only turn, or turns after the names of their roles."""


class Dataset(Generic[B]):
    """Rows and the function that joins them to a batch. len() is the number of rows, [i] is row i in the file's order.

    notes: a sentence on the rows that were read and dropped.
    """

    def __init__(self, rows: Sequence[Row], join: Callable[[Sequence[Row], list[int]], B], seed: int, notes: str = ""):
        self.rows, self.seed, self.notes = rows, seed, notes
        self.join: Callable[[Sequence[Row], list[int]], B] = join
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def row_at(self, position: int) -> int:
        """Return the row at a position. Every row occurs once in an epoch."""
        epoch, index = divmod(position, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.rows)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self._order[index]

    def batch(self, position: int, size: int) -> B:
        """Return `size` rows from a position on, across the end of an epoch.

        Their uids are the rows' numbers; those of Prompts are the positions, so that a prompt gets new sampling noise
        in every epoch.
        """
        if not self.rows:
            raise UserError("the data set is empty, so no batch can be taken from it")
        positions = list(range(position, position + size))
        indices = [self.row_at(i) for i in positions]
        return self.join([self.rows[i] for i in indices], positions if self.join is join_prompts else indices)

    def in_order(self, size: int) -> Iterator[B]:
        """Yield every row once, in the file's order, in batches of at most `size`."""
        for start in range(0, len(self.rows), size):
            indices = list(range(start, min(start + size, len(self.rows))))
            yield self.join([self.rows[i] for i in indices], indices)

    def location(self, row: int) -> str:
        """Return file:line of a row, for messages."""
        return self.rows[row].location


class Split(NamedTuple, Generic[B]):
    """Rows for training and rows held out for validation, possibly none."""

    train: Dataset[B]
    valid: Dataset[B]


def read_demonstrations(
    cfg: DataConfig,
    tokenizer: Any,
    seed: int = 0,
    context: int = 0,
    prompt_format: PromptFormat | None = None,
    wanted: Sequence[Wanted] = (),
) -> Split[Demonstrations]:
    """Return prompts with a response. Rows of more than `context` tokens are dropped; 0 = no limit.

    prompt_format: the run's, which replaces cfg.template. wanted: what reward functions read of the rows.
    """
    return _read(cfg, "demonstrations", tokenizer, join_demonstrations, seed, context, prompt_format, wanted)


def read_comparisons(
    cfg: DataConfig, tokenizer: Any, seed: int = 0, context: int = 0, prompt_format: PromptFormat | None = None
) -> Split[Comparisons]:
    """Return prompts with two or more ranked responses. `context` as in read_demonstrations."""
    return _read(cfg, "comparisons", tokenizer, join_comparisons, seed, context, prompt_format)


def read_prompts(
    cfg: DataConfig,
    tokenizer: Any,
    seed: int = 0,
    context: int = 0,
    prompt_format: PromptFormat | None = None,
    wanted: Sequence[Wanted] = (),
) -> Split[Prompts]:
    """Return prompts. `context` is the model's longest sequence less the longest response. wanted: as above."""
    return _read(cfg, "prompts", tokenizer, join_prompts, seed, context, prompt_format, wanted)


def read_texts(
    cfg: DataConfig, tokenizer: Any, seed: int = 0, context: int = 0, prompt_format: PromptFormat | None = None
) -> Split[Texts]:
    """Return pretraining text in chunks of at most max_response_tokens and `context` tokens."""
    return _read(cfg, "texts", tokenizer, join_texts, seed, context, prompt_format)


def join_demonstrations(rows: Sequence[Row], uids: list[int]) -> Demonstrations:
    tokens, lengths = pad_rows([row.prompt + row.responses[0] for row in rows])
    prompt_lengths = torch.tensor([len(row.prompt) for row in rows])
    loss_mask = response_mask(prompt_lengths, lengths)
    for i, row in enumerate(rows):
        if row.loss_mask:
            loss_mask[i, : len(row.loss_mask)] = torch.tensor(row.loss_mask)
    return Demonstrations(tokens, prompt_lengths, lengths, torch.tensor(uids), loss_mask)


def join_comparisons(rows: Sequence[Row], uids: list[int]) -> Comparisons:
    tokens, lengths = pad_rows([row.prompt + response for row in rows for response in row.responses])
    prompt_lengths = torch.tensor([len(row.prompt) for row in rows for _ in row.responses])
    offsets = torch.tensor([0, *(len(row.responses) for row in rows)]).cumsum(0)
    ranks = torch.tensor([rank for row in rows for rank in row.ranks])
    return Comparisons(tokens, prompt_lengths, lengths, offsets, ranks, torch.tensor(uids))


def join_prompts(rows: Sequence[Row], uids: list[int]) -> Prompts:
    given = [row.given for row in rows if row.given is not None]
    return Prompts(uids, [row.prompt for row in rows], [row.text for row in rows], given or None)


def join_texts(rows: Sequence[Row], uids: list[int]) -> Texts:
    tokens, lengths = pad_rows([row.responses[0] for row in rows])
    return Texts(tokens, lengths, torch.tensor(uids))


def _read(
    cfg: DataConfig,
    kind: str,
    tokenizer: Any,
    join: Callable[[Sequence[Row], list[int]], B],
    seed: int,
    context: int,
    prompt_format: PromptFormat | None,
    wanted: Sequence[Wanted] = (),
) -> Split[B]:
    template, date = prompt_format or PromptFormat(cfg.template)
    encoder = Encoder(tokenizer, template, cfg.append_eos, date)
    rows, notes, warning = _read_rows(cfg.path, cfg.limit, kind, encoder, cfg, context, wanted)
    if cfg.valid:
        held_out, valid_notes, _ = _read_rows(cfg.valid, 0, kind, encoder, cfg, context, wanted)
        notes = f"{notes}. {valid_notes}"
    else:
        rows, held_out = split_rows(rows, cfg.valid_fraction)
        if cfg.valid_fraction:
            asked = cfg.valid_fraction * (len(rows) + len(held_out))
            is_near = asked / 1.5 - 1 <= len(held_out) <= asked * 1.5 + 1
            why = "" if is_near else ", as rows of one prompt, group or text stay together"
            notes += f"; {len(held_out) or 'none'} of them held out{why}" if held_out or why else ""
    notes += f"\n{warning}" if warning else ""
    return Split(Dataset(rows, join, seed, notes), Dataset(held_out, join, seed, notes))


def _read_rows(
    path: DataPath,
    limit: int,
    kind: str,
    encoder: Encoder,
    cfg: DataConfig,
    context: int,
    wanted: Sequence[Wanted] = (),
) -> tuple[list[Row], str, str]:
    """Return the rows of a file, a sentence on them, and one if the model cannot learn them."""
    examples = read_examples(path, kind, cfg.columns, limit, cfg.remove_columns)
    require_columns(shown_path(path), examples, wanted)
    rows, dropped = encode(examples, kind, encoder, cfg, context, wanted)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    name = shown_path(path)
    if not rows:
        raise UserError(
            f"{name}: none of the {len(examples)} rows is left: {reasons or 'each is a single token'}{_remedy(dropped)}"
        )
    sequences = [ids for row in rows for ids in (row.prompt, *row.responses)]
    notes = row_notes(name, examples, sequences, encoder, cfg, taken_columns(examples, wanted, cfg.remove_columns))
    sentence = "; ".join([f"{name}: {len(rows)} {kind}", *([f"left out: {reasons}"] if reasons else []), *notes])
    return rows, sentence, unknown_warning(sequences, encoder)


def _remedy(dropped: Mapping[str, int]) -> str:
    """Return what helps against the limits that left no row."""
    if any("that the model leaves" in reason for reason in dropped):
        return "; shorten the rows, take a model with more positions, or lower sampling.max_new_tokens (PPO)"
    limits = [name for name in ("max_prompt_tokens", "max_response_tokens") if any(name in each for each in dropped)]
    return f"; shorten the rows, or raise {' and '.join(f'data.{name}' for name in limits)}" if limits else ""


def encode(
    examples: Sequence[Example],
    kind: str,
    encoder: Encoder,
    cfg: DataConfig,
    context: int = 0,
    wanted: Sequence[Wanted] = (),
) -> tuple[list[Row], Counter[str]]:
    """Return the rows, and the number of dropped examples for each reason."""
    rows: list[Row] = []
    taken = taken_columns(examples, wanted, cfg.remove_columns)
    keeps_rows = any(not each.lists for each in wanted)
    dropped: Counter[str] = Counter()
    prefixes: set[str] = set()
    for example in examples:
        try:
            row = encode_example(example, kind, encoder, cfg)
        except InvalidRow as error:
            raise UserError(f"{example.location}: {error}") from error
        row = row._replace(location=example.location, given=given_row(example, taken, cfg) if keeps_rows else None)
        if kind == "texts":
            rows += _chunks(row, cfg.max_response_tokens, context)
            continue
        row, num_removed = remove_long_responses(row, cfg, context)
        if num_removed:
            dropped["responses that are too long, of prompts that keep others"] += num_removed
        reason = exceeded_limit(row, cfg, context)
        if not reason and kind == "prompts" and cfg.dedupe_prefix:
            prefix = prompt_as_text(example.prompt)[: cfg.dedupe_prefix]
            reason = "begin like an earlier prompt (data.dedupe_prefix)" if prefix in prefixes else ""
            prefixes.add(prefix)
        if reason:
            dropped[reason] += 1
        else:
            rows.append(row)
    return rows, dropped


def encode_example(example: Example, kind: str, encoder: Encoder, cfg: DataConfig) -> Row:
    """Return the row of an example, without its location. InvalidRow if the template cannot show it."""
    keys, tools = _split_keys(example), example.tools
    if kind == "texts":
        return Row("", [], "", (encoder.text(example.responses[0]),), (), keys)
    if kind == "demonstrations":
        answer = example.conversation[-1] if example.conversation else _answer(example.responses[0])
        earlier = example.prompt if isinstance(example.prompt, list) else []  # HH text too is a prompt
        if cfg.turns == "all" and any(turn["role"] == "assistant" and has_loss(turn) for turn in earlier):
            found = encoder.all_answers([*earlier, answer], tools)
            first = next(i for i, turn in enumerate(earlier) if turn["role"] == "assistant" and has_loss(turn))
            raw = _raw_prompt(earlier[:first])
            mask = tuple(found.loss_mask)
            return Row("", found.prompt, found.text, (found.response,), (), keys, mask, raw_prompt=raw)
        if not has_loss(answer):
            return Row("", [], "", ([],), (), keys, (False,))
        prompt, text = encoder.prompt(example.prompt, tools)
        response = encoder.answer(example.prompt, answer, tools)
        return Row("", prompt, text, (response,), (), keys, raw_prompt=_raw_prompt(example.prompt))
    prompt, text = encoder.prompt(example.prompt, tools)
    responses = tuple(encoder.answer(example.prompt, _answer(text), tools) for text in example.responses)
    return Row("", prompt, text, responses, example.ranks, keys, raw_prompt=_raw_prompt(example.prompt))


def _raw_prompt(prompt: Dialog) -> str:
    """Return a prompt as a person reads it. A single turn needs no name of its role."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0].get("content") or ""
    return prompt_as_text(prompt)


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def exceeded_limit(row: Row, cfg: DataConfig, context: int = 0) -> str:
    """Return why a row is left out, as a phrase after a number of rows; "" if it exceeds no limit and has a loss."""
    longest = max(map(len, row.responses), default=0)
    if not any(row.loss_mask or [True]):
        return "whose last answer has weight 0 (data.turns: all learns the others)"
    if len(row.prompt) > cfg.max_prompt_tokens:
        return f"with a prompt over {cfg.max_prompt_tokens} tokens (data.max_prompt_tokens)"
    if longest > cfg.max_response_tokens:
        return f"with a response over {cfg.max_response_tokens} tokens (data.max_response_tokens)"
    if context and len(row.prompt) + longest > context:
        return f"over the {context} tokens that the model leaves for them"
    return ""


def remove_long_responses(row: Row, cfg: DataConfig, context: int = 0) -> tuple[Row, int]:
    """Remove a comparison's responses that are too long; return the row and their number.

    The row stays as it is, and is dropped later, if the responses left do not have two different ranks.
    """
    limit = min(cfg.max_response_tokens, context - len(row.prompt) if context else cfg.max_response_tokens)
    kept = [i for i, response in enumerate(row.responses) if len(response) <= limit]
    if len(kept) == len(row.responses) or len({row.ranks[i] for i in kept if row.ranks}) < 2:
        return row, 0
    shorter = row._replace(responses=tuple(row.responses[i] for i in kept), ranks=tuple(row.ranks[i] for i in kept))
    return shorter, len(row.responses) - len(kept)


def _chunks(document: Row, max_tokens: int, context: int) -> Iterator[Row]:
    """Split a document into chunks. A last chunk of one token predicts nothing and is left out."""
    size = max(min(max_tokens, context or max_tokens), 2)
    ids = document.responses[0]
    for start in range(0, len(ids) - 1, size):
        yield document._replace(responses=(ids[start : start + size],))


def prompt_as_text(prompt: Dialog) -> str:
    """Return a prompt as one text, by which prompts are compared."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in prompt)


def _split_keys(example: Example) -> tuple[str, ...]:
    """Return the keys of an example for split_rows: one of its text, and one of its group if it has one."""
    text = prompt_as_text(example.prompt) if example.prompt else "".join(example.responses)
    key = "text " + hashlib.sha256(text.encode()).hexdigest()
    return (key, f"group {example.group}") if example.group else (key,)


def split_rows(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Split off about `fraction` of the sets of rows that are connected by keys; return (train, valid).

    Texts alone decide which sets are held out: the seed and the order of the rows do not matter, other rows hardly.
    """
    parent: dict[str, str] = {}  # union-find over the keys

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for row in rows if fraction else ():
        # The smallest key becomes the root of the set, so the roots do not depend on the order of the rows.
        first, *others = sorted(map(root, row.groups))
        parent.update(dict.fromkeys(others, first))
    roots = [root(row.groups[0]) for row in rows]
    sets = sorted(set(roots), key=lambda key: hashlib.sha256(key.encode()).digest())
    if not fraction or len(sets) < 2:
        return list(rows), []
    num_held_out = min(max(round(fraction * len(sets)), 1), len(sets) - 1)
    held_out = set(sets[:num_held_out])
    train = [row for row, key in zip(rows, roots, strict=True) if key not in held_out]
    valid = [row for row, key in zip(rows, roots, strict=True) if key in held_out]
    return train, valid
