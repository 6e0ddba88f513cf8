"""Checksums of reward functions, by which a resumed run knows that a function is still the same."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from rlhf_fast.config.rewards import RewardSpec, bare_function, is_function, spec_name
from rlhf_fast.errors import UserError
from rlhf_fast.run.info import sha256
from rlhf_fast.training.rewards import source_file

PLAIN = (str, int, float, bool, bytes, type(None))


class FunctionSource(NamedTuple):
    """The source of a function. checksum: "" if it cannot be read."""

    checksum: str
    file: Path | None = None
    """The file of its module, which is what the checksum is of; None for one of the function's own text."""


def function_source(spec: RewardSpec) -> FunctionSource:
    """Return the source of a function.

    A function that its module has under its name has the checksum of the module's file. One of the script that runs, a
    lambda and a function in another function have that of their own text, with the plain values that they hold: the
    script's settings may change. UserError if module:function cannot be imported.
    """
    if isinstance(spec, str) or _is_importable(spec):
        file = source_file(spec_name(spec))
        return FunctionSource(sha256(file), file) if file and file.is_file() else FunctionSource("")
    try:
        text = "\n".join(_text(spec))
    except (OSError, TypeError, SyntaxError, ValueError):
        return FunctionSource("")
    return FunctionSource(hashlib.sha256(text.encode()).hexdigest())


def _is_importable(function: Callable[..., Any]) -> bool:
    module, _, name = spec_name(function).rpartition(":")
    return module != "__main__" and getattr(sys.modules.get(module), name, None) is function


def _text(function: Any) -> Iterator[str]:
    """Yield the text of a callable, and the plain values that its partial, closure, defaults or attributes hold."""
    owner = bare_function(function)
    while isinstance(function, functools.partial):
        yield repr([_plain(value) for value in (*function.args, *sorted(function.keywords.items()))])
        function = function.func
    if isinstance(function, MethodType):
        yield from _attributes(function.__self__)
        function = function.__func__
    if isinstance(function, FunctionType):
        yield repr([_plain(value) for value in function.__defaults__ or ()])
        if function.__kwdefaults__:
            yield repr(_plain(dict(sorted(function.__kwdefaults__.items()))))
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # a cell that is not filled
                yield repr(_plain(cell.cell_contents))
        yield _lambda_text(function) if function.__name__ == "<lambda>" else _own_text(function)
    else:
        yield from _attributes(function)
        yield _own_text(owner)


def _attributes(owner: object) -> Iterator[str]:
    if inspect.ismodule(owner):
        return
    slots = [name for cls in type(owner).__mro__ for name in _names(getattr(cls, "__slots__", ()))]
    values = {name: getattr(owner, name) for name in slots if hasattr(owner, name)} | getattr(owner, "__dict__", {})
    for name, value in sorted(values.items()):
        yield f"{name}={_plain(value)!r}"


def _names(slots: str | Iterable[str]) -> list[str]:
    """Return the attributes that __slots__ names, without those that Python itself reads."""
    return [name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__")]


def _plain(value: Any) -> Any:
    """Return a value that is written the same in every process, or the name of its type."""
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return [(_plain(key), _plain(entry)) for key, entry in value.items()]
    if hasattr(value, "tolist"):  # NumPy's, torch's
        return _plain(value.tolist())
    return value if isinstance(value, PLAIN) else type(value).__qualname__


def _own_text(owner: Any) -> str:
    """Return the source of a function or class without comments and blanks."""
    return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(owner))))


def _lambda_text(function: FunctionType) -> str:
    """Return the lambdas that begin in the function's line: what stands around them may change."""
    lines, _ = inspect.findsource(function)
    start = function.__code__.co_firstlineno
    nodes = ast.walk(ast.parse("".join(lines)))
    found = [ast.unparse(node) for node in nodes if isinstance(node, ast.Lambda) and node.lineno == start]
    if not found:
        raise OSError("no lambda there")
    return "\n".join(found)


def unreadable_notes(specs: Iterable[RewardSpec]) -> Iterator[str]:
    """Yield a note for each function without a source: a resumed run does not see that it has changed."""
    for spec in specs:
        with suppress(UserError):  # check_fit says it
            if is_function(spec) and not function_source(spec).checksum:
                yield f"reward {spec_name(spec)}: its source cannot be read, so a resumed run cannot tell if it changed"
