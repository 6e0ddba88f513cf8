"""The decorator `settings`: a frozen dataclass that refuses unknown names and values of another type where they are
given, in Python too."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from rlhf_fast.config.library_names import meant_setting
from rlhf_fast.config.typed import PYTHON, typed
from rlhf_fast.errors import UserError, shortened

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
        self.got = _got(self.value)
        super().__init__(f"{type(owner).__name__}: {name} {rule}{self.got}")


def _got(value: object) -> str:
    text = repr(value)
    return "" if "\n" in text else f", got {shortened(text)}"


def require_settings(caller: str, name: str, kind: type, value: object) -> None:
    """Raise UserError if an argument of a function is not the settings that it takes, such as a dict of them."""
    try:
        typed(kind, value, PYTHON)
    except ValueError as error:
        raise UserError(f"{caller}: {name} {error}{_got(value)}") from None


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose values have the types of its fields.

    A list becomes a tuple, a path text, a scalar of NumPy's one of Python's. UserError for a name that is no field,
    with the nearest one; BadSetting for a value of another type. A class may have a classmethod `prepared(name,
    value)`, which turns what else may be given for a field into its type, before the check; its ValueError becomes a
    BadSetting. It gets its own result too.
    """
    rules = getattr(cls, "__post_init__", None)

    def post_init(self: Any, *args: Any) -> None:  # a subclass by dataclasses.dataclass has another __init__
        _check_types(self)
        if rules:
            rules(self, *args)

    cls.__post_init__ = post_init  # type: ignore[attr-defined]
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
        if twice := next((name for name in kwargs if name in names[: len(args)]), ""):
            raise UserError(f"{cls.__name__}: {twice} is given twice, once by its position; give all by name")
        plain(self, *args, **kwargs)

    made.__init__ = checked
    return made


def _check_types(cfg: Any) -> None:
    """Put every field's value in its type; BadSetting if it has another."""
    cls: Any = type(cfg)
    hints = _hints(cls)
    for name in (field.name for field in dataclasses.fields(cls) if field.init):
        value = getattr(cfg, name)
        try:
            if hasattr(cls, "prepared"):
                value = cls.prepared(name, value)
            object.__setattr__(cfg, name, typed(hints.get(name, Any), value, PYTHON))
        except ValueError as error:
            raise BadSetting(cfg, name, str(error)) from None


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    """Return the types of the fields. A subclass may have some that only a type checker can find: those of its base."""
    try:
        return get_type_hints(cls)
    except NameError:
        base: Any = cls.__base__
        if base is object:
            raise
        return _hints(base)


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
