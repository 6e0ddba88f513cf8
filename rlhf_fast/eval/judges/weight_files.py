"""Weight files of the built-in judges, which lie beside this file: JSON, or npz without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_fast.errors import UserError
from rlhf_fast.eval.judges.protocol import Validation

FOLDER = Path(__file__).parent


def read_json(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Return what a JSON weight file holds."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder / name, error) from error


def read_npz(name: str, folder: Path = FOLDER) -> dict[str, np.ndarray]:
    """Return the arrays of an npz weight file."""
    try:
        with np.load(folder / name, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(folder / name, error) from error


def validation_of(saved: Mapping[str, Any], key: str = "validation") -> Validation:
    """Return the validation that a weight file holds."""
    return Validation(**saved[key])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a weight file; equal contents give equal bytes."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays; equal contents give equal bytes, since numpy dates every entry 1980."""
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **dict(arrays))


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: a judge's weights cannot be read ({error}); install the package again")
