"""Names are the field's words, and docstrings are sentences: retired words and openings do not come back."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a source checkout")

# Private words that stood where the field has one (CONTRIBUTING.md, Style). They are no part of a name: `pieces`,
# `most_pages`, `_told`. The standard word is beside each.
RETIRED = { "arena": "kv_cache",
    "begun": "start", "bout": "problem", "contest": "compare", "contestant": "provider", "contestants": "providers",
    "declined": "unsupported", "hasten": "speed_up", "lane": "stream_or_threads",
    "least": "min", "most": "max", "nobody": "none", "pieces": "chunks", "pocket": "demo", "race": "gumbel_argmax",
    "rival": "baseline", "rivals": "baselines", "seat": "assign",
    "slope": "grad", "slopes": "grads", "steepness": "kl_grad", "stepwise": "op_step", "tempering":
    "inverse_temperature", "told": "manifest, docs, warned, ...", "wide": "upcast",
}  # fmt: skip
OPENINGS = re.compile(r"(Of|Those|What|Whatever|Who|Whom|Whose|Whether|Where|Wherever|How|Which|Nobody)\b")


def python_files() -> list[Path]:
    folders = ("rlhf_fast", "kernels", "bench", "tests", "examples")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Identifiers that the file defines or binds, with their lines; a test's name is a sentence and is left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("test_"):
            yield node.lineno, node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Docstrings of modules, classes and functions, and the strings below fields and constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for line in node.body:
                constant = isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
                if constant and isinstance(line.value.value, str):
                    yield line.lineno, line.value.value.strip()


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_python(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for line, name in names(tree):
        parts = set(re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().split("_"))
        retired = parts & RETIRED.keys()
        if path.parent.name == "triton":
            retired -= {"lane"}  # a thread of a warp
        found += [f"{path.name}:{line}: {name}: use {RETIRED[word]}" for word in retired]
    for line, text in docstrings(tree):
        if OPENINGS.match(text):
            found.append(f"{path.name}:{line}: begin with a verb or a subject, not {text[:40]!r}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.*")), ids=lambda path: path.name)
def test_compiled(path):
    found, before = [], ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        comment = line.strip().removeprefix("//").strip() if line.strip().startswith("//") else ""
        if comment and not before and OPENINGS.match(comment):
            found.append(f"{path.name}:{number}: begin with a verb or a subject, not {comment[:40]!r}")
        code = re.sub(r'"[^"]*"', "", line.partition("//")[0])
        for word in re.findall(r"\w+", code):
            retired = set(word.lower().split("_")) & RETIRED.keys() - {"lane"}  # CUDA's own word
            found += [f"{path.name}:{number}: {word}: use {RETIRED[part]}" for part in retired]
        before = comment
    assert not found, "\n".join(found)
