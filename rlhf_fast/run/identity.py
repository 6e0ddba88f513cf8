"""Compare a folder's run with the one that is asked for: stage, settings, and the bytes of its inputs.

Names and times do not count. A data file or model that was moved, copied or linked is the same; one that was changed in
place is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_fast.config.data_path import DataPath, PythonRows, hub_name, parts, path_key
from rlhf_fast.config.resolve import difference, from_json, show
from rlhf_fast.config.rewards import is_function, spec_name
from rlhf_fast.config.stages import StageConfig
from rlhf_fast.data.hub import split_sha256
from rlhf_fast.errors import UserError
from rlhf_fast.run.function_source import function_source
from rlhf_fast.run.info import model_sha256, sha256

MAY_DIFFER_ON_RESUME = (
    "out",
    "resume",
    "reward_timeout",
    "reward_retries",
    *(f"log.{name}" for name in ("every", "samples", "show_samples", "keep", "live", "sinks", "check_fit")),
    *(f"log.checkpoint_{name}" for name in ("every", "minutes")),
    *(f"log.eval_{name}" for name in ("every", "tasks", "data", "limit")),
)
"""Settings that do not change the weights that `out` gets. log.validate_every does: it decides at which steps there are
weights to select from."""

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
            source, name = function_source(spec), spec_name(spec)
            if source.checksum:
                taken = sum(key.partition("#")[0] == name for key in found["functions"])  # two lambdas of one name
                found["functions"][f"{name}#{taken + 1}" if taken else name] = source.checksum
            if source.file:
                found["data"][str(source.file)] = source.checksum
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


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _one_input(was: Any, value: Any, before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Return whether two names may be those of one input that was moved. Two functions of one file are two."""
    if not (isinstance(was, str) and isinstance(value, str) and was in before and value in now):
        return False
    return not is_function(value) or was.rpartition(":")[2] == value.rpartition(":")[2]


def _are_inputs(was: Any, value: Any, before: Mapping[str, str], now: Mapping[str, str]) -> tuple[bool, bool]:
    """Return whether two values of a setting name inputs, and whether these have the same contents."""
    one, other = (", ".join(map(str, _as_tuple(names))) for names in (was, value))
    if one in before and other in now and not is_function(other):  # the files of a path, all together
        return True, before[one] == now[other]
    pairs = list(zip(_as_tuple(was), _as_tuple(value), strict=False))
    equal_length = len(_as_tuple(was)) == len(_as_tuple(value))
    are_inputs = equal_length and all(a == b or _one_input(a, b, before, now) for a, b in pairs)
    return are_inputs, are_inputs and all(a == b or before[a] == now[b] for a, b in pairs)


def check_same_run(
    saved: Mapping[str, Any],
    cfg: StageConfig,
    checksums: Mapping[str, Mapping[str, str]],
    remedy: str = "choose another `out`",
) -> None:
    """Raise UserError if run.json (`saved`) is of another stage, or of other settings, data or models.

    checksums: what `input_checksums` returns now. remedy: the end of the sentence.
    """
    out = cfg.out
    if saved["stage"] != cfg.stage:
        raise UserError(f"{out}: holds a run of {saved['stage']}, not {cfg.stage}; {remedy}")
    before = {name: digest for section in INPUTS for name, digest in saved.get(section, {}).items()}
    now = {name: digest for section in INPUTS for name, digest in checksums[section].items()}
    differ = []
    for name, was, value in difference(from_json(cfg.stage, saved["config"], f"{out}/run.json"), cfg):
        are_inputs, same = _are_inputs(was, value, before, now)
        if name not in MAY_DIFFER_ON_RESUME and not same:
            note = " with other contents" if are_inputs else ""
            differ.append(f"{name} = {show(was)}, now {show(value)}{note}")
    if differ:
        raise UserError(
            f"{out}: was {'finished' if 'finished' in saved else 'started'} with {'; '.join(differ)}; set"
            f" {'them' if len(differ) > 1 else 'it'} back or {remedy}"
        )
    for name, digest in now.items():
        if before.get(name, digest) != digest:
            what = "the model in it has" if name in checksums["models"] else "has"
            raise UserError(f"{name}: {what} changed since {out} was started with it; {remedy}")
