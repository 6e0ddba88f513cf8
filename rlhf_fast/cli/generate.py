"""`rlhf-fast generate`: sample responses to a file of prompts and write them as JSON lines.

A line has the columns of its input row and ours: first the prompt as given, at the end RESPONSE and SCORES, by which
the files that this command wrote are known again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from rlhf_fast.batches import EOS, LENGTH, Prompts, Responses
from rlhf_fast.cli.options import GenerateOptions
from rlhf_fast.cli.streams import is_closed, is_utf8
from rlhf_fast.config.data_path import parts, shown_path
from rlhf_fast.config.fields import DataConfig, ModelConfig
from rlhf_fast.config.rewards import is_function, reward_specs, short_names, spec_name
from rlhf_fast.data import Dataset, read_prompts
from rlhf_fast.data.files import require_data
from rlhf_fast.data.row_columns import NOT_PASSED, Wanted
from rlhf_fast.errors import UserError, listed, row_locations
from rlhf_fast.eval.model_check import check_model
from rlhf_fast.model.model import Model
from rlhf_fast.model.rope_scaling import length_dependent_rope
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.logs import read_rows
from rlhf_fast.run.outputs import PARTIAL, check_new_file, read_run, replacing
from rlhf_fast.run.prompt_format import model_prompt_format
from rlhf_fast.run.terminal import LiveLine, format_speed, has_cursor
from rlhf_fast.stages.fit import check_device
from rlhf_fast.training.rewards import Reward, check_function, load_reward

RESPONSE = ("completion", "tokens", "finished", "finish_reason", "stop_reason", "logprob")
SCORES = ("reward", "value")
"""Columns at the end of a row."""
PART = "rewards/"
"""Start of the name of the column of each of several rewards, behind SCORES."""
ALL_COLUMNS = Wanted("generate", optional=tuple(NOT_PASSED), rest=True)
RENAMED = "input_"
"""Prefix of a column of the input row that has the name of one of ours."""
FIRST_BYTES = b'{"prompt": '
"""Start of every line of the output."""

BATCHES_PER_CALL = 8
"""Batches of responses per rollout, so that waiting prompts can refill freed slots. Rows are written after each."""


def generate(options: GenerateOptions, may_shorten: bool = False) -> int:
    """Write the responses, rollout by rollout, and return their number.

    may_shorten: where the prompts and max_new_tokens do not fit the model's positions, responses are shorter.
    """
    _check_output(options)
    check_device("generate", options.device)
    device = None if options.device == "auto" else options.device
    model = Model.load(ModelConfig(path=options.model, dtype=options.dtype), device=device)
    scorers = dict(_scorers(options, model, device))
    prompts = _read_prompts(options, model, [wanted for scorer in scorers.values() for wanted in scorer.wanted])
    print(f"generate: {prompts.notes}", file=sys.stderr)
    if may_shorten:
        options = _with_length_that_fits(options, model, prompts)
    _check_lengths(options, model, prompts)
    rows = list(_input_rows(prompts, options))
    rollout = Rollout(model, options.sampling, options.seed)
    prompts_per_call = max(BATCHES_PER_CALL * options.sampling.batch // options.n, 1)
    written = 0
    with _output(options.out) as stream, _Progress(len(prompts) * options.n, options.out == "-") as progress:
        for batch in prompts.in_order(prompts_per_call):
            with row_locations(Responses=prompts.location):
                responses = rollout.generate(batch, options.n, progress=progress)
                scores = _scores(scorers, responses, batch)
            for i, row in enumerate(_rows(model, options, responses)):
                given = rows[batch.uids[i // options.n]] | {"rendered_prompt": batch.texts[i // options.n]}
                row = given | row | {name: values[i] for name, values in scores.items()}
                stream.write(json.dumps(row, ensure_ascii=not is_utf8(stream)) + "\n")
                written += 1
            stream.flush()
    return written


def with_trained_length(options: GenerateOptions) -> GenerateOptions:
    """Return the options with the longest response that PPO has trained the model with, if a run of ours wrote it."""
    saved: dict[str, Any] = {}
    with suppress(UserError):  # a run.json of another program says nothing
        saved = read_run(options.model)
    length = saved["config"].get("sampling", {}).get("max_new_tokens", 0) if saved.get("stage") == "ppo" else 0
    if not length or length == options.sampling.max_new_tokens:
        return options
    print(f"generate: max_new_tokens is {length}, with which {options.model} was trained", file=sys.stderr)
    return replace(options, sampling=replace(options.sampling, max_new_tokens=length))


def _read_prompts(options: GenerateOptions, model: Model, wanted: Sequence[Wanted]) -> Dataset:
    """Return the prompts with the columns of their rows. wanted: those that the reward reads."""
    cfg = DataConfig(
        path=options.prompts,
        limit=options.limit,
        template=options.template,
        columns=options.columns,
        remove_columns=options.remove_columns,
        max_prompt_tokens=sys.maxsize,
    )
    prompt_format, notes = model_prompt_format(
        options.model, model.tokenizer, options.template, "template", strict=False
    )
    for note in notes:
        print(f"generate: {note}", file=sys.stderr)
    return read_prompts(cfg, model.tokenizer, prompt_format=prompt_format, wanted=[ALL_COLUMNS, *wanted]).train


def _with_length_that_fits(options: GenerateOptions, model: Model, prompts: Dataset) -> GenerateOptions:
    """Return the options with the longest response for which every prompt leaves the positions.

    One prompt alone does not make them tiny: below an eighth of the positions nothing is changed, and it is refused."""
    longest = max((len(row.prompt) for row in prompts.rows), default=0)
    rope = length_dependent_rope(model)
    positions = rope.original_positions if rope else model.max_positions  # a rollout refuses more
    room, sampling = positions - longest, options.sampling
    smallest = max(sampling.min_new_tokens, positions // 8, 1)
    if not positions or sampling.max_new_tokens <= room or room < smallest:
        return options
    print(
        f"generate: max_new_tokens is {room}, as the longest prompt takes {longest} of the {positions}"
        f" positions of {options.model}",
        file=sys.stderr,
    )
    return replace(options, sampling=replace(sampling, max_new_tokens=room))


def _check_lengths(options: GenerateOptions, model: Model, prompts: Dataset) -> None:
    """Raise UserError if a prompt and max_new_tokens do not fit the model's positions."""
    max_new_tokens, positions = options.sampling.max_new_tokens, model.max_positions
    if positions and max_new_tokens >= positions:
        raise UserError(
            f"generate: max_new_tokens is {max_new_tokens}, but {options.model} has only {positions} positions, prompt"
            " included; give a smaller --max-new-tokens"
        )
    limit = positions - max_new_tokens
    too_long = [row.location for row in prompts.rows if positions and len(row.prompt) > limit]
    if too_long:
        raise UserError(
            f"generate: {len(too_long)} of {len(prompts)} prompts are over the {limit} tokens that max_new_tokens"
            f" {max_new_tokens} leaves of {positions} positions; give a smaller --max-new-tokens or remove them"
            f" ({listed(too_long)})"
        )


