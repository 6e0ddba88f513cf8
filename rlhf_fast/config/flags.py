"""Command-line flags as settings: a flag is the setting's path, `--optim.lr 1e-5`. tyro parses and writes --help."""

from __future__ import annotations

import contextlib
import io
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from rlhf_fast.config.checks import BadSetting
from rlhf_fast.config.library_names import meant_setting
from rlhf_fast.config.presets import PRESETS, preset
from rlhf_fast.config.resolve import coerce, resolve, setting_error, setting_types, unknown_setting
from rlhf_fast.config.rewards import REWARD_SPECS
from rlhf_fast.config.sections import read_stage
from rlhf_fast.config.stages import StageConfig
from rlhf_fast.config.typed import UNIONS
from rlhf_fast.config.yaml_file import Setting
from rlhf_fast.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SENTENCES = {
    r"Error parsing (\S+): invalid literal for int\(\).*: '(.*)'": "{} must be a whole number, got {}",
    r"Error parsing (\S+): could not convert string to float: '(.*)'": "{} must be a number, got {}",
    r"Error parsing (\S+): Failed to parse key-value pairs!": "{0} takes pairs of names, as in {0} prompt question",
    r"Error parsing (\S+): no type matching .*\{STR STR\} could be .* from \['(.*)'\]": "{} takes two names, got {}",
    r"Error parsing (\S+): Could not find valid parse for arguments: (.*)": "{} has a value of the wrong type in {}",
    r"Missing value for argument '(.*)'\. Expected 1 values?": "{} needs a value",
}
"""Sentence of tyro's, as a pattern, -> ours."""

T = TypeVar("T", bound="DataclassInstance")
S = TypeVar("S", bound=StageConfig)


def stage_config(cls: type[S], argv: Sequence[str]) -> S:
    """Return the stage's settings: the defaults, then --preset, then --config, then flags."""
    flags, options = _extract_options(argv, cls.stage, "--preset", "--config")
    file = options["--config"]
    file_preset, settings = read_stage(file, cls.stage) if file else ("", {})
    layers = [preset(cls.stage, options["--preset"] or file_preset), settings]
    given: dict[str, Setting] = {path: setting for layer in layers for path, setting in layer.items()}
    given |= _flag_settings(cls, flags)
    description = (
        f"{cls.__doc__} Also: --preset {{default,{','.join(PRESETS[cls.stage])}}}, --config FILE, a YAML file with the"
        " same names (default < preset < file < flag), and --dry-run: print what the run takes, and stop there."
    )
    # A flag may correct what a preset or file breaks, so the rules are checked only with the flags.
    default = resolve(cls, *layers, check=False)
    try:
        return parse(cls, flags, cls.stage, default=default, description=description)
    except BadSetting as error:
        paths = [path for path in setting_types(cls) if f".{path}".endswith(f".{error.name}")]
        paths = [path for path in paths if path in given] or paths[:1]  # of several groups with this setting
        path = next((path for path in paths if _has_value(cls, path, given, error.value)), paths[0])
        raise setting_error(cls, error, path, given) from error


def _has_value(cls: type[DataclassInstance], path: str, given: Mapping[str, Setting], value: object) -> bool:
    """Return whether a setting was given with this value."""
    with contextlib.suppress(UserError, KeyError):
        return bool(coerce(cls, path, given[path]) == value)
    return False


def parse(cls: type[T], argv: Sequence[str], command: str, **options: Any) -> T:
    """Run tyro.cli. An error that tyro prints in a box becomes a UserError of one sentence."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), _long_lines(not {"-h", "--help"} & set(argv)):
            return tyro.cli(cls, args=_checked(cls, argv, command), prog=f"rlhf-fast {command}", **options)
    except SystemExit as error:
        if not error.code:
            raise
        message = _message(stderr.getvalue())
        hint = (_switch_with_value(cls, argv) or _nearest_flag(cls, argv)) if "nrecognized" in message else ""
        raise UserError(f"{command}: {message}; {hint or f'see `rlhf-fast {command} --help`'}") from error


@contextlib.contextmanager
def _long_lines(enabled: bool) -> Iterator[None]:
    """Let tyro's box have one line for each sentence, however narrow the terminal is."""
    before = os.environ.get("COLUMNS")
    if enabled:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


def _message(box: str) -> str:
    """Return the sentence in tyro's box; for arguments that are left out, their names."""
    lines = [line.strip("│|").rstrip() for line in box.splitlines()[1:]]
    found = [list(part) for is_text, part in groupby(lines, lambda line: bool(line.strip(" ─-+╰╯"))) if is_text]
    sections = [textwrap.dedent("\n".join(part)).split("\n") for part in found]
    for section in sections:  # a misspelt flag is the cause where the right one is missing too
        if section[0].startswith("Unrecognized"):
            return " ".join(line.strip() for line in section)
    first = sections[0] if sections else ["wrong arguments"]
    names = [line.split()[0].rstrip(",") for line in first[1:] if line.startswith("    ") and line[4:5].strip()]
    if first[0].startswith("Missing from") and names:
        return f"{' and '.join(names)} must be given"
    return _in_our_words(first[0].rstrip("."))


