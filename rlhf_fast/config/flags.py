"""Command-line flags as settings: a flag is the setting's path, `--optim.lr 1e-5`. tyro parses, and writes --help."""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Sequence
from typing import TypeVar

import tyro

from rlhf_fast.config.fields import BadSetting
from rlhf_fast.config.presets import PRESETS, preset
from rlhf_fast.config.resolve import Setting, coerce, read_yaml, resolve, reword, section, setting_types, unknown
from rlhf_fast.config.stages import StageConfig
from rlhf_fast.errors import UserError

T = TypeVar("T")


def stage_config(cls: type[StageConfig], argv: Sequence[str]) -> StageConfig:
    """The stage's settings: defaults, then --preset, then --config, then flags."""
    rest, chosen = _take(argv, cls.stage, "--preset", "--config")
    layers = [preset(cls.stage, chosen["--preset"])]
    if chosen["--config"]:
        layers.append(section(read_yaml(chosen["--config"]), cls.stage))
    given: dict[str, Setting] = {path: item for layer in layers for path, item in layer.items()}
    given |= _scan(cls, rest)
    about = (
        f"{cls.__doc__} Also: --preset {{default,{','.join(PRESETS[cls.stage])}}}, and --config FILE, a YAML file with"
        " the same names. Default < preset < file < flag."
    )
    base = resolve(cls, *layers, check=False)
    try:
        return parse(cls, rest, cls.stage, default=base, description=about)
    except BadSetting as error:
        paths = [path for path in setting_types(cls) if path.rpartition(".")[2] == error.name]
        path = next((path for path in paths if path in given), paths[0])
        raise reword(cls, error, path, given) from error


def parse(kind: type[T], argv: Sequence[str], command: str, **options: object) -> T:
    """tyro.cli, with its boxed complaints turned into a UserError of one sentence."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=list(argv), prog=f"rlhf-fast {command}", **options)
    except SystemExit as end:
        if not end.code:
            raise
        said = [line.strip("│╭╮╰╯─ ") for line in complaint.getvalue().splitlines()]
        said = [line for line in said[1:] if line.strip("-")] or ["wrong arguments"]
        hint = _nearest(kind, argv) if "nrecognized" in said[0] else ""
        raise UserError(f"{command}: {said[0]}; {hint or f'see `rlhf-fast {command} --help`'}") from end


def _nearest(kind: type, argv: Sequence[str]) -> str:
    """What the first flag that `kind` does not have may have been meant to be; of a dotted one its last part counts."""
    flags = [path.rpartition(".")[2].replace("_", "-") for path in setting_types(kind)]
    for item in argv:
        name = item.partition("=")[0].removeprefix("--").rpartition(".")[2].replace("_", "-")
        if item.startswith("--") and (item.partition("=")[0].removeprefix("--").replace("_", "-") not in flags):
            near = difflib.get_close_matches(name, flags, n=1)
            return f"did you mean --{near[0]}?" if near else ""
    return ""


def _take(argv: Sequence[str], command: str, *names: str) -> tuple[list[str], dict[str, str]]:
    """The arguments without `names`, and the value of each of these ("" if not given)."""
    rest, found, items = [], dict.fromkeys(names, ""), iter(argv)
    for item in items:
        name, equals, value = item.partition("=")
        if name not in names:
            rest.append(item)
            continue
        value = value if equals else next(items, "")
        if not value or value.startswith("--"):
            raise UserError(f"{command}: {name} needs a value")
        found[name] = value
    return rest, found


def _scan(cls: type, argv: Sequence[str]) -> dict[str, Setting]:
    """The flags among the arguments, by path. UserError for one that is no setting or whose one value is wrong."""
    given = {}
    for i, item in enumerate(argv):
        if not item.startswith("--") or item == "--help":
            continue
        name, equals, value = item[2:].partition("=")
        path = name.replace("-", "_")
        if path not in setting_types(cls):
            head, _, tail = path.rpartition(".")
            positive = f"{head}.{tail.removeprefix('no_')}".lstrip(".")
            if not tail.startswith("no_") or setting_types(cls).get(positive) is not bool:
                raise unknown(cls, path, f"--{name}")
            path = positive
        following = value if equals else (argv[i + 1] if i + 1 < len(argv) else "")
        given[path] = Setting(following, f"--{name}")
        if setting_types(cls)[path] in (int, float) or str(setting_types(cls)[path]).startswith("typing.Literal"):
            coerce(cls, path, given[path])
    return given