def _input_rows(prompts: Dataset, options: GenerateOptions) -> Iterator[dict[str, Any]]:
    """Yield for each prompt its row: the prompt as given, then the other columns. One that has the name of a column of
    ours is renamed, and named on stderr."""
    written = ("prompt", "rendered_prompt", *RESPONSE, *_score_names(options))
    renamed: dict[str, str] = {}
    for row in prompts.rows:
        assert row.given is not None
        left_out = {*options.remove_columns, *row.given.absent}
        given = {name: value for name, value in row.given.columns.items() if name not in left_out}
        prompt = row.given.prompt
        if options.columns.get("prompt", "prompt") == "prompt" and "prompt" in given:
            prompt = given.pop("prompt")
        clashes = [name for name in given if name in written]
        if taken := [name for name in clashes if f"{RENAMED}{name}" in given]:
            raise UserError(
                f"{row.location}: has {listed(taken)}, which generate writes itself, and also the names that they would"
                f" get, {listed([f'{RENAMED}{name}' for name in taken])}; leave some out with --remove-columns"
                f" {' '.join(taken)}"
            )
        renamed |= {name: f"{RENAMED}{name}" for name in clashes}
        yield {"prompt": prompt} | {renamed.get(name, name): value for name, value in given.items()}
    if renamed:
        names = ", ".join(f"{name} as {other}" for name, other in renamed.items())
        print(
            f"generate: {shown_path(options.prompts)}: columns that generate writes itself are kept as others: {names}",
            file=sys.stderr,
        )


def _scorers(options: GenerateOptions, model: Model, device: str | None) -> Iterator[tuple[str, Reward]]:
    """Yield the functions that fill the columns reward and value. A value model scores as a reward model does."""
    cfg = ModelConfig(dtype=options.dtype)
    if options.reward:
        weights = options.reward_weights
        yield "reward", load_reward(options.reward, model.tokenizer, cfg, weights=weights, device=device)
    if options.value:
        yield "value", load_reward(options.value, model.tokenizer, cfg, device=device)


def _score_names(options: GenerateOptions) -> list[str]:
    """Return the names of the columns with scores."""
    names = short_names(reward_specs(options.reward))
    own = [f"{PART}{name}" for name in names] if len(names) > 1 else []
    return [*(name for name in SCORES if getattr(options, name)), *own]


def _scores(scorers: Mapping[str, Reward], responses: Responses, prompts: Prompts) -> dict[str, Sequence[float | None]]:
    """Return the columns with the scores: the sum of several rewards, and each of them."""
    found: dict[str, Sequence[float | None]] = {}
    own: dict[str, Sequence[float | None]] = {}
    for name, scorer in scorers.items():
        scores = scorer.score(responses, prompts)
        found[name] = scores.total.tolist()
        if len(scorer.parts) > 1:
            own = {f"{PART}{part}": column for part, column in zip(scorer.names, scores.columns, strict=True)}
    return found | own


