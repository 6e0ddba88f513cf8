"""Checksums of the sets' files, and the models that were trained on one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.run.info import sha256
from rlhf_fast.run.outputs import read_run
from rlhf_fast.run.prompt_format import PARTS_OF_A_RUN


def checksum(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of a set's file; of several files, that of their checksums, one a line."""
    found = [sha256(path) for path in paths]
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()


def training_notes(paths: Sequence[Path], models: Mapping[str, str]) -> list[str]:
    """Return a note for each model (name -> folder) that was trained on one of the files, by its run.json.

    The models that its run started from count too, as long as their folders are there.
    """
    notes = []
    for name, folder in models.items():
        trained = _training_files(Path(folder), set())
        notes += [
            f"{path.name}: {name} was trained on this file, so its figures on it are not those of held-out data"
            for path in paths
            if sha256(path) in trained
        ]
    return notes


def optimized_notes(judge: str, models: Mapping[str, str]) -> list[str]:
    """Return a note on the models (name -> folder) that PPO trained against the reward that judges them, or []."""
    names = []
    for name, folder in models.items():
        with suppress(UserError):  # a run.json of another program
            reward = read_run(folder).get("config", {}).get("reward", "")
            names += [name] * bool(reward and Path(reward).resolve() == Path(judge).resolve())
    if not names:
        return []
    verb = "was" if len(names) == 1 else "were"
    return [
        f"preference: {' and '.join(names)} {verb} trained against {judge}, so these win rates show what was optimised,"
        " not what people prefer."
    ]


def _training_files(folder: Path, seen: set[Path]) -> set[str]:
    """Return the checksums of the data of the runs that made a model."""
    folder = folder.resolve()
    if folder in seen:
        return set()
    seen.add(folder)
    found: set[str] = set()
    for place in [folder, folder.parent] if folder.name in PARTS_OF_A_RUN else [folder]:
        saved: dict[str, Any] = {}
        with suppress(UserError):  # a run.json of another program
            saved = read_run(place)
        found |= {str(digest) for digest in saved.get("data", {}).values()}
        for other in saved.get("models", {}):
            found |= _training_files(Path(other), seen)
    return found
