"""The functions of other libraries that an integration stands on, looked up in the installed sources without an import.

Each integration lists its own in HOOKS, lazy_head and layers in transformers_hooks.py.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from rlhf_fast.errors import UserError


@dataclass(frozen=True)
class Hook:
    """A name in a file of a library, and what an integration takes for granted of it."""

    library: str
    tested: str
    """The version of the library that the tests run."""
    file: str
    """Path from the folder that holds the package: trl/trainer/utils.py."""
    name: str
    """A function, a class, Class.method, or an imported name."""
    arguments: tuple[str, ...] | None = None
    """Names of all its arguments in order; None: any."""
    contains: str = ""
    """Code that is in it, as `ast.unparse` writes it."""
    optional: bool = False
    """The integration does without it, in another version."""


def library_version(library: str) -> str | None:
    """Return the version of an installed library, or None."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def moved(hook: Hook) -> str:
    """Return "" if the installed library has what the hook names, else a sentence on the difference."""
    found = library_version(hook.library)
    if found is None:
        return f"{hook.library} is not installed"
    at = f"{hook.library} {found}: {hook.file}"
    tested = f"the integration was tested with {hook.library} {hook.tested}"
    tree = _tree(hook.library, hook.file)
    if tree is None:
        return f"{at} does not exist; {tested}"
    node = _find(tree, hook.name)
    if node is None:
        return f"{at} has no {hook.name}; {tested}"
    if hook.arguments is not None:
        arguments = _arguments(node)
        if arguments != hook.arguments:
            return f"{at}: {hook.name} takes ({', '.join(arguments)}), not ({', '.join(hook.arguments)}); {tested}"
    if hook.contains not in ast.unparse(node):
        return f"{at}: {hook.name} has no `{hook.contains}`; {tested}"
    return ""


def check_version(library: str, tested: str, series: str) -> None:
    """Raise UserError unless a version that begins with `series` is installed."""
    found = library_version(library)
    if found is None:
        raise UserError(f"{library} is not installed: pip install {library}=={tested}")
    if not found.startswith(series):
        raise UserError(f"{library} {found} is not one that the integration knows: install {library}=={tested}")


def check(hooks: Sequence[Hook]) -> None:
    """Raise UserError unless all that the hooks name is there."""
    for hook in hooks:
        if not hook.optional and (fault := moved(hook)):
            raise UserError(f"{fault}: install {hook.library}=={hook.tested}")


def report(hooks: Sequence[Hook]) -> str:
    """Return one line on a library: the installed version, the tested one, and whether its hooks stand."""
    library, tested = hooks[0].library, hooks[0].tested
    found = library_version(library)
    if found is None:
        return "not installed"
    needed = [hook for hook in hooks if not hook.optional]
    faults = [fault for hook in needed if (fault := moved(hook))]
    stands = f"{len(faults)} of {len(needed)} hooks are gone: {faults[0]}" if faults else "its hooks stand"
    return f"{found}, tested with {tested}: {stands}"


@functools.cache
def _tree(library: str, file: str) -> ast.Module | None:
    spec = find_spec(library)  # of a top-level package: nothing of it is imported
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder).parent / file
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def _find(tree: ast.AST, name: str) -> ast.AST | None:
    """Return the node that defines or imports the name, within `if` and `try` too."""
    first, _, rest = name.partition(".")
    for node in _outer_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == first:
            return _find(node, rest) if rest else node
        if isinstance(node, ast.ImportFrom) and first in [alias.asname or alias.name for alias in node.names]:
            return node
    return None


def _outer_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            yield from _outer_nodes(node)


def _arguments(node: ast.AST) -> tuple[str, ...]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ()
    given = node.args
    return tuple(argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs))
