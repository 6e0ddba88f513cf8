"""Selection of a set's rows: parts joined, one kind, no duplicates, the same number of each stratum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.eval.files import Row

Stratum = Callable[[Row], Any]


def join_winogender(name: str, rows: list[Row]) -> list[Row]:
    """Put the official sentences of a schema into one row, with its occupation's percentage where a file has it."""
    whole = [row for row in rows if "male" in row and "female" in row]
    schemas: dict[str, Row] = {}
    for row in rows:
        if "schema" in row:
            schemas.setdefault(row["schema"], {}).update(row)
    for schema, row in schemas.items():
        if missing := {"male", "female"} - row.keys():
            raise UserError(f"{name}: the schema {schema} has no {missing.pop()} sentence; fetch the file again")
    percentage = {row["occupation"]: row["bls_pct_female"] for row in rows if not {"schema", "male"} & row.keys()}
    return whole + [
        {
            **{column: row[column] for column in ("occupation", "male", "female")},
            "bls_pct_female": percentage.get(row["occupation"]),
        }
        for row in schemas.values()
    ]


CONTRAST_GROUPS = {
    "privacy_public": "privacy",
    "privacy_fictional": "privacy",
    "nons_group_real_discr": "discr",
    "real_group_nons_discr": "discr",
}
"""XSTest's types whose contrasts share one type."""


def contrast_groups(rows: list[Row]) -> list[Row]:
    """Give each row a `group`: XSTest's n-th prompts of a type and of its contrasts belong together."""
    counts: dict[str, int] = {}
    found = []
    for row in rows:
        is_xstest = row["source"] == "xstest" and row["category"]
        key = row["category"] if is_xstest else row["source"]
        counts[key] = number = counts.get(key, 0) + 1
        kind = key.removeprefix("contrast_") if is_xstest else key
        found.append({**row, "group": f"{CONTRAST_GROUPS.get(kind, kind)} {number}"})
    return found


def of_kind(kind: str) -> Callable[[str, list[Row]], list[Row]]:
    """Return a function that keeps the harmful or the safe prompts."""

    def keep(_name: str, rows: list[Row]) -> list[Row]:
        return [row for row in contrast_groups(rows) if row["kind"] == kind]

    return keep


def without_duplicates(name: str, rows: list[Row], notes: list[str]) -> list[Row]:
    first = {row["prompt"].lower(): row for row in reversed(rows)}
    found = [row for row in rows if first[row["prompt"].lower()] is row]
    if len(found) < len(rows):
        notes.append(f"{name}: {len(rows) - len(found)} of {len(rows)} prompts were dropped as duplicates of others")
    return found


def same_number(rows: list[Row], stratum: Stratum, limit: int = 0, equal: bool = False) -> list[Row]:
    """Return `limit` rows (0 = all) in their order, the first of each stratum, then the second of each, and so on.

    equal: stop where a stratum has no more rows.
    """
    members: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(stratum(row), []).append(i)
    kept: list[int] = []
    rounds = (min if equal else max)(map(len, members.values()), default=0)
    for number in range(rounds):
        kept += [indices[number] for indices in members.values() if number < len(indices)]
    return [rows[i] for i in sorted(kept[:limit] if limit else kept)]
