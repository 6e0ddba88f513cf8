"""Sentences on the rows of a file: what was not used, markers of a chat template in the text, unknown tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from rlhf_fast.config.fields import DataConfig
from rlhf_fast.data.encode import Encoder, has_loss
from rlhf_fast.data.fields import is_blank, shown
from rlhf_fast.data.rows import Example, Fault
from rlhf_fast.errors import UserError, listed

SHOWN_LINES = 5
MANY_UNKNOWN = 0.2
"""Share of unknown tokens above which a model cannot learn the texts."""
CHAT_MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<|begin_of_text|>", "<start_of_turn>"),
    *("<end_of_turn>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"),
    *("<｜User｜>", "<｜Assistant｜>", "<|start|>", "<|turn>"),
)
"""Markers that common chat templates put around turns, whether the tokenizer at hand knows them or not."""


class Markers(NamedTuple):
    """Markers of a chat template, and special tokens of the tokenizer, that the data spell as text."""

    counts: Counter[str]
    """Number of texts in which each of them stands."""
    lines: list[str]
    """Places of the rows that hold one."""
    rendered: list[str]
    """Places of the rows whose prompt begins or whose response ends with one: a template was applied before."""


def unused_columns(examples: Iterable[Example], taken: Collection[str] = ()) -> str:
    """Return the columns and keys that no format reads, each with the number of its rows; "" if there are none.

    taken: columns that reach a reward function.
    """
    counts: Counter[str] = Counter()
    total = 0
    for example in examples:
        counts.update(name for name in example.unused if name not in taken)
        total += 1
    return ", ".join(f"{shown(name)} ({count} of {total} rows)" for name, count in counts.items())


def absent_columns(examples: Iterable[Example], removed: Collection[str]) -> str:
    """Return a sentence on the names in remove_columns that no row has; "" if there are none."""
    absent = set(removed).difference(*(example.unused for example in examples)) if removed else set()
    return f"remove_columns names what no row has: {', '.join(map(shown, sorted(absent)))}" if absent else ""


def places(rows: Sequence[Example | Fault]) -> list[str]:
    """Return the line of each row, with the file before it if the rows are of several files."""
    alone = len({row.file for row in rows}) < 2
    return [str(row.line) if alone else row.location for row in rows]


def find_markers(examples: Sequence[Example], special: Sequence[str], chat: bool = False) -> Markers:
    """Return the special tokens and the markers of common templates that the data spell.

    chat: a chat template will be applied, so that markers which the tokenizer does not know show a rendered row too.
    Without one they may be the user's own format.
    """
    names = [*dict.fromkeys((*special, *CHAT_MARKERS))]
    telling = {*special, *(CHAT_MARKERS if chat else ())}
    starts = {name[:2] for name in names}
    found = Markers(Counter(), [], [])
    for example, place in zip(examples, places(examples), strict=True):
        texts = _texts(example)
        if not any(start in text for text in texts for start in starts):
            continue
        here = Counter(name for text in texts for name in names if name in text)
        if not here:
            continue
        found.counts.update(here)
        found.lines.append(place)
        markers, num_turns = tuple(telling & here.keys()), len(texts) - len(example.responses)
        begins = any(text.lstrip().startswith(markers) for text in texts[:num_turns])
        if begins or any(text.rstrip().endswith(markers) for text in example.responses):
            found.rendered.append(place)
    return found


def rendered_rows(markers: Markers, total: int) -> str:
    """Return the fault of a file of which most rows are rendered already; "" for another file."""
    if 2 * len(markers.rendered) <= total:
        return ""
    return (
        f"{len(markers.rendered)} of {total} rows hold the markers of a chat template already"
        f" ({listed(list(markers.counts), SHOWN_LINES)}; lines {listed(markers.rendered, SHOWN_LINES)}), and text never"
        " becomes a special token; give the bare texts, or messages, to which the template is applied"
    )


def spelled_markers(markers: Markers) -> str:
    """Return a sentence on the markers that the data spell; "" if they spell none."""
    if not markers.counts:
        return ""
    found = ", ".join(f"{name} {count} times" for name, count in markers.counts.items())
    return (
        f"special tokens spelled out in the text (they stay text): {found}, lines {listed(markers.lines, SHOWN_LINES)}"
    )


def unknown_tokens(examples: Iterable[Example], sequences: Iterable[Sequence[int]], encoder: Encoder) -> str:
    """Return a sentence on the text that the tokenizer cannot express; "" if it can express all.

    examples: the rows; sequences: their prompts and responses as tokens.
    """
    unknown = _unknown_id(encoder.tokenizer)
    if unknown is None:
        return _dropped_characters(examples, encoder.tokenizer)
    if unknown in (*encoder.bos, *encoder.end):  # one token for everything, of a tokenizer that knows every byte
        return ""
    count, total, name = _count_unknown(sequences, encoder, unknown)
    if not count:
        return ""
    return f"{count} of {total} tokens ({count / total:.1%}) are unknown to the tokenizer ({name})"


def unknown_warning(sequences: Iterable[Sequence[int]], encoder: Encoder) -> str:
    """Return a sentence on texts that the model cannot learn, since too many of their tokens are unknown; "" else."""
    unknown = _unknown_id(encoder.tokenizer)
    if unknown is None or unknown in (*encoder.bos, *encoder.end):
        return ""
    count, total, name = _count_unknown(sequences, encoder, unknown)
    if count <= MANY_UNKNOWN * total:
        return ""
    return (
        f"this model's tokenizer reads {100 * count / total:.0f} % of the tokens as {name}; it cannot learn these"
        " texts: start from another model"
    )


def _count_unknown(sequences: Iterable[Sequence[int]], encoder: Encoder, unknown: int) -> tuple[int, int, str]:
    """Return how many tokens are the unknown one, how many there are, and its name."""
    count = total = 0
    for ids in sequences:
        count += list(ids).count(unknown)
        total += len(ids)
    return count, total, encoder.tokenizer.convert_ids_to_tokens(unknown)


def _unknown_id(tokenizer: Any) -> int | None:
    """Return the token for unknown text, which may be known to the tokenizer's model alone."""
    if tokenizer.unk_token_id is not None:
        return tokenizer.unk_token_id
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    name = getattr(model, "unk_token", None)
    return tokenizer.convert_tokens_to_ids(name) if name else getattr(model, "unk_id", None)


