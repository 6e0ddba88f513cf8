"""A model on the rows of a task: log-probabilities by the Scorer, or answers by a rollout, kept in an AnswerFile."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from rlhf_fast import __version__
from rlhf_fast.batches import Prompts
from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.config.fields import ModelConfig, SamplingConfig
from rlhf_fast.data.encode import PromptFormat
from rlhf_fast.errors import BadRows, UserError
from rlhf_fast.eval.answers import (
    DATE,
    FINISHED,
    OVERLONG,
    SECONDS,
    SHORTENED,
    TEMPLATE,
    UNKNOWN,
    AnswerFile,
    row_key,
)
from rlhf_fast.eval.encoding import PLAIN, Encoder
from rlhf_fast.eval.files import Row
from rlhf_fast.eval.generation import GenerationTask
from rlhf_fast.eval.likelihood import LikelihoodTask
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.info import model_sha256
from rlhf_fast.run.prompt_format import as_json, model_prompt_format, recorded_format
from rlhf_fast.scoring import Score, Scorer

Task = LikelihoodTask | GenerationTask
Record = dict[str, Any]
T = TypeVar("T")
FIRST_BLOCK, MAX_BLOCK, BLOCK_SECONDS = 16, 128, 20.0
"""Rows that are computed and kept together: so many at first and at the most, and as many as take these seconds."""


class EvaluatedModel:
    """A model by its name and path. It is loaded when an answer is missing.

    date: that which its chat template takes for today's, unless its run has recorded one.
    """

    def __init__(self, name: str, path: str, cfg: EvalConfig, date: datetime):
        self.name, self.path, self.cfg = name, path, cfg
        self.recorded_format = recorded_format(path)
        self.date = datetime.fromisoformat(self.recorded_format.get("date") or date.isoformat())
        self.weights = model_sha256(path) if Path(path).is_dir() else path
        self.sampling = SamplingConfig(
            temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens or sys.maxsize, batch=cfg.batch
        )
        self._model: Model | None = None

    def made_with(self, task: Task) -> dict[str, Any]:
        """Return everything but the row that the answers to a task depend on."""
        cfg = self.cfg
        found: dict[str, Any] = {"model": self.weights, "dtype": cfg.dtype, "template": cfg.template}
        found["version"] = __version__
        if self._uses_format(task):
            found["recorded_template"] = self.recorded_format
            found["date"] = self.date.isoformat()
        if isinstance(task, GenerationTask):
            found["max_new_tokens"] = min(task.max_new_tokens, self.sampling.max_new_tokens)
            found["temperature"] = cfg.temperature
            if cfg.temperature:
                found["seed"] = cfg.seed
        return found

    def run(self, task: Task, rows: Sequence[Row], progress: Callable[[int], None] | None = None) -> AnswerFile:
        """Return the answers to all rows; those that are missing are computed, block by block.

        progress: called after each block with the number of rows that are done.
        """
        file = AnswerFile(self.cfg.out, self.name, task.name, self.made_with(task))
        known = file.keys
        missing = list({key: row for row in rows if (key := row_key(row)) not in known}.values())
        done, size = len(rows) - len(missing), FIRST_BLOCK
        while missing:
            block, missing = missing[:size], missing[size:]
            began = time.perf_counter()
            file.append(block, self._compute(task, block))
            done += len(block)
            rate = len(block) / max(time.perf_counter() - began, 1e-9)
            size = max(1, min(MAX_BLOCK, round(rate * BLOCK_SECONDS)))
            if progress is not None:
                progress(done)
        return file

    def _compute(self, task: Task, rows: Sequence[Row]) -> list[Record]:
        """Return the records of rows, each with its share of the seconds, and the format of its prompt."""
        began = time.perf_counter()
        prompt_format, date = self._prompt_format if self._uses_format(task) else (PLAIN, None)
        encoder = Encoder(self.model.tokenizer, self.model.max_positions, prompt_format)
        try:
            if isinstance(task, LikelihoodTask):
                records = score_rows(self.model, task, rows, encoder)
            else:
                records = answer_rows(self.model, task, rows, encoder, self.sampling, self.cfg.seed)
        except BadRows as error:
            raise UserError(f"{task.name}: {self.name}: {error}") from error
        seconds = (time.perf_counter() - began) / len(rows)
        return [{**record, SECONDS: seconds, TEMPLATE: encoder.template, DATE: date} for record in records]

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def model(self) -> Model:
        if self._model is None:
            device = None if self.cfg.device == "auto" else self.cfg.device
            self._model = Model.load(ModelConfig(path=self.path, dtype=self.cfg.dtype), device=device)
        return self._model

    @cached_property
    def _prompt_format(self) -> tuple[PromptFormat, str | None]:
        """The format of requests to an assistant, and of all prompts where cfg.template names one; and the date that
        the prompts hold, if any."""
        tokenizer = self.model.tokenizer
        found, _ = model_prompt_format(self.path, tokenizer, self.cfg.template, "eval: template", strict=False)
        found = found._replace(date=self.date)
        return found, as_json(tokenizer, found)["date"]

    def _uses_format(self, task: Task) -> bool:
        return is_dialog(task) or self.cfg.template != "auto"


def is_dialog(task: Task) -> bool:
    """Return whether a task's prompts are put in the format that the model has learned."""
    return isinstance(task, GenerationTask) and task.is_dialog


