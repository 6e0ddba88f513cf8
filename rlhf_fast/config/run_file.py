"""A run's run.json as a file of settings: `--config runs/x/run.json` gives the run back, from any directory."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_fast.config.data_path import is_pattern
from rlhf_fast.config.resolve import json_settings, setting_types
from rlhf_fast.config.rewards import FunctionOfRun, is_function
from rlhf_fast.config.stages import STAGES
from rlhf_fast.config.yaml_file import Setting
from rlhf_fast.errors import UserError, listed

REWARDS = ("reward", "select_reward")
FUNCTIONS_FROM = "function_directories"
"""Key of run.json: function -> the directory of an earlier run, whose settings named it."""
PATHS = ("out", "reference", *REWARDS, "log.eval_data")
"""Settings that may name a folder or file, beside those of a model's or data group's path."""


def read_run_file(path: str | Path) -> dict[str, Any]:
    """Return the contents of a run.json of ours; {} for any other file."""
    file = Path(path).expanduser()
    if file.suffix != ".json":
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # the reader of YAML says why
    is_run = isinstance(found, dict) and isinstance(found.get("stage"), str) and isinstance(found.get("config"), dict)
    return found if is_run else {}


def run_settings(path: str | Path, run: Mapping[str, Any], stage: str) -> dict[str, Setting]:
    """Return the settings of a run. Relative paths are those of the directory in which it was started.

    Settings that this version does not have are left out and named on stderr. UserError for a run of another stage.
    """
    if run["stage"] != stage or stage not in STAGES:
        raise UserError(f"{path}: is of a run of {run['stage']}, not {stage}; `rlhf-fast {run['stage']}` reads it")
    settings = dict(json_settings(STAGES[stage], run["config"], "", str(path)))
    unknown = [name for name in settings if name not in setting_types(STAGES[stage])]
    if unknown:
        versions = run.get("versions")
        version = versions.get("rlhf-fast", "unknown") if isinstance(versions, dict) else "unknown"
        print(
            f"{stage}: {path}: was written by version {version}; this one has no {listed(unknown)}, so"
            f" {'they are' if len(unknown) > 1 else 'it is'} left out",
            file=sys.stderr,
        )
    base = run_directory(Path(path).expanduser(), run)
    found = run.get(FUNCTIONS_FROM)
    folders = found if isinstance(found, dict) else {}
    return {name: _placed(name, setting, base, folders) for name, setting in settings.items() if name not in unknown}


def run_directory(file: Path, run: Mapping[str, Any]) -> Path:
    """Return the directory in which a run was started: that from which its `out` is the folder of the file, so that a
    project may be moved; else the recorded one."""
    folder = Path(os.path.normpath(file.absolute())).parent
    out = run["config"].get("out")
    parts = Path(os.path.normpath(out)).parts if isinstance(out, str) and not Path(out).is_absolute() else ()
    if parts and ".." not in parts and folder.parts[-len(parts) :] == parts:
        return Path(*folder.parts[: -len(parts)])
    recorded = run.get("directory")
    return Path(recorded) if isinstance(recorded, str) and Path(recorded).is_dir() else Path.cwd()


def _placed(name: str, setting: Setting, base: Path, folders: Mapping[str, str]) -> Setting:
    """Return a setting whose paths lead to the same place from the working directory, and whose functions are found.

    folders: of functions that are not in `base`.
    """
    if not (name in PATHS or name.endswith((".path", ".valid"))):
        return setting
    value = setting.value
    if isinstance(value, list):
        return Setting([_place(entry, base, name, folders) for entry in value], setting.origin)
    return Setting(_place(value, base, name, folders), setting.origin)


def _place(value: object, base: Path, name: str, folders: Mapping[str, str]) -> object:
    """Return an absolute path for a relative one of `base`; any other value, such as a hub name, as it is."""
    if name in REWARDS and isinstance(value, str) and value in folders:
        return FunctionOfRun(value, str(folders[value]))
    if base == Path.cwd() or not isinstance(value, str) or not value or Path(value).is_absolute():
        return value
    if value.startswith("~"):
        return value
    path = str(base / value)
    there = (base / value).exists() or (is_pattern(path) and bool(glob.glob(path, recursive=True)))  # noqa: PTH207
    if name == "out" or there:
        return path
    return FunctionOfRun(value, str(base)) if name in REWARDS and is_function(value) else value
