"""Compare a folder's run with the one that is asked for: stage, settings, and the bytes of its inputs.

Names and times do not count. A data file or model that was moved, copied or linked is the same; one that was changed in
place is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.config.data_path import DataPath, PythonRows, hub_name, parts, path_key
from rlhf_fast.config.resolve import difference, from_json, show
from rlhf_fast.config.rewards import is_function, spec_name
from rlhf_fast.config.stages import RewardConfig, StageConfig
from rlhf_fast.data.hub import split_sha256
from rlhf_fast.errors import UserError
from rlhf_fast.run.checkpoint import steps_done
from rlhf_fast.run.function_source import function_checksum
from rlhf_fast.run.info import model_sha256, sha256

MAY_DIFFER_ON_RESUME = (
    "out",
    "resume",
    "resume_with_changed_reward",
    "reward_timeout",
    "reward_retries",
    *(f"log.{name}" for name in ("every", "samples", "show_samples", "keep", "live", "sinks", "check_fit")),
    *(f"log.checkpoint_{name}" for name in ("every", "minutes")),
    *(f"log.eval_{name}" for name in ("every", "tasks", "data", "limit")),
)
"""Settings that do not change the weights that `out` gets. log.validate_every does: it decides at which steps there are
weights to select from."""

CHANGED_FLAG = "--resume-with-changed-reward (in a recipe --{stage}.resume-with-changed-reward)"

INPUTS = ("data", "models", "functions")
"""Sections of run.json with the checksums of what a run reads."""


def input_checksums(cfg: StageConfig) -> dict[str, dict[str, str]]:
    """Return the checksums of the data files, model folders and reward functions that are there, by their names in
    `cfg`: the INPUTS sections of run.json. A function has that of its source (function_source.py)."""
    found: dict[str, dict[str, str]] = {section: {} for section in INPUTS}
    for path in cfg.input_paths().values():
        if Path(path).is_dir():
            found["models"][path] = model_sha256(path)
        elif Path(path).is_file():
            found["data"][path] = sha256(path)
    for data in cfg.data_paths():
        found["data"] |= data_checksums(data)
    for spec in filter(is_function, cfg.rewards().values()):
        with suppress(UserError):  # a finished run does not need it
            checksum, name = function_checksum(spec), spec_name(spec)
            if checksum:
                taken = sum(key.partition("#")[0] == name for key in found["functions"])  # two lambdas of one name
                found["functions"][f"{name}#{taken + 1}" if taken else name] = checksum
    return found


def data_checksums(path: DataPath) -> dict[str, str]:
    """Return the checksum of each file and data set that a path names, and one of all together under the path's own
    name, which shows that a pattern has other files than before. A data set of the hub that cannot be read has none."""
    found: dict[str, str] = {}
    for part in parts(path):
        if isinstance(part, PythonRows):
            found[str(part)] = part.sha256
        elif Path(part).is_file():
            found[part] = sha256(part)
        elif hub_name(part):
            with suppress(UserError):  # a finished run does not need it
                found[part] = split_sha256(part)
    digests = [found[part] for part in parts(path) if part in found]  # a file that is given twice is read twice
    if len(digests) == 1:
        found[path_key(path)] = digests[0]
    elif digests:
        found[path_key(path)] = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return found


def by_name(sections: Mapping[str, Any]) -> dict[str, str]:
    """Return the checksums of all INPUTS sections of a run.json."""
    found = (sections.get(section) for section in INPUTS)
    return {name: str(digest) for section in found if isinstance(section, dict) for name, digest in section.items()}


class Contents(NamedTuple):
    """The contents that a setting's value stands for. Two values with the same ones are of one run, whatever paths they
    are."""

    checksums: tuple[str, ...]
    """One of all files of a data path, else one of each entry; "" for an entry that is no input."""
    names: tuple[Any, ...]
    """The rest: the name of a function, as its file may have several; a value that is no input."""


def contents_of(value: Any, checksums: Mapping[str, str]) -> Contents:
    """Return what a setting's value stands for. checksums: of the run's inputs, by name."""
    entries = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(entry, str) for entry in entries):
        return Contents(("",), (value,))
    if (whole := path_key(entries)) in checksums:
        entries = (whole,)
    found = tuple(checksums.get(entry, "") for entry in entries)
    names = [
        (entry.rpartition(":")[2] if is_function(entry) else "") if digest else entry
        for entry, digest in zip(entries, found, strict=True)
    ]
    return Contents(found, tuple(names))


def check_same_run(
    saved: Mapping[str, Any],
    cfg: StageConfig,
    checksums: Mapping[str, Mapping[str, str]],
    remedy: str = "choose another `out`",
) -> dict[str, str]:
    """Return the functions that have changed and may, with their old checksums: before the first checkpoint, from which
    nothing is left, or by resume_with_changed_reward. UserError if run.json (`saved`) is of another stage, or of other
    settings, data, models or functions.

    checksums: what `input_checksums` returns now. remedy: the end of the sentence.
    """
    out = cfg.out
    if saved["stage"] != cfg.stage:
        raise UserError(f"{out}: holds a run of {saved['stage']}, not {cfg.stage}; {remedy}")
    before, now = by_name(saved), by_name(checksums)
    differ = []
    for name, was, value in difference(from_json(cfg.stage, saved["config"], f"{out}/run.json"), cfg):
        old, new = contents_of(was, before), contents_of(value, now)
        if name not in MAY_DIFFER_ON_RESUME and old != new:
            note = " with other contents" if any(new.checksums) and old.names == new.names else ""
            differ.append(f"{name} = {show(was)}, now {show(value)}{note}")
    if differ:
        raise UserError(
            f"{out}: was {'finished' if 'finished' in saved else 'started'} with {'; '.join(differ)}; set"
            f" {'them' if len(differ) > 1 else 'it'} back or {remedy}"
        )
    changed = {name: before[name] for name, digest in now.items() if before.get(name, digest) != digest}
    functions = {name: digest for name, digest in changed.items() if name in checksums["functions"]}
    for name in changed.keys() - functions.keys():
        what = "the model in it has" if name in checksums["models"] else "has"
        raise UserError(f"{name}: {what} changed since {out} was started with it; {remedy}")
    if functions and "finished" in saved:
        raise UserError(f"{next(iter(functions))}: has changed since {out} was finished with it; {remedy}")
    may_change = isinstance(cfg, RewardConfig) or cfg.resume_with_changed_reward
    if functions and not may_change and (done := steps_done(out)):
        raise UserError(
            f"{next(iter(functions))}: has changed since {out} was started with it; to go on from step {done} with the"
            f" changed function add {CHANGED_FLAG.format(stage=cfg.stage)}, or {remedy}"
        )
    return functions