def _rows(model: Model, options: GenerateOptions, responses: Responses) -> Iterator[dict[str, Any]]:
    """Yield for each response its text, number of tokens, why it ended, and its log-probability in nats."""
    ids = responses.response_ids()
    texts = responses.texts(model.tokenizer)
    logprobs = (responses.logprobs * responses.mask).sum(1).tolist()
    reasons, stops = responses.finish_reasons.tolist(), options.sampling.stop
    assert responses.stop_indices is not None
    indices = responses.stop_indices.tolist()
    for text, tokens, reason, index, logprob in zip(texts, ids, reasons, indices, logprobs, strict=True):
        stop_reason = stops[index] if index >= 0 else None
        if reason == EOS:
            stop_reason = model.tokenizer.convert_ids_to_tokens(tokens[-1])
        yield {
            "completion": text,
            "tokens": len(tokens),
            "finished": reason != LENGTH,
            "finish_reason": "length" if reason == LENGTH else "stop",
            "stop_reason": stop_reason,
            "logprob": logprob,
        }


class _Progress:
    """Responses finished and tokens per second, on stderr: a live line on a terminal, else a line now and then."""

    PLAIN_INTERVAL = 5.0
    """Seconds between two plain lines."""
    LIVE_INTERVAL = 0.1

    def __init__(self, total: int, to_stdout: bool):
        """to_stdout: the rows go to stdout; if that is the terminal, a live line would run into them."""
        self.console, self.total = Console(stderr=True, highlight=False), total
        self.finished, self.tokens = 0, 0
        self.start = self.last_shown = time.perf_counter()
        self.live: LiveLine | None = None
        if has_cursor(self.console) and not (to_stdout and sys.stdout.isatty()):
            self.live = LiveLine(self.console, "generate", total, redirect=False)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self._show(time.perf_counter())
            self.live.stop()
        elif self.finished:
            self._show(time.perf_counter())

    def __call__(self, tokens: int, finished: int) -> None:
        """Count what one step of the rollout sampled and finished."""
        self.tokens += tokens
        self.finished += finished
        now = time.perf_counter()
        if now - self.last_shown >= (self.LIVE_INTERVAL if self.live else self.PLAIN_INTERVAL):
            self._show(now)

    def _show(self, now: float) -> None:
        self.last_shown = now
        speed = format_speed(self.tokens / max(now - self.start, 1e-9))
        if self.live:
            self.live.update(self.finished, [speed])
        else:
            self.console.print(f"generate: {self.finished}/{self.total}  {speed}", markup=False, soft_wrap=True)


def _check_output(options: GenerateOptions) -> None:
    """Raise UserError, before anything is loaded, if the responses cannot be written or would replace other rows."""
    require_data(options.prompts, pipe=True)
    if is_function(options.value):
        raise UserError(f"generate: value is {options.value}, a function; give the folder of a value model")
    for name, specs in (("reward", options.reward), ("value", options.value)):
        for spec in reward_specs(specs):
            if is_function(spec):
                check_function(spec, f"generate: {name}")
            else:
                check_model(str(spec), "scalar", name, {}, "generate")
    if options.out != "-":
        inputs = [("--prompts", path) for path in parts(options.prompts)]
        inputs += [("--model", options.model), ("--value", options.value)]
        inputs += [("--reward", spec_name(spec)) for spec in reward_specs(options.reward)]
        check_new_file(options.out, _is_output, [(name, path) for name, path in inputs if path and Path(path).exists()])
        out = Path(options.out)
        if out.is_file() and out.stat().st_size and not options.overwrite:  # they may have been edited since
            raise UserError(
                f"{options.out}: holds responses already; choose another --out, remove it, or replace it with"
                " --overwrite"
            )
    elif is_closed(sys.stdout):
        raise UserError("generate: standard output is closed; give a file with --out")


def _is_output(file: Path) -> bool:
    """Return whether `generate` wrote every row of the file. The last line of an unfinished one may be cut short."""
    try:
        rows = [row for _, row in read_rows(file)]
        lines = [line for line in file.read_bytes().split(b"\n") if line]
    except (OSError, UserError):
        return False
    torn = lines[len(rows) :]
    if torn and (file.suffix != PARTIAL or not torn[0].startswith(FIRST_BYTES[: len(torn[0])])):
        return False
    return all(_is_ours(row) for row in rows)


def _is_ours(row: Mapping[str, Any]) -> bool:
    """Return whether a row begins and ends with the columns that `generate` writes, in their order. A column that a
    user has added stands behind them."""
    names = list(row)
    while names and (names[-1] in SCORES or names[-1].startswith(PART)):
        names.pop()
    return names[:1] == ["prompt"] and tuple(names[-len(RESPONSE) :]) == RESPONSE


@contextmanager
def _output(path: str) -> Iterator[TextIO]:
    """Open the output file; "-" is stdout. The rows go to PATH.partial, which becomes PATH when all are there."""
    if path == "-":
        yield sys.stdout
        return
    with replacing(path, keep=True) as unfinished:
        try:
            with unfinished.open("w", encoding="utf-8") as stream:
                yield stream
        except BaseException:
            print(f"generate: not finished; the rows so far are in {unfinished}", file=sys.stderr)
            raise
