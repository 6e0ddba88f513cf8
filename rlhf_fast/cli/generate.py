"""`rlhf-fast generate`: responses of a model to a file of prompts, as JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf_fast.batches import END, LIMIT, Responses
from rlhf_fast.cli.options import GenerateOptions
from rlhf_fast.config.fields import DataConfig, ModelConfig
from rlhf_fast.data import read_prompts
from rlhf_fast.errors import UserError, listed, locating_rows, writing
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout

AHEAD = 8
"""Batches of prompts that a rollout is given at once, to fill places that come free; also what is written at a time."""


def generate(options: GenerateOptions) -> int:
    """Writes the responses batch by batch and returns how many there are."""
    device = None if options.device == "auto" else options.device
    model = Model.load(ModelConfig(path=options.model, dtype=options.dtype), device=device)
    room = model.max_positions - options.sampling.max_new_tokens if model.max_positions else 0
    if model.max_positions and room < 1:
        raise UserError(
            f"generate: max_new_tokens is {options.sampling.max_new_tokens}, but {options.model} has only"
            f" {model.max_positions} positions, prompt included; give a smaller --max-new-tokens"
        )
    cfg = DataConfig(
        path=options.prompts, limit=options.limit, template=options.template, columns=options.columns,
        max_prompt_tokens=sys.maxsize,
    )  # fmt: skip
    prompts = read_prompts(cfg, model.tokenizer).train
    long = [row.location for row in prompts.rows if room and len(row.prompt) > room]
    if long:
        raise UserError(
            f"generate: {len(long)} of {len(prompts)} prompts are over the {room} tokens that max_new_tokens"
            f" {options.sampling.max_new_tokens} leaves of {model.max_positions} positions; give a smaller"
            f" --max-new-tokens or remove them ({listed(long)})"
        )
    print(f"generate: {prompts.notes}", file=sys.stderr)
    rollout, written = Rollout(model, options.sampling, options.seed), 0
    count = max(AHEAD * options.sampling.batch // options.n, 1)
    with _target(options.out) as stream, _Meter(len(prompts) * options.n, options.out == "-") as meter:
        for batch in prompts.in_order(count):
            with locating_rows(Responses=prompts.location):
                responses = rollout.generate(batch, options.n, progress=meter)
            for i, row in enumerate(_rows(model, options, responses)):
                stream.write(json.dumps({"prompt": batch.texts[i // options.n]} | row, ensure_ascii=False) + "\n")
                written += 1
            stream.flush()
    return written


def _rows(model: Model, options: GenerateOptions, responses: Responses) -> Iterator[dict]:
    """What is written of each response: its text, tokens, whether and why it ended, log-probability in nats."""
    ids = responses.response_ids()
    texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    sums = (responses.logprobs * responses.mask).sum(1).tolist()
    for text, tokens, reason, logprob in zip(texts, ids, responses.finish_reasons.tolist(), sums, strict=True):
        which = None
        if reason == END:
            which = model.tokenizer.convert_ids_to_tokens(tokens[-1])
        elif reason != LIMIT:
            said = model.tokenizer.decode(tokens)
            which = next((stop for stop in options.sampling.stop if stop in said), None)
        yield {
            "completion": text, "tokens": len(tokens), "finished": reason != LIMIT,
            "finish_reason": "length" if reason == LIMIT else "stop", "stop_reason": which, "logprob": logprob,
        }  # fmt: skip


class _Meter:
    """Responses done and tokens a second, to standard error: a live line on a terminal, else a line now and then."""

    EVERY = 5.0
    """Seconds between two plain lines."""

    def __init__(self, total: int, to_stdout: bool):
        self.console, self.total = Console(stderr=True, highlight=False), total
        self.done, self.tokens, self.start = 0, 0, time.perf_counter()
        self.told, self.live = self.start, None
        if self.console.is_terminal and not (to_stdout and sys.stdout.isatty()):
            columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[speed]}"))
            self.live = Progress(
                TextColumn("generate"), *columns, console=self.console, redirect_stdout=False, redirect_stderr=False
            )
            self.task = self.live.add_task("", total=total, speed="")

    def __enter__(self) -> _Meter:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self._tell(time.perf_counter())
            self.live.stop()
        elif self.done:
            self._tell(time.perf_counter())

    def __call__(self, tokens: int, ended: int) -> None:
        self.tokens += tokens
        self.done += ended
        now = time.perf_counter()
        if now - self.told >= (0.1 if self.live else self.EVERY):
            self._tell(now)

    def _tell(self, now: float) -> None:
        self.told = now
        speed = f"{self.tokens / max(now - self.start, 1e-9):.3g} tok/s"
        if self.live:
            self.live.update(self.task, completed=self.done, speed=speed)
        else:
            self.console.print(f"generate: {self.done}/{self.total}  {speed}", markup=False, soft_wrap=True)


@contextmanager
def _target(out: str) -> Iterator[TextIO]:
    if out == "-":
        yield sys.stdout
        return
    with writing(out), open(out, "w", encoding="utf-8") as stream:
        yield stream
