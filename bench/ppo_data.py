"""Sizes of the PPO step's bench and its inputs: prompts, lengths of responses, ranked responses.

Random weights never sample an end token. So a rollout makes `new` tokens for each prompt on both sides, and a ragged
case cuts the responses after it: to log-normal lengths, or, in a real case, to those of the responses in `--rankings`.
A real case takes its prompts from `--prompts`, in the order in which `rlhf-fast ppo` would with seed 0. Prompts,
responses and ranked responses are cut to the case's `prompt` and `new` tokens. A tokenizer of fewer tokens than the
shape's vocabulary uses that many of its rows; its texts are longer in tokens.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_fast.batches import Comparisons, Prompts, Responses, pad_rows, response_mask
from rlhf_fast.bench.decode_step import prompts
from rlhf_fast.bench.shapes import SMOLLM2_135M, STORIES_260K, TINY
from rlhf_fast.config.fields import DataConfig, ModelConfig
from rlhf_fast.data.datasets import Dataset, Row, join_comparisons, read_comparisons, read_prompts
from rlhf_fast.errors import UserError
from rlhf_fast.model.pretrained import load_tokenizer


@dataclass(frozen=True)
class Sizes:
    """Amounts that are measured."""

    shape: dict
    prompt: int = 128
    new: int = 128
    batch: int = 64
    minibatch: int = 64
    inner_epochs: int = 1
    micro_batch_tokens: int = 8192
    rounds: int = 3
    warm_ups: int = 1
    """Calls of both sides after the first and before the measured ones, on a GPU: ours capture graphs, for each size of
    micro-batch."""
    ragged: bool = False
    """Prompts of 1 to `prompt` tokens, as many short ones as people write; responses are cut to 1 to `new` tokens."""
    real: bool = False
    """Prompts and responses have the lengths of those in files. A real case is ragged too."""

    @property
    def name(self) -> str:
        return next((name for name, shape in NAMES if self.shape is shape), "tiny")

    @property
    def words(self) -> str:
        limit = "up to " if self.ragged else ""
        minibatches = f", minibatches of {self.minibatch}" if self.minibatch != self.batch else ""
        epochs = f", {self.inner_epochs} epochs" if self.inner_epochs > 1 else ""
        real = ", real lengths" if self.real else ""
        return f"{self.batch} responses of {limit}{self.prompt} + {self.new} tokens{minibatches}{epochs}{real}"

    @property
    def groups(self) -> int:
        """Prompts of a step of reward training."""
        return max(self.minibatch, 2)

    def tiny(self) -> "Sizes":
        """Return amounts of no size for the same case. A real one has the vocabulary of any small tokenizer."""
        shape = TINY | {"vocab_size": 512} if self.real else TINY
        return replace(TINY_SIZES, shape=shape, ragged=self.ragged, real=self.real)


NAMES = (("135M", SMOLLM2_135M), ("260K", STORIES_260K))
TINY_SIZES = Sizes(TINY, prompt=5, new=6, batch=4, minibatch=4, micro_batch_tokens=22, rounds=1)
CASES = {
    "135M": Sizes(SMOLLM2_135M),
    "135M-small": Sizes(SMOLLM2_135M, prompt=16, new=64, batch=8, minibatch=2),
    "135M-ragged": Sizes(SMOLLM2_135M, prompt=128, new=128, batch=32, minibatch=8, ragged=True, warm_ups=4),
    "135M-real": Sizes(
        SMOLLM2_135M, prompt=128, new=128, batch=32, minibatch=8, rounds=2, ragged=True, real=True, warm_ups=4
    ),
    "260K": Sizes(STORIES_260K, prompt=16, new=64, batch=64, minibatch=16, inner_epochs=4, rounds=5),
}
"""Sizes by name; the first is for a GPU, the others are for a CPU. "real" ones need `--prompts` and `--tokenizer`."""


class Records:
    """Prompts and ranked responses of files, as tokens."""

    def __init__(self, prompts: str, rankings: str, tokenizer: str):
        encoder = load_tokenizer(ModelConfig(path=tokenizer))
        cfg = DataConfig(path=prompts, max_prompt_tokens=sys.maxsize, max_response_tokens=sys.maxsize)
        self.prompt_rows = read_prompts(cfg, encoder).train
        self.ranked_rows = read_comparisons(replace(cfg, path=rankings), encoder).train if rankings else None

    @classmethod
    def of(cls, options: argparse.Namespace, cases: Iterable[Sizes]) -> "Records | None":
        """Return the files of the options if one of the cases is real; raise UserError where an option is missing."""
        if not any(sizes.real for sizes in cases):
            return None
        if not (options.prompts and options.tokenizer):
            raise UserError("a real case needs --prompts FILE.jsonl and --tokenizer FOLDER")
        return cls(options.prompts, options.rankings, options.tokenizer)

    def prompts(self, sizes: Sizes) -> Prompts:
        """Return the batch of prompts."""
        found = self.prompt_rows.batch(0, sizes.batch)
        tokens = [row[: sizes.prompt] for row in found.tokens]
        check_vocabulary(tokens, sizes.shape)
        return found._replace(tokens=tokens)

    def response_lengths(self, sizes: Sizes) -> Tensor | None:
        """Return lengths (B,) of the best responses to as many ranked prompts; None without ranked responses."""
        if self.ranked_rows is None:
            return None
        rows = first_rows(self.ranked_rows, sizes.batch)
        return torch.tensor([len(row.responses[min(range(len(row.ranks)), key=row.ranks.__getitem__)]) for row in rows])

    def comparisons(self, sizes: Sizes) -> Comparisons | None:
        """Return the batch of a step of reward training; None without ranked responses."""
        if self.ranked_rows is None:
            return None
        rows = [
            row._replace(prompt=row.prompt[: sizes.prompt], responses=tuple(x[: sizes.new] for x in row.responses))
            for row in first_rows(self.ranked_rows, sizes.groups)
        ]
        check_vocabulary([row.prompt + response for row in rows for response in row.responses], sizes.shape)
        return join_comparisons(rows, [*range(len(rows))])


def first_rows(data: Dataset, count: int) -> list[Row]:
    """Return the first rows in the order of training, which is shuffled."""
    return [data[data.row_at(position)] for position in range(count)]


def check_vocabulary(tokens: list[list[int]], shape: dict) -> None:
    """Raise UserError if a token has no row in the shape's vocabulary."""
    largest = max(map(max, tokens))
    if largest >= shape["vocab_size"]:
        raise UserError(f"--tokenizer has a token {largest}, the shape only {shape['vocab_size']}; take a smaller one")


