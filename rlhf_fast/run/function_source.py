"""Checksums of reward functions, by which a resumed run knows that a function is still the same."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import symtable
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import FunctionType, MethodType
from typing import Any

from rlhf_fast.config.rewards import RewardSpec, bare_function, is_function, spec_name
from rlhf_fast.errors import UserError
from rlhf_fast.run.info import sha256
from rlhf_fast.training.rewards import import_function, source_file

PLAIN = (str, int, float, bool, bytes, type(None))


def function_checksum(spec: RewardSpec) -> str:
    """Return the checksum of a function's source, "" if it cannot be read.

    A function, of a module or of the script that runs, has that of its own text, of the plain values that it holds and
    of the lines of its file that define the names which it uses: the other lines may change. A class or object that a
    module has under a name has that of the module's file. UserError if module:function cannot be imported.
    """
    function = import_function(spec) if isinstance(spec, str) else spec
    if isinstance(function, FunctionType) or not (isinstance(spec, str) or _is_importable(function)):
        with suppress(OSError, TypeError, SyntaxError, ValueError):
            return hashlib.sha256("\n".join(_text(function)).encode()).hexdigest()
    if isinstance(spec, str) or _is_importable(function):
        file = source_file(spec_name(spec))
        return sha256(file) if file and file.is_file() else ""
    return ""


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
        own = _lambda_text(function) if function.__name__ == "<lambda>" else _own_text(function)
        yield own
        yield from _definitions(function, own)
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


def _definitions(function: FunctionType, own: str) -> Iterator[str]:
    """Yield the statements of the function's file that define the names which `own` uses, and those that they use."""
    try:
        statements = ast.parse("".join(inspect.findsource(inspect.unwrap(function))[0])).body
        names = _global_names(own)
    except SyntaxError:  # a cell of a notebook may hold more than Python
        return
    left = {ast.unparse(statement): _defined(statement) for statement in statements}
    found = {own}
    while new := [text for text, defined in left.items() if defined & names and text not in found]:
        found.update(new)
        names = names.union(*map(_global_names, new))
    yield from (text for text in left if text in found and text != own)


def _defined(statement: ast.stmt) -> set[str]:
    """Return the names that a statement of a module defines."""
    if isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test):  # what a script does
        return set()
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(name.asname or name.name).partition(".")[0] for name in statement.names}
    nodes = list(ast.walk(statement))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    inner = [node for node in ast.iter_child_nodes(statement) if isinstance(node, ast.stmt)]
    return stored.union(*map(_defined, inner))


def _global_names(text: str) -> set[str]:
    """Return the names that a text uses and that are not local to a function in it."""
    top = symtable.symtable(text, "reward", "exec")
    tables, names = [top], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        symbols = [symbol for symbol in table.get_symbols() if symbol.is_referenced()]
        names |= {symbol.get_name() for symbol in symbols if table is top or symbol.is_global()}
    return names


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
            if is_function(spec) and not function_checksum(spec):
                yield f"reward {spec_name(spec)}: its source cannot be read, so a resumed run cannot tell if it changed"
