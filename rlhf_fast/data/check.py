"""`rlhf-fast check FILE`: the contents and the errors of a data file, and one row as the model will see it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf_fast.config.fields import DataConfig
from rlhf_fast.data.columns import EXPECTED, require_our_names
from rlhf_fast.data.datasets import Row, encode_example, exceeded_limit, prompt_as_text, remove_long_responses
from rlhf_fast.data.encode import Encoder
from rlhf_fast.data.fields import InvalidRow
from rlhf_fast.data.json_lines import parse_object, read_lines
from rlhf_fast.data.notes import (
    SHOWN_LINES,
    absent_columns,
    answers_without_loss,
    find_markers,
    rendered_rows,
    spelled_markers,
    unknown_tokens,
    unused_columns,
)
from rlhf_fast.data.rows import KINDS, Example, parse_lines
from rlhf_fast.errors import UserError, listed

GUESS_ROWS = 50
SHOWN_ERRORS = 20
SHOWN_TOKENS = 48
CATEGORIES = {"null": "null fields", "empty": "empty fields", "equal": "chosen equal to rejected", "other": "other"}

Echo = Callable[[str], None]


@dataclass
class Report:
    """Examples and errors of a file. Errors are pairs (line, error); a file without any can be trained on."""

    kind: str
    examples: list[Example] = field(default_factory=list)
    errors: list[tuple[int, InvalidRow]] = field(default_factory=list)


def guess_kind(
    path: str | Path, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], first_error: str = ""
) -> str:
    """Return the kind whose columns most of the rows have. UserError if no row fits a kind.

    first_error: line and fault of the first line that is no JSON object.
    """
    counts: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for row in rows:
        found.update(row.keys())
        names = set(row) | {ours for ours, theirs in columns.items() if theirs in row}
        if names & {"chosen", "rejected", "responses", "ranks"} or isinstance(row.get("completions"), list):
            counts["comparisons"] += 1
        elif names & {"completion", "response", "messages", "conversations", "output"}:
            counts["demonstrations"] += 1
        elif names & {"prompt", "instruction"}:
            counts["prompts"] += 1
        elif "text" in names:
            counts["texts"] += 1
    if not counts:
        columns_found = (
            f"it has the columns {', '.join(found)}" if found else f"no line is a JSON object ({first_error})"
        )
        raise UserError(f"{path}: cannot tell what the rows are: {columns_found}; expected {_expected_of_kinds()}")
    return counts.most_common(1)[0][0]


def _expected_of_kinds() -> str:
    return "; ".join(f"{EXPECTED[kind]} ({kind})" for kind in KINDS)


def examine(cfg: DataConfig, kind: str = "") -> Report:
    """Read every row, once, so that a pipe will do. UserError only for a file that cannot be read or holds no rows."""
    path = cfg.path
    require_our_names(path, cfg.columns)
    lines = read_lines(path)
    first: list[tuple[int, bytes]] = []
    if not kind:
        rows: list[Mapping[str, Any]] = []
        first_error = ""
        for number, line in lines:
            first.append((number, line))
            try:
                rows.append(parse_object(line, unique_keys=False))
            except InvalidRow as error:
                first_error = first_error or f"line {number}: {error}"
                continue
            if len(rows) == GUESS_ROWS:
                break
        if first:
            kind = guess_kind(path, rows, cfg.columns, first_error)
    report = Report(kind)
    for number, found in parse_lines(chain(first, lines), kind, cfg.columns, cfg.remove_columns):
        if isinstance(found, InvalidRow):
            report.errors.append((number, found))
        else:
            report.examples.append(found)
        if cfg.limit and len(report.examples) + len(report.errors) == cfg.limit:
            break
    if not report.examples and not report.errors:
        expected = EXPECTED[kind] if kind else _expected_of_kinds()
        raise UserError(f"{path}: the file holds no rows; expected JSON lines with {expected}")
    return report


def check(cfg: DataConfig, kind: str = "", tokenizer: Any = None, echo: Echo = print) -> int:
    """Print the report and return the number of errors."""
    report = examine(cfg, kind)
    examples, errors = report.examples, report.errors
    echo(f"{cfg.path}: {len(examples) + len(errors)} rows read as {report.kind}, {len(errors)} with errors")
    if errors:
        _echo_errors(cfg.path, errors, echo)
    if not examples:
        return len(errors)
    unused, earlier = unused_columns(examples), answers_without_loss(examples, cfg.turns)
    absent = absent_columns(examples, cfg.remove_columns)
    for note in (f"not used: {unused}" if unused else "", absent, earlier):
        if note:
            echo(f"  {note}")
    _echo_repeats(report, echo)
    prompt_sizes = [len(prompt_as_text(example.prompt)) for example in examples]
    response_sizes = [len(response) for example in examples for response in example.responses]
    _echo_lengths("characters", prompt_sizes, response_sizes, echo)
    if report.kind == "comparisons":
        counts = Counter(len(example.responses) for example in examples)
        echo("  responses a prompt: " + ", ".join(f"{count}: {counts[count]} rows" for count in sorted(counts)))
        ties = sum(len(example.ranks) > len(set(example.ranks)) for example in examples)
        echo(f"  rows with ties: {ties}")
    if tokenizer is None:
        markers = spelled_markers(find_markers(examples, ()))
        if markers:
            echo(f"  {markers}")
        echo("  give --tokenizer DIR to see tokens, over-long rows and special tokens in the text")
        return len(errors)
    return len(errors) + _echo_tokens(cfg, report, tokenizer, echo)


def _echo_errors(path: str, errors: Sequence[tuple[int, InvalidRow]], echo: Echo) -> None:
    counts = Counter(error.category for _, error in errors)
    found = [f"{counts[category]} {words}" for category, words in CATEGORIES.items() if category in counts]
    echo(f"  errors: {', '.join(found)}")
    for line, error in errors[:SHOWN_ERRORS]:
        echo(f"  {path}:{line}: {error}")
    if len(errors) > SHOWN_ERRORS:
        echo(f"  ... and {len(errors) - SHOWN_ERRORS} more")


def _echo_repeats(report: Report, echo: Echo) -> None:
    first_line: dict[str, int] = {}
    repeats: list[str] = []
    prompts: set[str] = set()
    for example in report.examples:
        row = (example.prompt, example.responses, example.ranks, example.tools, example.conversation)
        first = first_line.setdefault(repr(row), example.line)
        if first != example.line:
            repeats.append(f"{example.line} = {first}")
        prompts.add(prompt_as_text(example.prompt))
    lines = f" (lines {listed(repeats, SHOWN_LINES)})" if repeats else ""
    echo(f"  duplicate rows: {len(repeats)}{lines}")
    if report.kind != "texts":
        echo(f"  different prompts: {len(prompts)}")


def _echo_lengths(unit: str, prompts: list[int], responses: list[int], echo: Echo) -> None:
    for name, lengths in (("prompt", sorted(prompts)), ("response", sorted(responses))):
        if any(lengths):
            percentile = lengths[min(int(0.95 * len(lengths)), len(lengths) - 1)]
            median = statistics.median(lengths)
            echo(f"  {name} {unit}: shortest {lengths[0]}, median {median:g}, 95 % {percentile}, longest {lengths[-1]}")


def _echo_tokens(cfg: DataConfig, report: Report, tokenizer: Any, echo: Echo) -> int:
    """Print lengths, exceeded limits, special tokens and one row. Return the number of rows that no stage takes."""
    encoder = Encoder(tokenizer, cfg.template, cfg.append_eos)
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    num_refused = 0
    for example in report.examples:
        try:
            row = encode_example(example, report.kind, encoder, cfg)
        except InvalidRow as error:
            num_refused += 1
            if num_refused <= SHOWN_ERRORS:
                echo(f"  {cfg.path}:{example.line}: {error}")
            continue
        rows.append(row._replace(location=f"line {example.line}"))
        reason = exceeded_limit(remove_long_responses(row, cfg)[0], cfg) if report.kind != "texts" else ""
        if reason:
            dropped[reason] += 1
    start, end = _token_names(tokenizer, encoder.bos), _token_names(tokenizer, encoder.end)
    echo(f"  template: {encoder.template}; start token {start}, end token {end}")
    learns = report.kind == "demonstrations"
    for note in encoder.notes(learned=learns)[0 if learns else 1 :]:
        echo(f"  {note.removeprefix(f'template: {encoder.template}; ')}")
    if learns and (note := answers_without_loss(report.examples, cfg.turns)):
        echo(f"  {note}")
    responses = [response for row in rows for response in row.responses]
    _echo_lengths("tokens", [len(row.prompt) for row in rows], list(map(len, responses)), echo)
    for reason, count in dropped.items():
        echo(f"  left out in training: {count} {reason}")
    markers = find_markers(report.examples, encoder.special, encoder.template == "chat")
    unknown = unknown_tokens(report.examples, (ids for row in rows for ids in (row.prompt, *row.responses)), encoder)
    for note in (unknown, spelled_markers(markers)):
        if note:
            echo(f"  {note}")
    fault = rendered_rows(markers, len(report.examples))
    if fault:
        echo(f"  {cfg.path}: {fault}")
    if rows:
        _echo_row(rows[0], tokenizer, echo)
    return num_refused + (len(markers.rendered) if fault else 0)


def _token_names(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids)) or "none"


def _echo_row(row: Row, tokenizer: Any, echo: Echo) -> None:
    """Print the row's tokens as `id token`; a star marks those with a loss."""
    response = row.responses[0] if row.responses else []
    # The first token of a text is not predicted.
    mask = row.loss_mask or [i > 0 or bool(row.prompt) for i in range(len(response))]
    note = f"; * has a loss ({sum(mask)} of {len(row.prompt) + len(response)})" if response else ""
    echo(f"  the row of {row.location} as tokens{note}:")
    prompt_cells = [f" {token}" for token in _id_and_token(tokenizer, row.prompt)]
    tokens = zip(mask, _id_and_token(tokenizer, response), strict=True)
    response_cells = [f"{'*' if has_loss else ' '}{token}" for has_loss, token in tokens]
    text = "   "
    for cell in [*_elided(prompt_cells), *_elided(response_cells)]:
        if len(text) + len(cell) + 1 > 110:
            echo(text)
            text = "   "
        text += " " + cell
    echo(text)


def _elided(cells: list[str]) -> list[str]:
    """Replace the middle of a long list by a count."""
    if len(cells) <= SHOWN_TOKENS:
        return cells
    half = SHOWN_TOKENS // 2
    return [*cells[:half], f" ... {len(cells) - SHOWN_TOKENS} more ...", *cells[-half:]]


def _id_and_token(tokenizer: Any, ids: list[int]) -> list[str]:
    return [f"{i} {repr(token)[1:-1]}" for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)]
