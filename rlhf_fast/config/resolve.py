"""One tree of settings from several sources: the defaults, a preset, a YAML file and flags. A later source wins.

A setting is named by its path, `optim.lr`. The error for a wrong name or value has that path, the file and line it
comes from, and the nearest right name: `ppo: no setting "optim.lrr"; did you mean optim.lr? (recipe.yaml:12)`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    TypeGuard,
    TypeVar,
    cast,
    get_type_hints,
)

from rlhf_fast.config.checks import BadSetting
from rlhf_fast.config.library_names import meant_setting
from rlhf_fast.config.rewards import EXPECTED, REWARD_SPECS, spec_name
from rlhf_fast.config.stages import STAGES, StageConfig
from rlhf_fast.config.typed import WRITTEN, typed
from rlhf_fast.config.yaml_file import WIDTH, Setting, dump_yaml
from rlhf_fast.errors import UserError, listed, shortened

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
F = TypeVar("F", bound=Callable[..., Any])
DEFAULT = "the default"


def _cached(function: F) -> F:
    """Apply functools.cache and keep the function's signature for type checkers."""
    return cast(F, functools.cache(function))


def _is_group(kind: object) -> TypeGuard[type[DataclassInstance]]:
    """Return whether a field's type is a group of settings."""
    return dataclasses.is_dataclass(kind)


@_cached
def setting_types(cls: type[DataclassInstance]) -> Mapping[str, Any]:
    """Return the type of every setting in the tree of dataclass `cls`, by path."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if _is_group(kind):
            found |= {f"{field.name}.{path}": inner for path, inner in setting_types(kind).items()}
        else:
            found[field.name] = kind
    return types.MappingProxyType(found)


@_cached
def setting_docs(cls: type[DataclassInstance]) -> Mapping[str, str]:
    """Return the text of every group and setting in the tree of dataclass `cls`, by path.

    The text is the string below the field in the source, which is also what tyro prints for --help. A group without one
    has the docstring of its class.
    """
    found: dict[str, str] = {}
    hints = get_type_hints(cls)
    for owner in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        found |= _field_docstrings(owner)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if _is_group(kind):
            found.setdefault(field.name, " ".join(str(kind.__doc__).split()))
            found |= {f"{field.name}.{path}": text for path, text in setting_docs(kind).items()}
    return types.MappingProxyType(found)


def _field_docstrings(cls: type) -> dict[str, str]:
    """Return the strings that follow the fields in the source of `cls` itself, each on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            found[statement.target.id] = " ".join(ast.literal_eval(following.value).split())
    return found


def flatten(cfg: DataclassInstance) -> dict[str, Any]:
    """Return the value of every setting in a tree, by path."""
    return {path: functools.reduce(getattr, path.split("."), cfg) for path in setting_types(type(cfg))}


def resolve(cls: type[T], *layers: Mapping[str, Setting], check: bool = True) -> T:
    """Return the tree of `cls` with the layers' values over the defaults; a later layer wins.

    Raises UserError for an unknown setting, a value of the wrong type, and a broken rule. check=False leaves out the
    rules, for a tree that flags will complete.
    """
    settings: dict[str, Setting] = {}
    for layer in layers:
        for path, setting in layer.items():
            settings[path] = Setting(coerce(cls, path, setting), setting.origin)
    return _construct(cls, cls, settings, "", check)


def _construct(root: type, cls: type[T], settings: Mapping[str, Setting], prefix: str, check: bool) -> T:
    """Build the part of the tree below `prefix`, of dataclass `cls`."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        path = prefix + field.name
        kind = hints[field.name]
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if _is_group(kind):
            defaults = {f"{path}.{inner}": Setting(value, DEFAULT) for inner, value in flatten(default).items()}
            values[field.name] = _construct(root, kind, defaults | dict(settings), path + ".", check)
        else:
            values[field.name] = settings[path].value if path in settings else default
    if check:
        try:
            return cls(**values)
        except BadSetting as error:
            raise setting_error(root, error, prefix + error.name, settings) from error
    tree = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(tree, name, value)
    return tree


def setting_error(root: type, error: BadSetting, path: str, settings: Mapping[str, Setting]) -> UserError:
    """Return the sentence of a broken rule with the setting's whole path and its origin."""
    origin = settings[path].origin if path in settings else DEFAULT
    source = f" ({origin})" if origin != DEFAULT else ""
    got = f", got {show(error.value)}" if error.got else ""
    return UserError(f"{stage_name(root)}: {path} {error.rule}{got}{source}")


def stage_name(cls: type) -> str:
    return getattr(cls, "stage", "") or cls.__name__


def show(value: object) -> str:
    """Return a value as it would be in a YAML file, on one line."""
    if isinstance(value, str) and value and not set(value) & set(" :#'\""):
        return value
    return shortened(json.dumps(to_plain(value), ensure_ascii=False, default=repr))


