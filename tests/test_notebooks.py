"""The notebooks of examples/ run as they are, and are stored with the outputs of a whole run."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from run_notebook import code_cells, source

from rlhf_fast import ops
from rlhf_fast.cli.main import COMMANDS, main
from rlhf_fast.config.resolve import setting_types
from rlhf_fast.config.stages import STAGES
from rlhf_fast.run.plot import load_pyplot

ROOT = Path(__file__).resolve().parent.parent
RUNNER = ROOT / "tests" / "support" / "run_notebook.py"
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
COMPILED = {"microbenchmarks"}  # it measures the compiled kernels
MAX_BYTES = 200_000
# As a user has it: these tests themselves run under Triton's interpreter and with the simulator of the CUDA kernels.
FOR_TESTS = ("TRITON_INTERPRET", "RLHF_FAST_SIMT", "PYTEST_ADDOPTS", "RLHF_FAST_BACKEND", "RLHF_FAST_STRICT")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in FOR_TESTS}
ENVIRONMENT |= {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # other tests run beside it

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="not a source checkout")
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def run(path: Path, folder: Path) -> subprocess.CompletedProcess:
    """Run a notebook in a process of its own, in a folder of its own."""
    command = [sys.executable, str(RUNNER), str(path)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT)


def notebook(*cells: str) -> str:
    """Return a notebook with these code cells."""
    return json.dumps({"cells": [{"cell_type": "code", "source": cell.splitlines(True)} for cell in cells]})


def test_there_is_one_for_each_use():
    assert [path.stem for path in NOTEBOOKS] == ["call_ops", "microbenchmarks", "train_in_python"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_any_folder(path, tmp_path):
    """Its cells assert what its text says."""
    if path.stem in COMPILED and ops.gae.chosen("cpu") == "reference":
        pytest.skip(ops.gae.why("cpu"))
    done = run(path, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert {found.name for found in tmp_path.iterdir()} <= {"runs"}  # nothing is written elsewhere
    assert "Warning" not in done.stderr, done.stderr


@each
def test_it_asserts(path):
    checks = 0
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(source(cell))):  # a magic would be no Python
            is_call = isinstance(node, ast.Attribute) and node.attr == "assert_close"
            checks += is_call or isinstance(node, ast.Assert)
    assert checks >= 5


@each
def test_it_is_stored_with_the_outputs_of_one_run(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run all cells anew"
    for number, cell in enumerate(cells, 1):
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert kinds and "error" not in kinds, f"cell {number} has no output, or an error"
        text = json.dumps(cell["outputs"])
        assert "Warning" not in text and "Traceback" not in text, f"cell {number}"


@each
def test_it_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"(?:/home|/root|/Users|/tmp|/work|/mnt|/var|/opt|/usr)/[\w./-]*|[A-Z]:\\\\\w+", text)
    assert not found, found
    assert "site-packages" not in text and str(Path.home()) not in text


@each
def test_it_is_small_and_clean(path):
    stored = read(path)
    assert path.stat().st_size < MAX_BYTES
    assert (stored["nbformat"], stored["nbformat_minor"]) == (4, 5)
    assert stored["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert stored["metadata"].keys() <= {"kernelspec", "language_info"}
    assert not [cell["id"] for cell in stored["cells"] if cell["metadata"]], "cells have metadata, such as timestamps"
    plots = re.findall(r'"image/png": "', path.read_text(encoding="utf-8"))
    assert len(plots) == (path.stem == "train_in_python")
    kinds = [cell["cell_type"] for cell in stored["cells"]]
    assert kinds[0] == kinds[-1] == "markdown" and source(stored["cells"][0]).startswith("# ")


@each
def test_its_links_lead_somewhere(path):
    """As a reader on GitHub sees it; README names each notebook."""
    texts = [source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]
    targets = re.findall(r"\]\(([^)#]+)\)", "\n".join(texts))
    assert len(targets) >= 2
    assert not [target for target in targets if not (path.parent / target).exists()]
    assert f"(examples/{path.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


def shown_commands() -> list[str]:
    """Return the commands in the sh blocks of all notebooks, without their comments."""
    texts = [source(cell) for path in NOTEBOOKS for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]
    shown = re.findall(r"^```sh\n(.*?)^```", "\n".join(texts) + "\n", re.M | re.S)
    return [line.partition("  #")[0].strip() for block in shown for line in block.splitlines()]


def is_ours(command: str) -> bool:
    return command.startswith("rlhf-fast ")


@pytest.mark.parametrize("command", [command for command in shown_commands() if is_ours(command)])
def test_a_command_of_ours_that_is_shown_exists(command, capsys):
    _, name, *words = shlex.split(command)
    flags = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    assert name in COMMANDS
    if name in STAGES:
        assert flags <= {"config", *setting_types(STAGES[name])}
        return
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert flags <= {flag.replace("-", "_") for flag in re.findall(r"--([\w-]+)", capsys.readouterr().out)}


@pytest.mark.exhaustive(0, slow=3)
@pytest.mark.parametrize("command", [command for command in shown_commands() if not is_ours(command)])
def test_another_command_that_is_shown_runs(command):
    """As far as is quick: pytest collects, a program prints its help, a report of no file is empty."""
    words = shlex.split(command)
    flags = [word for word in words if word.startswith("--")]
    if words[0] == "pytest":
        words = [word for word in words if word not in ("--device", "cuda")]  # it is refused where there is no GPU
        tried, flags = ["-m", "pytest", "--collect-only", "-q", "-n", "0", *words[1:]], []
    else:
        assert words[:2] == ["python", "-m"], f"no test tries `{command}`"
        tried = [*words[1:3], *["--help"] * (not words[2].endswith(".report"))]
    done = subprocess.run([sys.executable, *tried], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert not [flag for flag in flags if flag not in done.stdout]


@pytest.mark.parametrize(
    "cell, said",
    [
        ("assert 1 == 2, 'not so'", "not so"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "a notebook runs offline"),
    ],
)
def test_the_runner_names_the_cell_that_fails(cell, said, tmp_path):
    path = tmp_path / "bad.ipynb"
    path.write_text(notebook("x = 1", f"assert x == 1\n{cell}", "print('never')"), encoding="utf-8")
    done = run(path, tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "bad.ipynb, cell 2 failed" in done.stderr and said in done.stderr
    assert cell.splitlines()[-1] in done.stderr  # the traceback shows the line


def test_the_runner_gives_functions_their_source(tmp_path):
    """A run records the source of a reward function, which it reads as it does in Jupyter."""
    path = tmp_path / "good.ipynb"
    cell = "import inspect\nprint(double.__module__, inspect.getsource(double), end='')"
    path.write_text(notebook("def double(x):\n    return 2 * x\n", cell), encoding="utf-8")
    done = run(path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "__main__ def double(x):\n    return 2 * x\n"


def test_drawing_leaves_a_notebook_its_backend(monkeypatch):
    """After `plot` or an evaluation the user's own figures are still shown."""
    matplotlib = pytest.importorskip("matplotlib")
    try:
        for in_notebook, expected in ((True, "svg"), (False, "agg")):
            matplotlib.use("svg")
            with monkeypatch.context() as patched:
                patched.delitem(sys.modules, "ipykernel", raising=False)
                if in_notebook:
                    patched.setitem(sys.modules, "ipykernel", matplotlib)
                load_pyplot("plot")
            assert matplotlib.get_backend().lower() == expected
    finally:
        matplotlib.use("Agg")
