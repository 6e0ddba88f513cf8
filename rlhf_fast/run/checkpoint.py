"""Atomic checkpoints without pickle: safetensors for tensors, JSON for the rest, a manifest with checksums.

A checkpoint is the folder `step_N`. Its files are written and fsynced in `step_N.tmp`, then a manifest with every
file's size and sha256, then the folder is renamed: a reader sees all of it or nothing. `latest` checks the manifest
and skips, with a warning, a checkpoint that a crash, a full disk or a flipped bit has damaged.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_fast.errors import writing
from rlhf_fast.run.info import sha256

MANIFEST = "manifest.json"
STATE = "state.json"
NEW = ".tmp"  # suffix of a folder that is being written
OLD = ".old.tmp"  # and of the one that it replaces


def save(directory: str | Path, step: int, state: Mapping[str, object], keep: int = 2) -> Path:
    """Write `state` as `directory/step_<step>`, remove all but the newest `keep`, and return the new folder.

    `state` is a tree of dicts (str or int keys), lists, tuples, tensors, numpy arrays, numbers, strings, bools and
    None. The tensors of each top-level key go to a safetensors file of their own. If the disk refuses, a UserError is
    raised and the older checkpoints are still there.
    """
    directory = Path(directory)
    path = directory / f"step_{step}"
    with writing(path):
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in all_steps(directory, unfinished=True):
            shutil.rmtree(leftover)
        with atomic_folder(path) as folder:
            tree = {name: _write_tensors(folder, name, value) for name, value in state.items()}
            (folder / STATE).write_text(json.dumps(tree), encoding="utf-8")
            files = {file.name: _size_and_checksum(file) for file in sorted(folder.iterdir())}
            (folder / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
        for old in _saved_steps(directory)[:-keep] if keep > 0 else []:
            shutil.rmtree(directory / f"step_{old}")
    return path


def latest(directory: str | Path) -> Path | None:
    """Return the newest undamaged checkpoint in `directory`, or None. A damaged newer one gives a warning."""
    directory = Path(directory)
    for step in reversed(_saved_steps(directory)):
        path = directory / f"step_{step}"
        damage = _find_damage(path)
        if damage is None:
            return path
        warnings.warn(f"{path}: skipped, {damage}; an older checkpoint is used if there is one", stacklevel=2)
    return None


def load(path: str | Path) -> dict[str, Any]:
    """Return the tree that `save` was given, with its tensors on the CPU."""
    path = Path(path)
    state = {}
    for name, value in json.loads((path / STATE).read_text(encoding="utf-8")).items():
        file = path / f"{name}.safetensors"
        state[name] = _decode(value, load_file(file) if file.exists() else {})
    return state


def step_of(path: str | Path) -> int:
    """Return the number of steps done before a checkpoint folder was written."""
    return int(Path(path).name.removeprefix("step_"))


def steps_done(out: str | Path) -> int:
    """Return the steps before the newest undamaged checkpoint of the run in `out`, which is not read yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run that starts warns of a damaged one
        path = latest(Path(out) / "checkpoints")
    return step_of(path) if path else 0


def random_states() -> dict[str, Any]:
    """Return the states of torch's (CPU and, where used, CUDA), Python's and numpy's generators, for `save`."""
    kind, keys, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set the generators to what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    # a run may go on where there are fewer GPUs, or none
    for device, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


def undo_interrupted_write(path: str | Path) -> None:
    """Undo what `atomic_folder` left if the process died in it: the old folder is put back, the new one removed."""
    path = Path(path)
    folder, old = path.with_name(path.name + NEW), path.with_name(path.name + OLD)
    if old.exists() and not path.exists():  # a death between the two renames
        old.rename(path)
    for leftover in (folder, old):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield the folder `path.tmp` to write to; on success its files are fsynced and it replaces `path`.

    On an exception the unfinished folder is removed and `path` is as it was.
    """
    path = Path(path)
    folder, old = path.with_name(path.name + NEW), path.with_name(path.name + OLD)
    undo_interrupted_write(path)
    folder.mkdir(parents=True)
    try:
        yield folder
        for entry in [*folder.rglob("*"), folder]:
            fsync(entry)
        if path.exists():
            path.rename(old)
        try:
            folder.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        fsync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file atomically: a reader sees the old text or the new one, never a part."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    with writing(path):
        unfinished.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        fsync(unfinished)
        unfinished.replace(path)
        fsync(path.parent)


def all_steps(directory: Path, unfinished: bool = False) -> list[Path]:
    """Return the checkpoint folders, or what unfinished writes left of them. Names such as step_7_copy are not ours."""
    pattern = r"step_\d+(\.old)?\.tmp" if unfinished else r"step_\d+"
    entries = directory.iterdir() if directory.is_dir() else ()
    return [entry for entry in entries if re.fullmatch(pattern, entry.name)]


def _saved_steps(directory: Path) -> list[int]:
    """Return the step numbers of the checkpoint folders, in order."""
    return sorted(map(step_of, all_steps(directory)))


def _find_damage(path: Path) -> str | None:
    """Return why a checkpoint cannot be trusted, or None if every file matches the manifest."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            if (size := (path / name).stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _size_and_checksum(path / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} or a file it names cannot be read ({error})"
    return None


def _size_and_checksum(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensors(folder: Path, name: str, value: object) -> object:
    """Write the tensors in `value` to `name.safetensors`; return the tree with their keys in their places."""
    tensors: dict[str, Tensor] = {}
    encoded = _encode(value, "", tensors, {})
    if tensors:
        # safetensors requires that no two tensors share memory, as tied or packed weights do.
        owned = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        uses = Counter(tensor.untyped_storage().data_ptr() for tensor in owned.values())
        for key, tensor in owned.items():
            if uses[tensor.untyped_storage().data_ptr()] > 1:
                owned[key] = tensor.clone()
        save_file(owned, folder / f"{name}.safetensors")
    return encoded


def _encode(value: object, path: str, tensors: dict[str, Tensor], keys: dict[tuple, str]) -> object:
    """Return JSON for a tree. Tensors, tuples and dicts with int keys become a dict with one $key.

    path: dotted keys from the root to `value`. tensors: collects key -> tensor. keys: collects the key under which a
    tensor's memory is stored, so that a tensor with two names (tied embeddings) is stored once.
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        identity = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride()) if value.numel() else (path,)
        if identity not in keys:
            keys[identity] = path.lstrip(".") or "value"
            tensors[keys[identity]] = value
        return {"$tensor": keys[identity]}
    if isinstance(value, dict):
        if value and all(isinstance(key, int) for key in value):
            return {"$ints": [[key, _encode(item, f"{path}.{key}", tensors, keys)] for key, item in value.items()]}
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise ValueError(f"checkpoint{path}: the key {key!r} cannot be stored; use plain strings or integers")
        return {key: _encode(item, f"{path}.{key}", tensors, keys) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{path}.{i}", tensors, keys) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"checkpoint{path}: a {type(value).__name__} cannot be stored without pickle")


def _decode(value: object, tensors: Mapping[str, Tensor]) -> object:
    """Undo `_encode`."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_decode(item, tensors) for item in value["$tuple"])
    if "$ints" in value:
        return {key: _decode(item, tensors) for key, item in value["$ints"]}
    return {key: _decode(item, tensors) for key, item in value.items()}
