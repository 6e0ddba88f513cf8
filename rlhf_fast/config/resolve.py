"""From defaults, preset, file and flags to one settings tree, in that order; the last to speak wins.

A setting is named by its path, `optim.lr`. A wrong name or value is answered with that path, the line of the file it
stands in, and the nearest right name: `ppo: no setting "optim.lrr"; did you mean optim.lr? (recipe.yaml:12)`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import math
import textwrap
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import yaml

from rlhf_fast.config.fields import BadSetting
from rlhf_fast.config.stages import STAGES
from rlhf_fast.errors import UserError, listed

T = TypeVar("T")
WIDTH = 120
"""Of the lines that are written for people."""


class Setting(NamedTuple):
    """A value and who gave it: `recipe.yaml:12`, `preset paper`, `--optim.lr`."""

    value: object
    origin: str


@functools.cache
def setting_types(cls: type) -> Mapping[str, Any]:
    """Path -> type of every setting below the dataclass `cls`."""
    found = {}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            found |= {f"{field.name}.{path}": leaf for path, leaf in setting_types(kind).items()}
        else:
            found[field.name] = kind
    return types.MappingProxyType(found)


@functools.cache
def setting_docs(cls: type) -> Mapping[str, str]:
    """Path -> what it does, of every group and setting below the dataclass `cls`: the text that stands under it in the
    source, which is where tyro has --help from; of a group without one, what its class says of itself."""
    found, hints = {}, get_type_hints(cls)
    for owner in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        body = ast.parse(inspect.getsource(owner)).body[0].body
        for line, below in zip(body, body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[line.target.id] = " ".join(ast.literal_eval(below.value).split())
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            found.setdefault(field.name, " ".join(kind.__doc__.split()))
            found |= {f"{field.name}.{path}": told for path, told in setting_docs(kind).items()}
    return types.MappingProxyType(found)


def flatten(cfg: object) -> dict[str, Any]:
    """Path -> value of every setting of a tree."""
    return {path: functools.reduce(getattr, path.split("."), cfg) for path in setting_types(type(cfg))}


def resolve(cls: type[T], *layers: Mapping[str, Setting], check: bool = True) -> T:
    """The tree of `cls` with the layers' values over the defaults; later layers win. UserError if a value is wrong.

    check=False leaves out the rules (not the types): for a tree that flags still have to complete.
    """
    given: dict[str, Setting] = {}
    for layer in layers:
        for path, item in layer.items():
            given[path] = Setting(coerce(cls, path, item), item.origin)
    return _construct(cls, cls, given, "", check)


def _construct(root: type, cls: type, given: Mapping[str, Setting], prefix: str, check: bool) -> Any:
    hints, values = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        path, kind = prefix + field.name, hints[field.name]
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(kind):
            inner = {f"{path}.{p}": Setting(value, "the default") for p, value in flatten(default).items()}
            values[field.name] = _construct(root, kind, inner | dict(given), path + ".", check)
        else:
            values[field.name] = given[path].value if path in given else default
    if check:
        try:
            return cls(**values)
        except BadSetting as error:
            raise reword(root, error, prefix + error.name, given) from error
    tree = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(tree, name, value)
    return tree


def reword(root: type, error: BadSetting, path: str, given: Mapping[str, Setting]) -> UserError:
    """The broken rule with the setting's whole path and the place it came from."""
    where = f" ({given[path].origin})" if path in given and given[path].origin != "the default" else ""
    return UserError(f"{stage_name(root)}: {path} {error.rule}, got {show(error.value)}{where}")


def stage_name(cls: type) -> str:
    return getattr(cls, "stage", "") or cls.__name__


def show(value: object) -> str:
    """A value as the YAML file would have it, on one line."""
    return json.dumps(value) if not isinstance(value, str) or not value or set(value) & set(" :#'\"") else value


def unknown(cls: type, path: str, origin: str) -> UserError:
    """The sentence for a name that is no setting."""
    names = list(setting_types(cls))
    near = difflib.get_close_matches(path, names, n=1, cutoff=0.6)
    if not near:  # `--lr` for optim.lr: the last part alone
        near = [name for name in names if name.rpartition(".")[2] == path.rpartition(".")[2]][:1]
    inside = [name for name in names if name.startswith(path + ".")]
    if inside:
        hint = f"it is a group, of {listed(inside, 4)}"
        return UserError(f'{stage_name(cls)}: "{path}" takes no value; {hint} ({origin})')
    hint = f"did you mean {near[0]}?" if near else f"`rlhf-fast show-config {stage_name(cls)}` lists them"
    return UserError(f'{stage_name(cls)}: no setting "{path}"; {hint} ({origin})')


