"""Ranked responses: `responses` with `ranks` or `scores`, and UltraFeedback's `completions`, objects with a score."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from rlhf_fast.data.columns import Columns, removal
from rlhf_fast.data.fields import InvalidRow, column_names, json_type, text_value

FROM_OBJECTS = (
    "`jq -c '{prompt: .instruction, responses: [.completions[].response], scores: [.completions[].overall_score]}'`"
    " converts UltraFeedback's rows"
)
SCORE = "overall_score"
"""UltraFeedback's score of a completion: the highest is best."""

Ranking = tuple[tuple[str, ...], tuple[int, ...]]
"""Responses, and their ranks without gaps."""


def has_objects(responses: object) -> bool:
    """Return whether responses are objects with a "response" each, as UltraFeedback's."""
    return isinstance(responses, list) and any(isinstance(entry, dict) and "response" in entry for entry in responses)


def ranked_responses(row: Columns, levels_name: str) -> Ranking:
    """Return `responses` and their ranks. levels_name: ranks or scores."""
    responses, ranks = row["responses"], row[levels_name]
    for name in ("responses", levels_name):
        if not isinstance(row[name], list):
            raise InvalidRow(f"{name} must be a list, found {json_type(row[name])}")
    if has_objects(responses):
        raise InvalidRow(f"responses[0] must be text, found an object; {FROM_OBJECTS}")
    if len(responses) != len(ranks):
        raise InvalidRow(f"{len(responses)} responses but {len(ranks)} {levels_name}; each response needs one")
    texts = tuple(text_value(text, f"responses[{i}]") for i, text in enumerate(responses))
    for i, rank in enumerate(ranks):
        _require_number(rank, f"{levels_name}[{i}]", levels_name == "ranks")
    ranking = _ranking(texts, ranks, levels_name != "ranks", "responses")
    if levels_name == "ranks" and row.filled("scores"):
        _require_same_order(ranks, row["scores"])
    return ranking


def scored_completions(row: Columns) -> Ranking:
    """Return UltraFeedback's `completions` and their ranks, by each one's overall_score."""
    texts, scores = [], []
    for i, entry in enumerate(row["completions"]):
        name = f"completions[{i}]"
        if not isinstance(entry, dict) or "response" not in entry or SCORE not in entry:
            found = column_names(entry) if isinstance(entry, dict) else json_type(entry)
            raise InvalidRow(f"{name} must have response and {SCORE}, found {found}; {FROM_OBJECTS}")
        texts.append(text_value(entry["response"], f"{name}.response"))
        _require_number(entry[SCORE], f"{name}.{SCORE}", lowest_is_best=False)
        scores.append(entry[SCORE])
        row.unused_keys |= {f"completions[].{key}": None for key in entry if key not in ("response", SCORE)}
    return _ranking(tuple(texts), scores, True, "completions")


def _require_number(rank: object, name: str, lowest_is_best: bool) -> None:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not abs(rank) <= sys.float_info.max:
        found = textwrap.shorten(json.dumps(rank, default=repr), 40, placeholder="...")
        best = "0 is best" if lowest_is_best else "the highest is best"
        raise InvalidRow(f"{name} must be a number ({best}, equal numbers are a tie), found {found}")


def _ranking(texts: tuple[str, ...], ranks: Sequence[Any], highest_is_best: bool, name: str) -> Ranking:
    """Return the texts with ranks without gaps. InvalidRow if nothing is preferred, or equal texts differ in rank."""
    levels = sorted(set(ranks), reverse=highest_is_best)
    if len(levels) < 2:
        raise InvalidRow(f"{len(ranks)} responses, all of one rank: nothing is preferred; remove the row")
    rank_of: dict[str, float] = {}
    for i, (text, rank) in enumerate(zip(texts, ranks, strict=True)):
        if rank_of.setdefault(text, rank) != rank:
            first = texts.index(text)
            raise InvalidRow(f"{name}[{first}] and {name}[{i}] are equal but ranked {rank_of[text]} and {rank}")
    return texts, tuple(levels.index(rank) for rank in ranks)


def _require_same_order(ranks: list[float], scores: object) -> None:
    """Raise InvalidRow if scores beside ranks order two responses the other way, or cannot be compared."""
    numbers = [score for score in scores if isinstance(score, (int, float))] if isinstance(scores, list) else []
    if len(numbers) != len(ranks):
        raise InvalidRow(f"scores beside ranks must be a list of {len(ranks)} numbers; {removal('scores')}")
    for (i, (rank, score)), (j, (other, lower)) in combinations(enumerate(zip(ranks, numbers, strict=True)), 2):
        if (rank < other and score < lower) or (rank > other and score > lower):
            raise InvalidRow(
                f"ranks and scores contradict each other: responses[{i}] has rank {rank} and score {score},"
                f" responses[{j}] rank {other} and score {lower} (rank 0 is best, the highest score is best);"
                f" {removal('scores')}"
            )
