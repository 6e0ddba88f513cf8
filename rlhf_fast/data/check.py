"""`rlhf-fast check FILE`: what a data file holds, what is wrong with it, and one row as the model will see it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_fast.config.fields import DataConfig
from rlhf_fast.data.datasets import Row, opening, shorten, too_long
from rlhf_fast.data.encode import Encoder
from rlhf_fast.data.fields import Bad
from rlhf_fast.data.rows import EXPECTED, KINDS, Example, raw_rows, scan
from rlhf_fast.errors import UserError, listed

SHOWN_PROBLEMS = 20
SHOWN_TOKENS = 48
SORTS = {"null": "null fields", "empty": "empty fields", "equal": "chosen equal to rejected", "other": "other"}


@dataclass
class Report:
    """What was found. `errors` are (line, sentence); a file without any can be trained on."""

    kind: str
    examples: list[Example] = field(default_factory=list)
    errors: list[tuple[int, Bad]] = field(default_factory=list)


def guess_kind(path: str | Path, columns: Mapping[str, str]) -> str:
    """The kind whose columns most of the first rows have. UserError if they have none."""
    fits: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for row in raw_rows(path, 50):
        found.update(row.keys())
        has = set(row) | {ours for ours, theirs in columns.items() if theirs in row}
        if has & {"chosen", "rejected", "responses", "ranks"}:
            fits["comparisons"] += 1
        elif has & {"completion", "response", "messages", "conversations", "output"}:
            fits["demonstrations"] += 1
        elif has & {"prompt", "instruction"}:
            fits["prompts"] += 1
        elif "text" in has:
            fits["texts"] += 1
    if not fits:
        columns_found = f"it has the columns {', '.join(found)}" if found else "no line is a JSON object"
        expected = "; ".join(f"{EXPECTED[kind]} ({kind})" for kind in KINDS)
        raise UserError(f"{path}: cannot tell what the rows are: {columns_found}; expected {expected}")
    return fits.most_common(1)[0][0]


def examine(path: str | Path, kind: str = "", columns: Mapping[str, str] | None = None, limit: int = 0) -> Report:
    """Reads every row; raises UserError only for a file that cannot be read or holds no rows."""
    columns = columns or {}
    report = Report(kind or guess_kind(path, columns))
    for line, found in scan(path, report.kind, columns):
        if isinstance(found, Bad):
            report.errors.append((line, found))
        else:
            report.examples.append(found)
        if limit and len(report.examples) + len(report.errors) == limit:
            break
    if not report.examples and not report.errors:
        raise UserError(f"{path}: the file holds no rows; expected JSON lines with {EXPECTED[report.kind]}")
    return report


def check(cfg: DataConfig, kind: str = "", tokenizer: Any = None, say: Callable[[str], None] = print) -> int:
    """Prints the report and returns the number of errors."""
    report = examine(cfg.path, kind, cfg.columns, cfg.limit)
    rows = len(report.examples) + len(report.errors)
    say(f"{cfg.path}: {rows} rows read as {report.kind}, {len(report.errors)} with errors")
    if report.errors:
        sorts = Counter(bad.sort for _, bad in report.errors)
        say("  errors: " + ", ".join(f"{sorts[sort]} {words}" for sort, words in SORTS.items() if sort in sorts))
        for line, bad in report.errors[:SHOWN_PROBLEMS]:
            say(f"  {cfg.path}:{line}: {bad}")
        if len(report.errors) > SHOWN_PROBLEMS:
            say(f"  ... and {len(report.errors) - SHOWN_PROBLEMS} more")
    if not report.examples:
        return len(report.errors)
    _say_repeats(report, say)
    _say_lengths("characters", [len(opening(e.prompt)) for e in report.examples], _responses(report.examples, len), say)
    if report.kind == "comparisons":
        sizes = Counter(len(e.responses) for e in report.examples)
        say("  responses a prompt: " + ", ".join(f"{k}: {sizes[k]} rows" for k in sorted(sizes)))
        ties = sum(len(e.ranks) - len(set(e.ranks)) > 0 for e in report.examples)
        say(f"  rows with ties: {ties}")
    if tokenizer is None:
        say("  give --tokenizer DIR to see tokens, over-long rows and special tokens in the text")
        return len(report.errors)
    return len(report.errors) + _say_tokens(cfg, report, tokenizer, say)


def _responses(examples: Iterable[Example], measure: Callable[[Any], int]) -> list[int]:
    return [measure(response) for example in examples for response in example.responses]


def _say_repeats(report: Report, say: Callable[[str], None]) -> None:
    first: dict[Any, int] = {}
    again, prompts = [], Counter()
    for example in report.examples:
        key = (opening(example.prompt), example.responses, example.ranks)
        if first.setdefault(key, example.line) != example.line:
            again.append(f"{example.line} = {first[key]}")
        prompts[key[0]] += 1
    lines = f" (lines {listed(again, 5)})" if again else ""
    say(f"  duplicate rows: {len(again)}{lines}")
    if report.kind != "texts":
        say(f"  different prompts: {len(prompts)}")


def _say_lengths(unit: str, prompts: list[int], responses: list[int], say: Callable[[str], None]) -> None:
    for name, sizes in (("prompt", prompts), ("response", responses)):
        if any(sizes):
            sizes = sorted(sizes)
            high = sizes[min(int(0.95 * len(sizes)), len(sizes) - 1)]
            middle = statistics.median(sizes)
            say(f"  {name} {unit}: shortest {sizes[0]}, median {middle:g}, 95 % {high}, longest {sizes[-1]}")


def _say_tokens(cfg: DataConfig, report: Report, tokenizer: Any, say: Callable[[str], None]) -> int:
    """Lengths, limits, special tokens, one row. Returns the number of rows that the template refuses."""
    encoder, refused = Encoder(tokenizer, cfg.template, cfg.append_eos), 0
    rows, dropped, spelled, lines = [], Counter(), Counter(), []
    for example in report.examples:
        try:
            prompt, text = encoder.prompt(example.prompt) if report.kind != "texts" else ([], "")
        except Bad as bad:
            refused += 1
            if refused <= SHOWN_PROBLEMS:
                say(f"  {cfg.path}:{example.line}: {bad}")
            continue
        special = [t for part in (example.prompt, *example.responses) for t in encoder.spelled(part)]
        spelled.update(special)
        lines += [str(example.line)] if special else []
        encode = encoder.text if report.kind == "texts" else encoder.response
        row = Row("", prompt, text, tuple(encode(r) for r in example.responses), example.ranks)
        rows.append(row)
        why = too_long(shorten(row, cfg)[0], cfg) if report.kind != "texts" else ""
        if why:
            dropped[why] += 1
    start, end = _shown(tokenizer, encoder.bos), _shown(tokenizer, encoder.end)
    say(f"  template: {encoder.template}; start token {start}, end token {end}")
    _say_lengths("tokens", [len(row.prompt) for row in rows], [len(r) for row in rows for r in row.responses], say)
    for why, count in dropped.items():
        say(f"  left out in training: {count} {why}")
    if spelled:
        found = ", ".join(f"{token} {count} times" for token, count in spelled.items())
        say(f"  special tokens spelled out in the text (they stay text): {found}, lines {listed(lines, 5)}")
    if rows:
        _say_row(report.examples[0].line, rows[0], tokenizer, say)
    return refused


def _shown(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids)) or "none"


def _say_row(line: int, row: Row, tokenizer: Any, say: Callable[[str], None]) -> None:
    """The row as `id token`, the loss marked by a star."""
    response = row.responses[0] if row.responses else []
    learned = 0 if row.prompt else min(1, len(response))  # a text's first token has none before it
    total = len(row.prompt) + len(response)
    marks = f"; * has a loss ({len(response) - learned} of {total})" if response else ""
    say(f"  the row of line {line} as tokens{marks}:")
    cells = [f" {i} {token}" for i, token in _tokens(tokenizer, row.prompt)]
    if len(cells) > SHOWN_TOKENS:
        cells = [
            *cells[: SHOWN_TOKENS // 2],
            f" ... {len(cells) - SHOWN_TOKENS} more ...",
            *cells[-SHOWN_TOKENS // 2 :],
        ]
    answer = [f"{'*' if n >= learned else ' '}{i} {token}" for n, (i, token) in enumerate(_tokens(tokenizer, response))]
    if len(answer) > SHOWN_TOKENS:
        half = SHOWN_TOKENS // 2
        answer = [*answer[:half], f" ... {len(answer) - SHOWN_TOKENS} more ...", *answer[-half:]]
    text = "   "
    for cell in [*cells, *answer]:
        if len(text) + len(cell) + 1 > 110:
            say(text)
            text = "   "
        text += " " + cell
    say(text)


def _tokens(tokenizer: Any, ids: list[int]) -> list[tuple[int, str]]:
    return [(i, repr(token)[1:-1]) for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)]