def coerce(cls: type, path: str, given: Setting) -> Any:
    """The value in its setting's type, or a UserError. Text is read as YAML reads it, and 1e-5 is a number."""
    if path not in setting_types(cls):
        raise unknown(cls, path, given.origin)
    try:
        return _coerce(setting_types(cls)[path], given.value)
    except ValueError as error:
        raise UserError(f"{stage_name(cls)}: {path} {error}, got {show(given.value)} ({given.origin})") from error


def _coerce(kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in arguments:
            near = difflib.get_close_matches(str(value), map(str, arguments), n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"must be one of {', '.join(map(str, arguments))}{hint}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError("must be a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ValueError(f"must be a list of {len(arguments)}")
        return tuple(_coerce(arguments[0], item) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError("must be a map such as {completion: answer}")
        return {str(key): _coerce(arguments[1], item) for key, item in value.items()}
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("must be true or false")
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if kind is float and math.isfinite(number):
            return number
        if kind is int and number.is_integer():
            return int(value) if isinstance(value, int) else int(number)
        raise ValueError("must be a whole number" if kind is int else "must be a number")
    if kind is str and isinstance(value, str):
        return value
    if kind is str and value is None:
        return ""
    raise ValueError(f"must be {'text' if kind is str else 'a number'}")


def read_yaml(path: str | Path) -> dict[str, Setting]:
    """Path -> value and line, of every setting in a YAML file. Groups may nest or be dotted; keys are not checked."""
    try:
        with open(path, encoding="utf-8") as stream:
            root = yaml.compose(stream, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}:1: expected settings such as `seed: 1`, found {root.id}")
    return dict(_walk(root, "", str(path), {}))


def _walk(node: yaml.MappingNode, prefix: str, file: str, seen: dict[str, int]) -> Iterable[tuple[str, Setting]]:
    loader = yaml.SafeLoader("")
    for key, value in node.value:
        name, line = prefix + str(key.value), key.start_mark.line + 1
        # `columns` is a setting that is itself a map; every other map is a group of settings.
        if isinstance(value, yaml.MappingNode) and str(key.value).rpartition(".")[2] != "columns":
            yield from _walk(value, name + ".", file, seen)
            continue
        if name in seen:
            raise UserError(f"{file}:{line}: {name} is set twice, first in line {seen[name]}")
        seen[name] = line
        yield name, Setting(loader.construct_object(value, deep=True), f"{file}:{line}")


def section(values: Mapping[str, Setting], stage: str) -> Mapping[str, Setting]:
    """A stage's own part, if the file is a recipe for several; else the whole."""
    own = {path.removeprefix(f"{stage}."): item for path, item in values.items() if path.startswith(f"{stage}.")}
    return own or values


def to_yaml(cfg: object) -> str:
    """The whole tree as YAML that `read_yaml` reads back."""
    return yaml.safe_dump(_plain(cfg), sort_keys=False, allow_unicode=True, width=WIDTH)


def explained(cfg: object, indent: str = "") -> Iterable[str]:
    """The lines of `to_yaml`, under comments that say what each setting does."""
    return _explained(cfg, setting_docs(type(cfg)), "", indent)


def _explained(cfg: object, told: Mapping[str, str], prefix: str, indent: str) -> Iterable[str]:
    for field in dataclasses.fields(cfg):
        path, value, start = prefix + field.name, getattr(cfg, field.name), f"{indent}# "
        yield from textwrap.wrap(
            told.get(path, ""), WIDTH, initial_indent=start, subsequent_indent=start,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        if dataclasses.is_dataclass(value):
            yield f"{indent}{field.name}:"
            yield from _explained(value, told, f"{path}.", f"{indent}  ")
        else:
            yield from textwrap.indent(to_yaml({field.name: _plain(value)}), indent).splitlines()


def to_json(cfg: object) -> dict[str, Any]:
    """The whole tree as plain JSON values."""
    return _plain(cfg)


def from_json(stage: str, tree: Mapping[str, Any]) -> Any:
    """The settings that `to_json` (run.json's `config`) wrote."""
    cls = STAGES[stage]
    flat: dict[str, Setting] = {}

    def walk(inner: Mapping[str, Any], prefix: str) -> None:
        for name, value in inner.items():
            if isinstance(value, Mapping) and prefix + name not in setting_types(cls):
                walk(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = Setting(value, "run.json")

    walk(tree, "")
    return resolve(cls, flat)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def fingerprint(cfg: object) -> str:
    """sha256 of the tree, short: two runs with one fingerprint had the same settings."""
    return hashlib.sha256(json.dumps(_plain(cfg), sort_keys=True).encode()).hexdigest()[:16]


def difference(a: object, b: object) -> list[tuple[str, Any, Any]]:
    """(path, value in a, value in b) of every setting in which two trees of one stage differ."""
    left, right = flatten(a), flatten(b)
    return [(path, left[path], right[path]) for path in left if left[path] != right[path]]