def ragged_lengths(count: int, longest: int, seed: int) -> Tensor:
    """Return (count,) lengths of 1 to `longest`, log-normal around a fifth of it; the first is `longest`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (longest / 5 * torch.randn(count, generator=generator).exp()).long().clamp(1, longest)
    lengths[0] = longest
    return lengths


def cut(responses: Responses, sizes: Tensor) -> Responses:
    """Return the responses with at most `sizes` (B,) tokens each, as if an end token had been sampled."""
    lengths = torch.minimum(responses.lengths, responses.prompt_lengths + sizes)
    mask = response_mask(responses.prompt_lengths, lengths)
    names = ("logprobs", "raw_logprobs", "kept_logprobs", "entropy")
    fields = {name: torch.where(mask, getattr(responses, name)[:, : mask.shape[1]], 0) for name in names}
    return responses._replace(tokens=responses.tokens[:, : int(lengths.max())], lengths=lengths, mask=mask, **fields)


def make_prompts(sizes: Sizes, records: Records | None) -> Prompts:
    """Return the prompts of a case: real ones, or random tokens."""
    if sizes.real and records:
        return records.prompts(sizes)
    found = prompts(sizes.shape, sizes.batch, sizes.prompt)
    if not sizes.ragged:
        return found
    lengths = ragged_lengths(sizes.batch, sizes.prompt, seed=0).tolist()
    return found._replace(tokens=[row[:length] for row, length in zip(found.tokens, lengths, strict=True)])


def response_lengths(sizes: Sizes, records: Records | None) -> Tensor:
    """Return the most tokens (B,) of each response."""
    real = records.response_lengths(sizes) if sizes.real and records else None
    return ragged_lengths(sizes.batch, sizes.new, seed=1) if real is None else real


def make_comparisons(sizes: Sizes, records: Records | None) -> Comparisons:
    """Return ranked responses: real ones, or random tokens, 2 to 9 responses a prompt."""
    if sizes.real and records and (real := records.comparisons(sizes)) is not None:
        return real
    counts = [2 + i % 8 for i in range(sizes.groups)]
    lengths = ragged_lengths(sum(counts), sizes.new, seed=2)
    rows, prompts_of = [], ragged_lengths(len(counts), sizes.prompt, seed=3)
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    generator, vocabulary = torch.Generator().manual_seed(4), sizes.shape["vocab_size"]
    starts = [torch.randint(1, vocabulary, (n,), generator=generator) for n in prompts_of.tolist()]
    for prompt, length in zip(owner.tolist(), lengths.tolist(), strict=True):
        response = torch.randint(1, vocabulary, (length,), generator=generator)
        rows.append([*starts[prompt].tolist(), *response.tolist()])
    tokens, totals = pad_rows(rows)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    ranks = torch.cat([torch.randperm(count, generator=generator) for count in counts])
    return Comparisons(tokens, prompts_of[owner], totals, offsets, ranks)
