"""Settings from a YAML file and back, by the core schema of YAML 1.2.

PyYAML reads YAML 1.1, in which `seed: 010` is 8, `epochs: 1:30` is 90, and `on`, `no` and 2024-05-01 are no text. Here
they are what they look like: 10, and text. Tags, merge keys, names that are given twice and further documents in the
file are refused with their line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlhf_fast.errors import UserError, shortened

WIDTH = 120
"""Columns of the text that people read."""
MAX_SETTINGS = 10_000
"""More settings than this come from aliases of aliases, which grow without end."""
TAG = "tag:yaml.org,2002:"
CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
"""Type -> (pattern, first characters). Any other plain scalar is text."""


class Setting(NamedTuple):
    """A value and its origin: `recipe.yaml:12`, `preset paper`, `--optim.lr`."""

    value: object
    origin: str


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars by the core schema alone."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (add_implicit_resolver fills it)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


for _name, (_pattern, _first) in CORE_SCHEMA.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{_pattern})\Z"), [*_first, ""])


def dump_yaml(value: object) -> str:
    """Return a value as YAML that `read_yaml`, and a reader of YAML 1.1, read back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH)


def read_yaml(path: str | Path) -> dict[str, Setting]:
    """Return every setting in a YAML file, by path. Groups may nest or be dotted. The names are not checked."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        _check_version(text, str(path))
        root = yaml.compose(text, Loader=_Loader)
    except OSError as error:
        raise UserError(f"{shortened(path)}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if problem == "but found another document":
            problem = "a second document begins; give one document in a file"
        elif problem == "mapping values are not allowed here":
            problem += "; look at the indentation of this line and the one before, and quote a text that has a colon"
        raise UserError(f"{path}{line}: not YAML: {problem}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        if isinstance(root, yaml.ScalarNode) and root.tag == TAG + "null":
            return {}
        raise UserError(f"{path}:1: expected settings such as `seed: 1`, found {root.id}")
    found: dict[str, Setting] = {}
    for name, setting in _settings(root, "", str(path), {}, ()):
        found[name] = setting
        if len(found) > MAX_SETTINGS:
            raise UserError(f"{setting.origin}: the file holds more than {MAX_SETTINGS} settings")
    return found


def _check_version(text: str, file: str) -> None:
    """Raise UserError for a `%YAML` directive of another version, by whose rules the values would be others."""
    events = yaml.parse(text, Loader=_Loader)
    start = next((event for event in events if isinstance(event, yaml.DocumentStartEvent)), None)
    if start and start.version and tuple(start.version) != (1, 2):
        version = ".".join(map(str, start.version))
        line = next(i for i, line in enumerate(text.splitlines(), 1) if line.startswith("%YAML"))
        raise UserError(f"{file}:{line}: is to be read as YAML {version}, and only 1.2 is served; remove %YAML")


def _settings(
    node: yaml.MappingNode, prefix: str, file: str, lines: dict[str, int], above: tuple[yaml.Node, ...]
) -> Iterator[tuple[str, Setting]]:
    """Yield the path and value of each setting below `node`. `lines` collects the line of each path, `above` the groups
    around this one."""
    _check_tag(node, "map", file)
    if any(node is group for group in above):
        raise UserError(f"{_place(node, file)}: this group contains itself")
    for key, value in node.value:
        name = prefix + _key(key, file)
        line = key.start_mark.line + 1
        # `columns` is a setting that is itself a map; every other map is a group of settings.
        is_group = isinstance(value, yaml.MappingNode) and key.value.rpartition(".")[2] != "columns"
        slot = f"{name}." if is_group else name
        if slot in lines:
            raise UserError(f"{file}:{line}: {name} is set twice, first in line {lines[slot]}")
        lines[slot] = line
        if is_group:
            yield from _settings(value, f"{name}.", file, lines, (*above, node))
        else:
            yield name, Setting(_value(value, file), f"{file}:{line}")


def _value(node: yaml.Node, file: str) -> object:
    """Return a scalar, a list of scalars, or a map from text to scalars."""
    if isinstance(node, yaml.SequenceNode):
        _check_tag(node, "seq", file)
        return [_scalar(item, file) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        _check_tag(node, "map", file)
        found: dict[str, object] = {}
        for key, item in node.value:
            name = _key(key, file)
            if name in found:
                raise UserError(f"{_place(key, file)}: {name} is set twice")
            found[name] = _scalar(item, file)
        return found
    return _scalar(node, file)


def _scalar(node: yaml.Node, file: str) -> object:
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{_place(node, file)}: no setting is a list or map of lists or maps")
    text: Any = node.value
    kind = node.tag.removeprefix(TAG)
    if kind == "str":
        return text
    if kind not in CORE_SCHEMA:
        shown = f"!!{kind}" if node.tag.startswith(TAG) else node.tag
        raise UserError(f"{_place(node, file)}: the tag {shown} is not served; write the value itself")
    if not re.fullmatch(CORE_SCHEMA[kind][0], text):
        raise UserError(f"{_place(node, file)}: {shortened(text)} is no {kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    try:
        if kind == "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError as error:  # Python reads no number of more than 4300 digits
        raise UserError(f"{_place(node, file)}: {shortened(text)} has too many digits") from error


def _key(node: yaml.Node, file: str) -> str:
    """Return a name. A number or `true` is one too, as text."""
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{_place(node, file)}: a name must be text, found a {node.id}")
    if node.value == "<<" and node.style is None:
        raise UserError(f"{_place(node, file)}: merge keys (<<) are not part of YAML 1.2; write the settings out")
    if node.tag.removeprefix(TAG) not in (*CORE_SCHEMA, "str"):
        raise UserError(f"{_place(node, file)}: the tag {node.tag} is not served; write the name itself")
    return str(node.value)


def _check_tag(node: yaml.Node, expected: str, file: str) -> None:
    if node.tag != TAG + expected:
        shown = node.tag.replace(TAG, "!!")
        raise UserError(f"{_place(node, file)}: the tag {shown} is not served; write the value itself")


def _place(node: yaml.Node, file: str) -> str:
    return f"{file}:{node.start_mark.line + 1}"
