"""Compare a folder's run with the one that is asked for: stage, settings, and the bytes of its inputs.

Names and times do not count. A data file or model that was moved, copied or linked is the same; one that was changed in
place is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_fast.config.resolve import difference, from_json, show
from rlhf_fast.config.stages import StageConfig
from rlhf_fast.errors import UserError
from rlhf_fast.run.info import model_sha256, sha256
from rlhf_fast.training.rewards import is_function, source_file

MAY_DIFFER_ON_RESUME = (
    "out",
    "resume",
    *(f"log.{name}" for name in ("every", "samples", "keep", "live", "sinks", "check_fit")),
    *(f"log.checkpoint_{name}" for name in ("every", "minutes")),
    *(f"log.eval_{name}" for name in ("every", "tasks", "data", "limit")),
)
"""Settings that do not change the weights that `out` gets. log.validate_every does: it decides at which steps there are
weights to select from."""

INPUTS = ("data", "models", "functions")
"""Sections of run.json with the checksums of what a run reads."""


def input_checksums(cfg: StageConfig) -> dict[str, dict[str, str]]:
    """Return the checksums of the data files, model folders and reward functions that are there, by their names in
    `cfg`: the INPUTS sections of run.json. A function has that of its source file."""
    found: dict[str, dict[str, str]] = {section: {} for section in INPUTS}
    for path in cfg.input_paths().values():
        if Path(path).is_dir():
            found["models"][path] = model_sha256(path)
        elif Path(path).is_file():
            found["data"][path] = sha256(path)
    for spec in filter(is_function, cfg.model_paths()):
        with suppress(UserError):  # a finished run does not need it
            if source := source_file(spec):
                found["functions"][spec] = found["data"][str(source)] = sha256(source)
    return found


def check_same_run(saved: Mapping[str, Any], cfg: StageConfig, checksums: Mapping[str, Mapping[str, str]]) -> None:
    """Raise UserError if run.json (`saved`) is of another stage, or of other settings, data or models.

    checksums: what `input_checksums` returns now.
    """
    out = cfg.out
    if saved["stage"] != cfg.stage:
        raise UserError(f"{out}: holds a run of {saved['stage']}, not {cfg.stage}; choose another `out`")
    before = {name: digest for section in INPUTS for name, digest in saved.get(section, {}).items()}
    now = {name: digest for section in INPUTS for name, digest in checksums[section].items()}
    differ = []
    for name, was, value in difference(from_json(cfg.stage, saved["config"], f"{out}/run.json"), cfg):
        are_inputs = isinstance(was, str) and isinstance(value, str) and was in before and value in now
        if name not in MAY_DIFFER_ON_RESUME and not (are_inputs and before[was] == now[value]):
            note = " with other contents" if are_inputs else ""
            differ.append(f"{name} = {show(was)}, now {show(value)}{note}")
    if differ:
        raise UserError(
            f"{out}: was {'finished' if 'finished' in saved else 'started'} with {'; '.join(differ)}; set"
            f" {'them' if len(differ) > 1 else 'it'} back or choose another `out`"
        )
    for name, digest in now.items():
        if before.get(name, digest) != digest:
            what = "the model in it has" if name in checksums["models"] else "has"
            raise UserError(f"{name}: {what} changed since {out} was started with it; choose another `out`")
