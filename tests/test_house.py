"""Rules of the repository, read from the files: who may import whom, where things are, how long a file may grow."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a source checkout")

# From the top down: a package imports only from layers below its own. rlhf_fast/__init__.py is above all of them.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"demo"},
    {"stages"},
    {"eval", "export"},
    {"run", "scoring"},
    {"rollout", "training", "integrations"},
    {"model"},
    {"data"},
    {"config", "graph_capture"},
    {"ops", "batches", "errors"},
    {"kernels"},
]
MAX_ENTRIES = 17


def package_files() -> dict[str, Path]:
    """Dotted name -> file, of every module of rlhf_fast/."""
    files = {}
    for path in sorted((ROOT / "rlhf_fast").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = package_files()


def imports(path: Path) -> set[str]:
    """Modules of rlhf_fast/ and names in them that a file imports: at its head, inside functions, by import_module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the whole name of the module"
            names |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return {name for name in names if name.startswith("rlhf_fast.")}


def imported_files(path: Path) -> set[str]:
    """The modules of rlhf_fast/ among them, by their dotted names."""
    return {name if name in FILES else name.rpartition(".")[0] for name in imports(path)} & FILES.keys()


def layer(package: str) -> int:
    found = [i for i, packages in enumerate(LAYERS) if package in packages]
    assert found, f"give the package {package!r} a layer in {Path(__file__).name}"
    return found[0]


@pytest.mark.parametrize("name", [name for name in FILES if name != "rlhf_fast"])
def test_imports_run_downwards(name):
    here = name.split(".")[1]
    for other in {module.split(".")[1] for module in imports(FILES[name])} - {here, "__version__"}:
        assert layer(other) > layer(here), f"{name} must not import {other}"


@functools.cache
def defined_names(path: Path) -> set[str]:
    """Names that a file defines or imports at its top level, within `if` and `try` too."""
    names: set[str] = set()
    left: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while left:
        node = left.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            left += [n for n in ast.iter_child_nodes(node) if isinstance(n, (ast.stmt, ast.ExceptHandler))]
    return names


def test_imported_names_are_there():
    """In files too that only a GPU imports."""
    files = {**FILES, **{f"rlhf_fast.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}": path
                         for path in (ROOT / "kernels").rglob("*.py")}}  # fmt: skip
    checked = 0
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("rlhf_fast."):
                continue
            for alias in node.names:
                if f"{node.module}.{alias.name}" not in files and node.module in files:
                    checked += 1
                    assert alias.name in defined_names(files[node.module]), f"{path.name}: {node.module}.{alias.name}"
    assert checked > 300


def test_no_circles_between_files():
    # rlhf_fast/__init__.py imports lazily; what others take from it, `__version__`, is there from the start.
    graph = {name: imported_files(path) - {"rlhf_fast"} for name, path in FILES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) > 50


def test_the_package_can_be_taken_in_at_a_glance():
    entries = {path.name for path in (ROOT / "rlhf_fast").iterdir() if path.suffix == ".py" or [*path.glob("*.py")]}
    assert {name.removesuffix(".py") for name in entries} - {"__init__"} == set().union(*LAYERS) - {"kernels"}
    assert len([name for name in entries if not name.startswith("__")]) <= MAX_ENTRIES


def test_stages_do_not_import_one_another():
    stages = {"sft", "reward", "ppo"}
    for path in (ROOT / "rlhf_fast" / "stages" / f"{name}.py" for name in stages):
        named = set(re.findall(r"rlhf_fast\.stages(?:\.| import )(\w+)", path.read_text()))
        assert not (named & stages) - {path.stem}, path


def test_no_op_imports_another_op():
    files = {p.stem for p in (ROOT / "kernels").glob("*.py")}
    ops = {name for name in files if not name.startswith("_")}
    for path in (ROOT / "kernels").glob("*.py"):
        named = set(re.findall(r"rlhf_fast\.kernels(?:\.| import )(\w+)", path.read_text()))
        assert not (named & ops) - {path.stem}, f"{path.name} imports {named & ops}"


def test_every_compiled_kernel_is_found_by_its_name():
    """A source has the stem of its op, or of a family of ops, or of one of two whole steps; each kernel in it is called
    by that name there."""
    steps = ("rollout/compiled_step.py", "training/compiled_adamw.py")
    callers = [*(ROOT / "kernels").glob("*.py"), *(ROOT / "rlhf_fast" / step for step in steps)]
    launchers = "\n".join(p.read_text() for p in callers)
    ops = {p.stem for p in callers} | {"driver", "decode_step", "adamw"}  # what is asked at import, and the two
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
    for path in [*(ROOT / "csrc" / "cpu").iterdir(), *(ROOT / "csrc").glob("*.h")]:
        assert "std::" not in path.read_text(), path
        headers = set(re.findall(r"#include <(\w+[.\w]*)>", path.read_text()))
        assert all(h.endswith(".h") for h in headers), f"{path}: {headers}"


@pytest.mark.parametrize("path", [*FILES.values(), *sorted((ROOT / "kernels").glob("*.py"))], ids=lambda p: p.name)
def test_files_stay_readable(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines: look for the second thing that it does"


def test_public_functions_say_what_they_mean():
    silent = []
    for path in [*FILES.values(), *(ROOT / "kernels").glob("*.py")]:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) is not None or not tree.body, f"{path.relative_to(ROOT)} has no docstring"
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None and len(node.body) > 12:
                silent.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not silent, silent
