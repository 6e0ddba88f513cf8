"""The decorator `settings`: a frozen dataclass that refuses unknown names and values of another type where they are
given, in Python too."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rlhf_fast.config.library_names import meant_setting
from rlhf_fast.config.rewards import REWARD_SPECS, reward_value
from rlhf_fast.errors import UserError, nearest, shortened

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_options: Any) -> Any:  # typing has it from Python 3.11 on
        return lambda function: function


T = TypeVar("T")


class BadSetting(UserError):
    """A setting that breaks its rule. `name` is the field; resolve.py adds the whole path and the value's origin.

    got: the end of the sentence. It is empty for a value whose text has several lines, such as a table.
    """

    def __init__(self, owner: object, name: str, rule: str):
        self.name, self.rule, self.value = name, rule, getattr(owner, name)
        text = repr(self.value)
        self.got = "" if "\n" in text else f", got {shortened(text)}"
        super().__init__(f"{type(owner).__name__}: {name} {rule}{self.got}")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose values have the types of its fields.

    A list becomes a tuple, a path text, a scalar of NumPy's one of Python's. UserError for a name that is no field,
    with the nearest one; BadSetting for a value of another type. A class may have a classmethod `prepared(name,
    value)`, which turns what else may be given for a field into its type, before the check; its ValueError becomes a
    BadSetting.
    """
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    plain = made.__init__
    names = [field.name for field in dataclasses.fields(made)]

    @functools.wraps(plain)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = next((name for name in kwargs if name not in names), "")
        if unknown:
            raise UserError(f'{cls.__name__}: no setting "{unknown}"; {_hint(unknown, made)}')
        if len(args) > len(names):
            raise UserError(f"{cls.__name__}: has {len(names)} settings, got {len(args)} values; give them by name")
        values = dict(zip(names, args, strict=False))
        if twice := next((name for name in kwargs if name in values), ""):
            raise UserError(f"{cls.__name__}: {twice} is given twice, once by its position; give all by name")
        hints = _hints(made)
        for name, value in {**values, **kwargs}.items():
            values[name] = _value_of(made, name, hints[name], value)
        plain(self, **values)

    made.__init__ = checked
    return made


def _value_of(cls: Any, name: str, kind: Any, value: Any) -> Any:
    """Return a field's value in its type; BadSetting if it has another."""
    try:
        return typed(kind, cls.prepared(name, value) if hasattr(cls, "prepared") else value)
    except ValueError as error:
        owner: Any = object.__new__(cls)
        object.__setattr__(owner, name, value)
        raise BadSetting(owner, name, str(error)) from None


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    return get_type_hints(cls)


def _hint(name: str, cls: type) -> str:
    """Return the field that an unknown name is nearest to, or the group that has it."""
    groups = {group: kind for group, kind in _hints(cls).items() if dataclasses.is_dataclass(kind)}
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    inner = [f"{group}.{field.name}" for group, kind in groups.items() for field in dataclasses.fields(kind)]
    near = meant_setting(name, [*names, *inner])
    if near in inner:
        group, _, field = near.partition(".")
        return f"did you mean {group}={getattr(groups[group], '__name__', group)}({field}=...)?"
    return f"did you mean {near}?" if near else f"there are {', '.join(names)}"


def typed(kind: Any, value: Any) -> Any:
    """Return a value that has a setting's type, or stands for one that does. ValueError says what it must be."""
    origin = get_origin(kind)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a scalar of NumPy's or torch's
        value = value.item()
    if kind == REWARD_SPECS:
        return reward_value(value)
    if dataclasses.is_dataclass(kind):
        return _group(kind, value)
    if origin is Literal:
        return _choice(get_args(kind), value)
    if origin in (Union, UnionType):
        return _one_of(get_args(kind), value)
    if origin is tuple:
        return _entries(get_args(kind), value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError("must be a dict such as {'completion': 'answer'}")
        return {typed(str, key): typed(get_args(kind)[1], entry) for key, entry in value.items()}
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError("must be True or False")
    elif kind in (int, float):
        return _number(kind, value)
    elif kind is str:
        return _text(value)
    return value


def _group(kind: Any, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    inner = ", ".join(f"{name}=..." for name in value) if isinstance(value, Mapping) else "..."
    article = "an" if kind.__name__[0] in "AEIO" else "a"
    raise ValueError(f"must be {article} {kind.__name__}; write {kind.__name__}({inner})")


def _choice(choices: Sequence[Any], value: Any) -> Any:
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        near = nearest(str(value), map(str, choices))
        hint = f" (did you mean {near}?)" if near else ""
        raise ValueError(f"must be one of {', '.join(map(str, choices))}{hint}")
    return value


def _one_of(kinds: Sequence[Any], value: Any) -> Any:
    """Return the value in the first of the types that takes it. A type that is not checked takes every value."""
    rules = []
    for kind in kinds:
        if kind is type(None) and value is None:
            return None
        try:
            return typed(kind, value)
        except ValueError as error:
            rules.append(str(error))
    raise ValueError(" or ".join(dict.fromkeys(rules)))


def _entries(kinds: Sequence[Any], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError("must be a list or tuple")
    if kinds[-1] is not Ellipsis and len(value) != len(kinds):
        raise ValueError(f"must have {len(kinds)} entries")
    return tuple(_entry(kinds[0], entry, i) for i, entry in enumerate(value, 1))


def _entry(kind: Any, value: Any, number: int) -> Any:
    try:
        return typed(kind, value)
    except ValueError as error:
        raise ValueError(f"{error} for entry {number}") from None


def _number(kind: type, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError("must be a whole number" if kind is int else "must be a number")
    if kind is float:
        return value if type(value) is int else float(value)  # NumPy's float64 is a float
    if isinstance(value, Integral):
        return int(value)
    if math.isfinite(value) and float(value).is_integer():  # 1e5
        return int(float(value))
    raise ValueError("must be a whole number")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value
