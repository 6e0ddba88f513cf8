"""Read a value in the type of its setting, whether it was given in Python, in a YAML file or by a flag."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from rlhf_fast.config.rewards import REWARD_SPECS, reward_value
from rlhf_fast.errors import did_you_mean

UNIONS = (Union, UnionType)


class Source(NamedTuple):
    """The readers of numbers and texts, and the words of errors, by which values of Python and of a file differ."""

    number: Callable[[type, Any], int | float]
    text: Callable[[Any], str]
    switch: str
    list: str
    map: str


def typed(kind: Any, value: Any, source: Source) -> Any:
    """Return a value that has a setting's type, or stands for one that does. ValueError says what it must be.

    A type that no setting of ours has, as one of a subclass, takes every value.
    """
    origin = get_origin(kind)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a scalar of NumPy's or torch's
        value = value.item()
    if kind == REWARD_SPECS:
        return reward_value(value)
    if dataclasses.is_dataclass(kind):
        return _group(kind, value)
    if origin is Literal:
        return _choice(get_args(kind), value)
    if origin in UNIONS:
        return _one_of(get_args(kind), value, source)
    if origin is tuple:
        return _entries(get_args(kind), value, source)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"must be {source.map}")
        of_keys, of_values = get_args(kind)
        return {typed(of_keys, key, source): _entry(of_values, item, str(key), source) for key, item in value.items()}
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"must be {source.switch}")
    if kind in (int, float):
        if isinstance(value, bool):
            raise _not_a(kind)
        return source.number(kind, value)
    return source.text(value) if kind is str else value


def _group(kind: Any, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    inner = ", ".join(f"{name}=..." for name in value) if isinstance(value, Mapping) else "..."
    article = "an" if kind.__name__[0] in "AEIO" else "a"
    raise ValueError(f"must be {article} {kind.__name__}; write {kind.__name__}({inner})")


def _choice(choices: Sequence[Any], value: Any) -> Any:
    for choice in choices:
        if (type(value) is type(choice) or isinstance(value, str)) and value == choice:  # a text may be of an enum
            return choice
    names = [str(choice) for choice in choices if choice != ""]  # the empty text is "not given"
    hint = did_you_mean(str(value), names, "")
    raise ValueError(f"must be one of {', '.join(names)}{f' ({hint})' * bool(hint)}")


def _one_of(kinds: Sequence[Any], value: Any, source: Source) -> Any:
    """Return the value in the first of the types that takes it. A list is of those that are lists, if one is."""
    if value is None and type(None) in kinds:
        return None
    is_list = isinstance(value, (list, tuple))
    rules = []
    for kind in [kind for kind in kinds if (get_origin(kind) is tuple) == is_list] or kinds:
        if kind is type(None):
            continue
        try:
            return typed(kind, value, source)
        except ValueError as error:
            rules.append(str(error))
    raise ValueError(" or ".join(dict.fromkeys(rules)))


def _entries(kinds: Sequence[Any], value: Any, source: Source) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"must be {source.list}")
    is_any_length = kinds[-1] is Ellipsis
    if not is_any_length and len(value) != len(kinds):
        raise ValueError(f"must have {len(kinds)} entries")
    each = zip(repeat(kinds[0]) if is_any_length else kinds, value, strict=False)
    return tuple(_entry(kind, item, f"entry {i}", source) for i, (kind, item) in enumerate(each, 1))


def _entry(kind: Any, item: Any, name: str, source: Source) -> Any:
    """Return one value of a map or list. Its error says which."""
    if item is None and kind is not Any and type(None) not in get_args(kind):
        raise ValueError(f"must have a value for {name}")
    try:
        return typed(kind, item, source)
    except ValueError as error:
        raise ValueError(f"{error} for {name}") from None


def _not_a(kind: type) -> ValueError:
    return ValueError("must be a whole number" if kind is int else "must be a number")


def _python_number(kind: type, value: Any) -> int | float:
    if not isinstance(value, Real):
        raise _not_a(kind)
    if kind is float:
        try:
            number = float(value)  # NumPy's float64 is a float
        except OverflowError:
            raise _not_a(kind) from None
        return value if type(value) is int else number
    if isinstance(value, Integral):
        return int(value)
    if math.isfinite(value) and float(value).is_integer():  # 1e5
        return int(float(value))
    raise _not_a(kind)


def _written_number(kind: type, value: Any) -> int | float:
    """Return a number that may be given as its text."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if kind is float and math.isfinite(number):
        return number
    if kind is int and number.is_integer():
        text = str(value).strip()
        return int(text) if text.lstrip("+-").isdigit() else int(number)  # a float cannot hold every large int
    raise _not_a(kind)


def _python_text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is not None and not isinstance(value, str):
        raise ValueError("must be text")
    return value or ""


def _written_text(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError("must be text (in quotes, if it looks like a number)")
    return value or ""


PYTHON = Source(
    _python_number, _python_text, "True or False", "a list or tuple", "a dict such as {'completion': 'answer'}"
)
WRITTEN = Source(_written_number, _written_text, "true or false", "a list", "a map such as {completion: answer}")
"""The values of YAML files, flags and run.json."""
