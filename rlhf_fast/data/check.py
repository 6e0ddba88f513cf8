"""`rlhf-fast check FILE`: the contents and the errors of a data file, and one row as the model will see it."""

from __future__ import annotations

import re
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf_fast.config.data_path import DataPath, parts, shown_path
from rlhf_fast.config.fields import DataConfig
from rlhf_fast.data.columns import EXPECTED, require_our_names, suggested_columns
from rlhf_fast.data.datasets import Row, encode_example, exceeded_limit, prompt_as_text, remove_long_responses
from rlhf_fast.data.encode import Encoder
from rlhf_fast.data.fields import InvalidRow, shown
from rlhf_fast.data.files import Record, read_records
from rlhf_fast.data.notes import (
    SHOWN_LINES,
    absent_columns,
    answers_without_loss,
    find_markers,
    places,
    rendered_rows,
    spelled_markers,
    unknown_tokens,
    unused_columns,
)
from rlhf_fast.data.rows import KINDS, Example, Fault, columns_of, no_rows, parse_records
from rlhf_fast.data.token_view import echo_row
from rlhf_fast.errors import UserError, listed

GUESS_ROWS = 50
SHOWN_ERRORS = 20
VARIABLE = re.compile(r""" "(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\d+ """, re.VERBOSE)
"""Parts of an error that differ from row to row: quoted texts and numbers."""
WANTED = {
    "comparisons": (("prompt", "chosen", "rejected"), ("prompt", "responses", "ranks")),
    "demonstrations": (("messages",), ("prompt", "completion")),
    "prompts": (("prompt",),),
    "texts": (("text",),),
}
"""Kind -> the columns that make it, by which others are offered for them."""
CATEGORIES = {"null": "null fields", "empty": "empty fields", "equal": "chosen equal to rejected", "other": "other"}

Echo = Callable[[str], None]


@dataclass
class Report:
    """Examples and faulty rows of a file; one without any can be trained on."""

    kind: str
    examples: list[Example] = field(default_factory=list)
    errors: list[Fault] = field(default_factory=list)