def unknown_setting(cls: type[DataclassInstance], path: str, origin: str) -> UserError:
    """Return the sentence for a name that is no setting."""
    names = list(setting_types(cls))
    inside = [name for name in names if name.startswith(path + ".")]
    if inside:
        hint = f"it is a group, of {listed(inside, 4)}"
        return UserError(f'{stage_name(cls)}: "{path}" takes no value; {hint} ({origin})')
    if taken := next((name for name in names if path.startswith(name + ".")), ""):
        inner = path.removeprefix(taken + ".")
        rule = f'takes a value; there is no setting "{inner}" in it'
        if setting_types(cls)[taken] == REWARD_SPECS:
            rule = f'{EXPECTED}, not a map with "{inner}"'
        return UserError(f"{stage_name(cls)}: {taken} {rule} ({origin})")
    meant = meant_setting(path, names)
    hint = f"did you mean {meant}?" if meant else f"{_listing(cls)} lists them"
    return UserError(f'{stage_name(cls)}: no setting "{path}"; {hint} ({origin})')


def _listing(cls: type) -> str:
    """Return the command that lists the settings of a tree."""
    return (
        f"`rlhf-fast show-config {stage_name(cls)}`"
        if cls in STAGES.values()
        else f"`rlhf-fast {stage_name(cls)} --help`"
    )


def coerce(cls: type[DataclassInstance], path: str, setting: Setting) -> Any:
    """Return the value in its setting's type. Text that spells a number will do for one."""
    if path not in setting_types(cls):
        raise unknown_setting(cls, path, setting.origin)
    try:
        return typed(setting_types(cls)[path], setting.value, WRITTEN)
    except ValueError as error:
        is_trained = cls in STAGES.values() and path.endswith(".dtype")
        rule = "must be one of float32, bfloat16" if is_trained else str(error)  # no stage trains in float16
        raise UserError(f"{stage_name(cls)}: {path} {rule}, got {show(setting.value)} ({setting.origin})") from error


def to_yaml(cfg: object) -> str:
    """Return the whole tree as YAML that `read_yaml` reads back."""
    return dump_yaml(to_plain(cfg))


def to_commented_yaml(cfg: DataclassInstance, indent: str = "") -> Iterator[str]:
    """Yield the lines of `to_yaml`, each setting below a comment with its text."""
    return _commented_yaml(cfg, setting_docs(type(cfg)), "", indent)


def _commented_yaml(cfg: DataclassInstance, docs: Mapping[str, str], prefix: str, indent: str) -> Iterator[str]:
    for field in dataclasses.fields(cfg):
        path = prefix + field.name
        value = getattr(cfg, field.name)
        start = f"{indent}# "
        yield from textwrap.wrap(
            docs.get(path, ""),
            WIDTH,
            initial_indent=start,
            subsequent_indent=start,
            break_long_words=False,
            break_on_hyphens=False,
        )
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield f"{indent}{field.name}:"
            yield from _commented_yaml(value, docs, f"{path}.", f"{indent}  ")
        else:
            yield from textwrap.indent(to_yaml({field.name: to_plain(value)}), indent).splitlines()


def to_plain(value: Any) -> Any:
    """Return a tree as nested dicts, or one value, with lists for tuples and names for functions: run.json's
    `config`."""
    if callable(value):
        return spec_name(value)
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_plain(entry) for entry in value]
    if isinstance(value, str):  # rows in Python are a text of another class
        return str(value)
    return value


def from_json(stage: str, tree: Mapping[str, Any], file: str = "run.json") -> StageConfig:
    """Return the settings of a stage from run.json's `config`. Rules of today are not applied to an older run."""
    cls = STAGES[stage]
    return resolve(cls, dict(json_settings(cls, tree, "", file)), check=False)


def json_settings(
    cls: type[DataclassInstance], tree: Mapping[str, Any], prefix: str, file: str
) -> Iterator[tuple[str, Setting]]:
    for name, value in tree.items():
        path = prefix + name
        if isinstance(value, Mapping) and path not in setting_types(cls):
            yield from json_settings(cls, value, f"{path}.", file)
        else:
            yield path, Setting(value, file)


def difference(a: DataclassInstance, b: DataclassInstance) -> list[tuple[str, Any, Any]]:
    """Return (path, value in a, value in b) of every setting in which two trees of one stage differ."""
    left, right = ({path: _with_names(value) for path, value in flatten(cfg).items()} for cfg in (a, b))
    return [(path, left[path], right[path]) for path in left if left[path] != right[path]]


def _with_names(value: Any) -> Any:
    """Return a setting's value with the names of functions in their place, as run.json has them."""
    if isinstance(value, tuple):
        return tuple(map(_with_names, value))
    return spec_name(value) if callable(value) else value