def _dropped_characters(examples: Iterable[Example], tokenizer: Any) -> str:
    """Return a sentence on the characters for which a tokenizer without an unknown token gives no token at all."""
    counts: Counter[str] = Counter()
    for example in examples:
        for text in _texts(example):
            counts.update(text)
    dropped = {
        char: count
        for char, count in counts.items()
        if not is_blank(char) and not tokenizer(char, add_special_tokens=False).input_ids
    }
    if not dropped:
        return ""
    chars = listed(list(dropped), SHOWN_LINES)
    return f"{sum(dropped.values())} of {counts.total()} characters are dropped by the tokenizer: {chars}"


def _texts(example: Example) -> list[str]:
    turns = [example.prompt] if isinstance(example.prompt, str) else [turn["content"] for turn in example.prompt]
    return [*turns, *example.responses]


def answers_without_loss(examples: Iterable[Example], turns: str) -> str:
    """Return a sentence on the earlier answers of demonstrations that data.turns leaves without a loss; "" if none."""
    counts = [
        sum(turn["role"] == "assistant" and has_loss(turn) for turn in example.conversation[:-1])
        for example in examples
        if turns == "last"
    ]
    if not any(counts):
        return ""
    rows = sum(count > 0 for count in counts)
    return f"{sum(counts)} earlier answers of {rows} conversations have no loss (data.turns: last)"


def row_notes(
    path: str,
    examples: Sequence[Example],
    sequences: Iterable[Sequence[int]],
    encoder: Encoder,
    cfg: DataConfig,
    taken: Collection[str] = (),
) -> list[str]:
    """Return the sentences on a file that a stage reads. UserError if most of its rows are rendered already.

    sequences: prompts and responses as tokens. taken: columns that reach a reward function.
    """
    markers = find_markers(examples, encoder.special, encoder.template == "chat")
    fault = rendered_rows(markers, len(examples))
    if fault:
        raise UserError(f"{path}: {fault}")
    unused = unused_columns(examples, taken)
    notes = [f"not used: {unused}" if unused else "", absent_columns(examples, cfg.remove_columns)]
    notes.append(answers_without_loss(examples, cfg.turns))
    notes += [unknown_tokens(examples, sequences, encoder), spelled_markers(markers)]
    return [note for note in notes if note]