def guess_kind(path: DataPath, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return the kind whose columns most of the rows have. UserError if no row fits a kind."""
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
        offers = [f"{flag} reads them as {kind}" for kind, flag in offered_columns(found, columns).items()]
        hint = ", ".join(offers) if offers else f"expected {_expected_of_kinds()}"
        raise UserError(
            f"{shown_path(path)}: cannot tell what the rows are: they have the columns"
            f" {', '.join(map(shown, found))}; {hint}"
        )
    return counts.most_common(1)[0][0]


def offered_columns(names: Collection[str], columns: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return, for each kind that other names of the columns would make of the rows, the flag that maps them."""
    offers: dict[str, str] = {}
    have = [*names, *(ours for ours, theirs in (columns or {}).items() if theirs in names)]
    for kind, alternatives in WANTED.items():
        for wanted in alternatives:
            mapped = suggested_columns(have, wanted)
            if mapped and all(name in have or name in mapped for name in wanted):
                pairs = dict(columns or {}) | mapped
                words = [word for pair in pairs.items() for word in pair]
                offers.setdefault(kind, f"--columns {' '.join(map(shlex.quote, words))}")
    return offers


def _expected_of_kinds() -> str:
    return "; ".join(f"{EXPECTED[kind]} ({kind})" for kind in KINDS)


def examine(cfg: DataConfig, kind: str = "") -> Report:
    """Read every row, once, so that a pipe will do. UserError only for a file that cannot be read or holds no rows."""
    require_our_names(shown_path(cfg.path), cfg.columns)
    records = read_records(cfg.path, cfg.columns)
    first: list[Record] = []
    if not kind:
        rows: list[Mapping[str, Any]] = []
        fault = ""
        for record in records:
            first.append(record)
            try:
                rows.append(columns_of(record.row, unique_keys=False))
            except InvalidRow as error:
                fault = fault or f"{record.file}:{record.line}: {error}"
                continue
            if len(rows) == GUESS_ROWS:
                break
        if first and not rows:
            others = f" (none of the {len(first)} rows can be read)" if len(first) > 1 else ""
            raise UserError(f"{fault}{others}")
        if first:
            kind = guess_kind(cfg.path, rows, cfg.columns)
    report = Report(kind)
    for found in parse_records(chain(first, records), kind, cfg.columns, cfg.remove_columns):
        if isinstance(found, Fault):
            report.errors.append(found)
        else:
            report.examples.append(found)
        if cfg.limit and len(report.examples) + len(report.errors) == cfg.limit:
            break
    if not report.examples and not report.errors:
        expected = EXPECTED[kind] if kind else "prompt + completion, prompt + chosen + rejected, prompt, or text"
        raise UserError(no_rows(cfg.path, expected))
    return report


def _files_by_kind(cfg: DataConfig) -> dict[str, list[str]]:
    """Return the files of each kind, by their first rows; {} unless there are several, all of which can be read
    twice."""
    files: dict[str, list[str]] = {}
    names = [part for part in parts(cfg.path) if isinstance(part, str)]
    if len(names) < 2 or len(names) < len(parts(cfg.path)) or not all(Path(name).is_file() for name in names):
        return files
    for name in names:
        try:
            kind = examine(replace(cfg, path=name, limit=GUESS_ROWS)).kind
        except UserError:  # the report of all says it
            return {}
        files.setdefault(kind, []).append(name)
    return files


def check(cfg: DataConfig, kind: str = "", tokenizer: Any = None, echo: Echo = print) -> int:
    """Print the report and return the number of errors. Files of different kinds get a report each."""
    if not kind and len(files := _files_by_kind(cfg)) > 1:
        reports = ((replace(cfg, path=tuple(names)), own) for own, names in files.items())
        return sum(check(each, own, tokenizer, echo) for each, own in reports)
    report = examine(cfg, kind)
    examples, errors = report.examples, report.errors
    echo(f"{shown_path(cfg.path)}: {len(examples) + len(errors)} rows read as {report.kind}, {len(errors)} with errors")
    if errors:
        by_category = Counter(fault.error.category for fault in errors)
        found = [f"{by_category[name]} {words}" for name, words in CATEGORIES.items() if name in by_category]
        echo(f"  errors: {', '.join(found)}")
        _echo_faults(errors, echo)
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
    if report.kind == "prompts" and not kind:
        names = {name for example in examples for name in (*example.unused, "prompt")}
        for other, flag in offered_columns(names).items():
            if other in ("demonstrations", "comparisons"):
                echo(f"  {flag} reads them as {other}")
    if tokenizer is None:
        markers = spelled_markers(find_markers(examples, ()))
        if markers:
            echo(f"  {markers}")
        echo("  give --tokenizer DIR to see tokens, over-long rows and special tokens in the text")
        return len(errors)
    return len(errors) + _echo_tokens(cfg, report, tokenizer, echo)


def _echo_faults(faults: Sequence[Fault], echo: Echo) -> None:
    """Print each fault once, with the rows that have it. Numbers and quoted texts do not make another fault."""
    alike: dict[str, list[Fault]] = {}
    for fault in faults:
        alike.setdefault(VARIABLE.sub("?", str(fault.error)), []).append(fault)
    place_of = dict(zip(map(id, faults), places(faults), strict=True))
    for group in list(alike.values())[:SHOWN_ERRORS]:
        echo(f"  {group[0].location}: {group[0].error}")
        if len(group) > 1:
            lines = listed([place_of[id(fault)] for fault in group], SHOWN_LINES)
            which = "this error" if len({str(fault.error) for fault in group}) == 1 else "such an error"
            echo(f"    {len(group)} rows have {which}: lines {lines}")
    if len(alike) > SHOWN_ERRORS:
        hidden = sum(map(len, list(alike.values())[SHOWN_ERRORS:]))
        echo(f"  ... and {hidden} more, of {len(alike) - SHOWN_ERRORS} other kinds")


def _echo_repeats(report: Report, echo: Echo) -> None:
    first_place: dict[str, str] = {}
    repeats: list[str] = []
    prompts: set[str] = set()
    for example, place in zip(report.examples, places(report.examples), strict=True):
        row = (example.prompt, example.responses, example.ranks, example.tools, example.conversation)
        first = first_place.setdefault(repr(row), place)
        if first != place:
            repeats.append(f"{place} = {first}")
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
    refused: list[Fault] = []
    for example, place in zip(report.examples, places(report.examples), strict=True):
        try:
            row = encode_example(example, report.kind, encoder, cfg)
        except InvalidRow as error:
            refused.append(Fault(example.file, example.line, error))
            continue
        rows.append(row._replace(location=f"line {place}" if place.isdigit() else place))
        reason = exceeded_limit(remove_long_responses(row, cfg)[0], cfg) if report.kind != "texts" else ""
        if reason:
            dropped[reason] += 1
    _echo_faults(refused, echo)
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
        echo(f"  {shown_path(cfg.path)}: {fault}")
    if rows:
        echo_row(rows[0], tokenizer, echo)
    return len(refused) + (len(markers.rendered) if fault else 0)


def _token_names(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids)) or "none"