def _in_our_words(sentence: str) -> str:
    """Return a sentence of tyro's on one argument as this package writes it; one that is not known stays as it is."""
    if found := re.fullmatch(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*?),?\)", sentence):
        value, flag, choices = found.groups()
        names = list(filter(None, (name.strip("' ") for name in choices.split(","))))
        hint = did_you_mean(value, names, "")
        return f"{_last_name(flag)} must be one of {', '.join(names)}{f' ({hint})' * bool(hint)}, got {value}"
    for pattern, words in SENTENCES.items():
        if found := re.fullmatch(pattern, sentence):
            return words.format(_last_name(found[1]), *found.groups()[1:])
    return sentence


def _last_name(flag: str) -> str:
    """Return the last of a flag's names, -n/--n."""
    return flag.rpartition("/")[2]


def _type_of(cls: type[DataclassInstance], flag: str) -> Any:
    """Return the type of the setting that a flag names. Commands other than the stages leave out the groups' names."""
    path = flag.lstrip("-").replace("-", "_")
    types = setting_types(cls)
    if path in types or hasattr(cls, "stage"):
        return types.get(path)
    return next((kind for name, kind in types.items() if name.rpartition(".")[2] == path), None)


def _checked(cls: type[DataclassInstance], argv: Sequence[str], command: str) -> list[str]:
    """Return the arguments with whole numbers such as 1e2 written out, as a YAML file may give them. UserError for an
    entry of a map or a whole list that is given twice, of which one would be lost."""
    arguments = list(argv)
    seen: set[str] = set()
    for i, argument in enumerate(argv):
        if not argument.startswith("-"):
            continue
        flag, equals, value = argument.partition("=")
        kind = _type_of(cls, flag)
        if kind is int:
            if not equals:
                value = argv[i + 1] if i + 1 < len(argv) else ""
            with contextlib.suppress(ValueError, OverflowError):
                if not value.isdigit() and float(value).is_integer():
                    number = str(int(value) if value.lstrip("+-").isdigit() else int(float(value)))
                    arguments[i if equals else i + 1] = f"{flag}={number}" if equals else number
        elif get_origin(kind) in (dict, tuple, *UNIONS) or kind == REWARD_SPECS:
            if flag.replace("_", "-") in seen:
                raise UserError(f"{command}: {flag} is given twice, and only one would count; give all after one")
            seen.add(flag.replace("_", "-"))
            keys = list(takewhile(lambda word: not word.startswith("--"), argv[i + 1 :]))[::2]
            if get_origin(kind) is dict and (twice := [key for key in keys if keys.count(key) > 1]):
                raise UserError(f"{command}: {flag} has {twice[0]} twice, and only one can be meant")
    return arguments


def _switch_with_value(cls: type[DataclassInstance], argv: Sequence[str]) -> str:
    """Return how to write a switch that is given with a value, such as `--resume False`; "" if there is none."""
    for argument, following in zip(argv, [*argv[1:], "--"], strict=True):
        flag, equals, _ = argument.partition("=")
        if argument.startswith("--") and _type_of(cls, flag) is bool and (equals or not following.startswith("--")):
            group, dot, name = flag.removeprefix("--").rpartition(".")
            kind = get_type_hints(cls, include_extras=True).get(name.replace("-", "_"))
            is_pair = tyro.conf.FlagCreatePairsOff not in get_args(kind)
            return f"{flag} takes no value: give {flag} alone" + f", or --{group}{dot}no-{name}" * is_pair
    return ""


def _nearest_flag(cls: type[DataclassInstance], argv: Sequence[str]) -> str:
    """Suggest a flag of `cls` for the first unknown one."""
    flags = [path if hasattr(cls, "stage") else path.rpartition(".")[2] for path in setting_types(cls)]
    for argument in argv:
        flag = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and flag not in flags:
            meant = meant_setting(flag, flags).replace("_", "-").replace(" and ", " and --")
            return f"did you mean --{meant}?" if meant else ""
    return ""


def _extract_options(argv: Sequence[str], command: str, *names: str) -> tuple[list[str], dict[str, str]]:
    """Split off the options `names`; return the other arguments and each option's value, "" if it is not given."""
    others: list[str] = []
    values = dict.fromkeys(names, "")
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in names:
            others.append(argument)
            continue
        value = value if equals else next(arguments, "")
        if not value or value.startswith("--"):
            raise UserError(f"{command}: {name} needs a value")
        if values[name]:
            raise UserError(f"{command}: {name} is given twice, {values[name]} and {value}; give one")
        values[name] = value
    return others, values


def _flag_settings(cls: type[DataclassInstance], argv: Sequence[str]) -> dict[str, Setting]:
    """Return the flags by path. UserError for a flag that is no setting, and for a wrong number or choice."""
    types = setting_types(cls)
    given = {}
    for i, argument in enumerate(argv):
        if not argument.startswith("--") or argument == "--help":
            continue
        name, equals, value = argument[2:].partition("=")
        path = name.replace("-", "_")
        if path not in types:
            path = _without_no(path)
            if types.get(path) is not bool:
                raise unknown_setting(cls, name.replace("-", "_"), f"--{name}")
        if not equals:
            value = argv[i + 1] if i + 1 < len(argv) else ""
        given[path] = Setting(value, f"--{name}")
        if types[path] in (int, float) or str(types[path]).startswith("typing.Literal"):
            coerce(cls, path, given[path])
    return given


def _without_no(path: str) -> str:
    """Return the setting that a flag such as `data.no_append_eos` turns off; "" for another flag."""
    group, dot, name = path.rpartition(".")
    return f"{group}{dot}{name.removeprefix('no_')}" if name.startswith("no_") else ""
