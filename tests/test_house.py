"""The house's rules, read from the files: who may import whom, where things are, how long a file may grow."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a source checkout")

# From the roof down; a module imports only from floors below its own (same floor: only inside one package).
FLOORS = [
    {"cli"},
    {"bench", "pocket", "recipe", "environment", "generate"},
    {"plot", "memory", "flags", "options"},
    {"stages"},
    {"experience", "rollout", "checkpoint", "rewards"},
    {"model", "data", "losses", "learner", "logs", "kl"},
    {"adapters", "dropout", "packing", "pretrained"},
    {"presets"},
    {"resolve"},
    {"config", "batches"},
    {"settings"},
    {"ops"},
    {"kernels"},
]


def python_files():
    return [p for p in sorted((ROOT / "rlhf_fast").rglob("*.py")) if "__pycache__" not in p.parts]


def room(path: Path) -> str:
    return path.relative_to(ROOT / "rlhf_fast").with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{a.name}" for a in node.names]
        rooms |= {n.split(".")[1] for n in names if n.startswith("rlhf_fast.")}
    return rooms


def floor(name: str) -> int | None:
    return next((i for i, rooms in enumerate(FLOORS) if name in rooms), None)


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    here = room(path)
    if here in ("__init__", "errors", "__main__"):
        return
    assert floor(here) is not None, f"{path.name}: give the room {here!r} a floor in {Path(__file__).name}"
    for other in imported_rooms(path) - {here, "errors", "__version__"}:
        assert floor(other) is not None and floor(other) > floor(here), f"{here} must not import {other}"


def test_stages_do_not_import_one_another():
    stages = {"sft", "reward", "ppo"}
    for path in (ROOT / "rlhf_fast" / "stages").glob("*.py"):
        named = set(re.findall(r"rlhf_fast\.stages(?:\.| import )(\w+)", path.read_text()))
        assert not (named & stages) - {path.stem}, path


def test_no_op_imports_another_op():
    files = {p.stem for p in (ROOT / "kernels").glob("*.py")}
    ops = {name for name in files if not name.startswith("_")}
    for path in (ROOT / "kernels").glob("*.py"):
        named = set(re.findall(r"rlhf_fast\.kernels(?:\.| import )(\w+)", path.read_text()))
        assert not (named & ops) - {path.stem}, f"{path.name} imports {named & ops}"


def test_every_compiled_kernel_is_found_by_its_name():
    """A source has the stem of its op, or of a family of ops, or of the rollout's step; each kernel in it is called by
    that name there."""
    callers = [*(ROOT / "kernels").glob("*.py"), ROOT / "rlhf_fast" / "rollout" / "decode_step.py"]
    launchers, ops = "\n".join(p.read_text() for p in callers), {p.stem for p in callers}
    for path in [*(ROOT / "csrc").glob("cpu/*.cpp"), *(ROOT / "csrc").glob("cuda/*.cu")]:
        family = path.stem.partition("_")[0]
        assert path.stem in ops or any(op.startswith(f"{family}_") for op in ops), path.relative_to(ROOT)
        names = re.findall(r"^KERNEL\((\w+)\)", path.read_text(), re.M)
        assert names, f"{path.relative_to(ROOT)} registers no kernel"
        unused = [name for name in names if not re.search(rf"\b{name}\b", launchers)]
        assert not unused, f"{path.relative_to(ROOT)}: nobody calls {unused}"


def test_no_drawers_and_no_package_named_kernels():
    drawers = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert not [p for p in ROOT.rglob("*.py") if p.name in drawers and ".venv" not in p.parts]
    assert not (ROOT / "kernels" / "__init__.py").exists(), "Hugging Face's package has that name"
    assert not (ROOT / "conftest.py").exists() and not (ROOT / "tests" / "__init__.py").exists()


def test_kernels_use_no_library_templates():
    """csrc/kernel.h says why: a template shared by two instruction sets is merged into one of them."""
    for path in [*(ROOT / "csrc" / "cpu").iterdir(), ROOT / "csrc" / "kernel.h"]:
        assert "std::" not in path.read_text(), path
        headers = set(re.findall(r"#include <(\w+[.\w]*)>", path.read_text()))
        assert all(h.endswith(".h") for h in headers), f"{path}: {headers}"


@pytest.mark.parametrize("path", [*python_files(), *sorted((ROOT / "kernels").glob("*.py"))], ids=lambda p: p.name)
def test_files_stay_readable(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines: look for the second thing that it does"


def test_public_functions_say_what_they_mean():
    silent = []
    for path in [*python_files(), *(ROOT / "kernels").glob("*.py")]:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) is not None or not tree.body, f"{path.relative_to(ROOT)} has no docstring"
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None and len(node.body) > 12:
                silent.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not silent, silent