def score_rows(model: Model, task: LikelihoodTask, rows: Sequence[Row], encoder: Encoder) -> list[Record]:
    """Return for each row the scores of its requests."""
    requests, cut, short = _encoded(rows, lambda row: task.requests(row, encoder), encoder)
    scores = iter(Scorer(model)([request for found in requests for request in found]))
    records: list[Record] = []
    for found, is_cut, is_short in zip(requests, cut, short, strict=True):
        own = [next(scores) for _ in found]
        logprobs, greedy = [score.logprob for score in own], [score.greedy for score in own]
        num_tokens = [score.num_tokens for score in own]
        unknown = unknown_share(encoder, [token for context, answer in found for token in (*context, *answer)])
        records.append(
            {
                "logprobs": logprobs,
                "greedy": greedy,
                "num_tokens": num_tokens,
                OVERLONG: is_cut,
                SHORTENED: is_short,
                UNKNOWN: unknown,
            }
        )
    return records


def answer_rows(
    model: Model, task: GenerationTask, rows: Sequence[Row], encoder: Encoder, sampling: SamplingConfig, seed: int = 0
) -> list[Record]:
    """Return for each row an answer, as far as it is judged. The task's stop texts and length replace those of
    `sampling`, unless that asks for a shorter one."""
    wanted = min(task.max_new_tokens, sampling.max_new_tokens)
    sampling = replace(sampling, max_new_tokens=encoder.max_new_tokens(wanted), stop=task.stop)
    tokens, cut, _ = _encoded(rows, lambda row: encoder.prompt(task.prompt(row), sampling.max_new_tokens), encoder)
    # the noise of an answer hangs on its row, so that it is the same whatever was computed before
    uids = [int(row_key(row)[:12], 16) for row in rows]
    responses = Rollout(model, sampling, seed).generate(Prompts(uids, tokens, [""] * len(rows)))
    texts, finished = responses.texts(model.tokenizer), responses.finished.tolist()
    unknown = [unknown_share(encoder, prompt) for prompt in tokens]
    parts = zip(rows, texts, responses.response_ids(), finished, cut, unknown, strict=True)
    return [
        {
            "prompt": task.question(row),
            "answer": task.cut(text),
            "tokens": len(ids),
            FINISHED: done,
            OVERLONG: is_cut,
            UNKNOWN: share,
        }
        for row, text, ids, done, is_cut, share in parts
    ]


def _encoded(
    rows: Sequence[Row], encode: Callable[[Row], T], encoder: Encoder
) -> tuple[list[T], list[bool], list[bool]]:
    """Return what `encode` makes of each row with the encoder, whether it cut a context, and whether its windows are
    short."""
    found, cut, short = [], [], []
    for row in rows:
        before = encoder.overlong, encoder.shortened
        found.append(encode(row))
        cut.append(encoder.overlong > before[0])
        short.append(encoder.shortened > before[1])
    return found, cut, short


def unknown_share(encoder: Encoder, tokens: Sequence[int]) -> float:
    """Return the share of tokens that stand for a text that the tokenizer does not know."""
    unknown = encoder.tokenizer.unk_token_id
    ends = (encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id)  # GPT-2's are all one
    return 0.0 if unknown is None or unknown in ends else sum(token == unknown for token in tokens) / len(tokens)


def read_scores(record: Record) -> list[Score]:
    """Return the scores of a row's requests from its record."""
    parts = zip(record["logprobs"], record["greedy"], record["num_tokens"], strict=True)
    return [Score(*part) for part in parts]
