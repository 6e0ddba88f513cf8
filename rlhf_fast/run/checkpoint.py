"""Atomic checkpoints without pickle: safetensors for tensors, JSON for the rest, a manifest to tell whole from torn.

A checkpoint is the folder `step_N`. Its files are written and fsynced in `step_N.tmp`, then a manifest with every
file's size and sha256, then the folder is renamed: a reader sees all of it or nothing. `latest` reads the manifest
and skips, with a warning, what a crash, a full disk or a flipped bit has spoiled.
"""

import json
import os
import random
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_fast.errors import writing
from rlhf_fast.run.logs import sha256

MANIFEST = "manifest.json"
STATE = "state.json"


def save(directory: str | Path, step: int, state: dict, keep: int = 2) -> Path:
    """Writes `state` as `directory/step_<step>` and removes all but the newest `keep`; returns the new folder.

    `state` is a tree of dicts (str or int keys), lists, tuples, tensors, numpy arrays, numbers, strings, bools and
    None. Each top-level key with tensors gets a safetensors file of its own. UserError where the disk refuses; the
    older checkpoints are then still there.
    """
    directory = Path(directory)
    path = directory / f"step_{step}"
    with writing(path):
        directory.mkdir(parents=True, exist_ok=True)
        for rubbish in directory.glob("*.tmp"):
            shutil.rmtree(rubbish)
        with atomic_folder(path) as folder:
            tree = {name: _write_tensors(folder, name, value) for name, value in state.items()}
            (folder / STATE).write_text(json.dumps(tree), encoding="utf-8")
            files = {file.name: _fingerprint(file) for file in sorted(folder.iterdir())}
            (folder / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
        for old in _steps(directory)[:-keep] if keep > 0 else []:
            shutil.rmtree(directory / f"step_{old}")
    return path


def latest(directory: str | Path) -> Path | None:
    """The newest whole checkpoint below `directory`, or None. Spoiled newer ones are named in a warning."""
    directory = Path(directory)
    for step in reversed(_steps(directory)):
        path = directory / f"step_{step}"
        fault = _fault(path)
        if fault is None:
            return path
        warnings.warn(f"{path}: skipped, {fault}; an older checkpoint is used if there is one", stacklevel=2)
    return None


def load(path: str | Path) -> dict:
    """The tree that `save` was given, tensors on the CPU."""
    path = Path(path)
    tree = json.loads((path / STATE).read_text(encoding="utf-8"))
    return {
        name: _decode(value, load_file(file) if (file := path / f"{name}.safetensors").exists() else {})
        for name, value in tree.items()
    }


def step_of(path: str | Path) -> int:
    """The step a checkpoint folder was written after."""
    return int(Path(path).name.removeprefix("step_"))


def random_states() -> dict:
    """The states of torch's (CPU and, where used, CUDA), Python's and numpy's generators, as a tree for `save`."""
    kind, keys, *rest = np.random.get_state()
    states = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (kind, keys.tolist(), *rest)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict) -> None:
    """Puts back what `random_states` read."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields `path.tmp` to be filled; on success all in it is fsynced and it takes the place of `path`.

    On an exception the unfinished folder is removed and `path` is as it was.
    """
    path = Path(path)
    folder, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old.tmp")
    if old.exists() and not path.exists():  # a crash came between the two renamings below
        old.rename(path)
    for leftover in (folder, old):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        for entry in [*folder.rglob("*"), folder]:
            _fsync(entry)
        if path.exists():
            path.rename(old)
        try:
            folder.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        _fsync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, value: object) -> None:
    """Writes one JSON file so that a reader sees the old or the new text, never a part."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    with writing(path):
        unfinished.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        _fsync(unfinished)
        unfinished.replace(path)
        _fsync(path.parent)


def _steps(directory: Path) -> list[int]:
    names = (entry.name for entry in directory.iterdir()) if directory.is_dir() else ()
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d+)", name)))


def _fault(path: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, wanted in files.items():
            if (size := (path / name).stat().st_size) != wanted["bytes"]:
                return f"{name} has {size} bytes instead of {wanted['bytes']}"
            if _fingerprint(path / name) != wanted:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} or a file it names cannot be read ({error})"
    return None


def _fingerprint(file: Path) -> dict:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensors(folder: Path, name: str, value: object) -> object:
    """Writes the tensors below `value` to `name.safetensors`; returns the tree with their keys in their place."""
    tensors: dict[str, Tensor] = {}
    keys: dict[tuple, str] = {}
    encoded = _encode(value, "", tensors, keys)
    if tensors:
        # A storage may serve several tensors (tied or packed weights); safetensors wants each to own its bytes.
        owned = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        uses = Counter(tensor.untyped_storage().data_ptr() for tensor in owned.values())
        owned = {k: t.clone() if uses[t.untyped_storage().data_ptr()] > 1 else t for k, t in owned.items()}
        save_file(owned, folder / f"{name}.safetensors")
    return encoded


def _encode(value: object, at: str, tensors: dict[str, Tensor], keys: dict[tuple, str]) -> object:
    """JSON for a tree. What JSON lacks becomes a dict with one $key: tensors, tuples and dicts with int keys."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        # The same tensor under two names (tied embeddings) is stored once.
        same = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride()) if value.numel() else (at,)
        if same not in keys:
            keys[same] = at.lstrip(".") or "value"
            tensors[keys[same]] = value
        return {"$tensor": keys[same]}
    if isinstance(value, dict):
        if all(isinstance(key, int) for key in value) and value:
            return {"$ints": [[key, _encode(v, f"{at}.{key}", tensors, keys)] for key, v in value.items()]}
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise ValueError(f"checkpoint{at}: the key {key!r} cannot be stored; use plain strings or integers")
        return {key: _encode(v, f"{at}.{key}", tensors, keys) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, f"{at}.{i}", tensors, keys) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"checkpoint{at}: a {type(value).__name__} cannot be stored without pickle")


def _decode(value: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_decode(v, tensors) for v in value["$tuple"])
    if "$ints" in value:
        return {key: _decode(v, tensors) for key, v in value["$ints"]}
    return {key: _decode(v, tensors) for key, v in value.items()}
